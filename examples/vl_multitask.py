"""Adapts one frozen VL-BART or VL-T5 to several tasks at once with any method of VL-Adapter, or with READ.

    accelerate launch examples/vl_multitask.py
    accelerate launch examples/vl_multitask.py --method adapter --share half_up
    accelerate launch examples/vl_multitask.py --data_dir scenes --method hyperformer --output_dir outputs/hyperformer

Without `--data_dir` it generates scenes of objects with boxes (VL-mini) and adapts the small backbone beside this
script to three tasks (a statement to verify, a question to answer, a scene to describe) of the one topic that the
backbone has never seen. With it, the tasks are human sentences on such scenes: NLVR, KiloGram and COCO's people
(docs/data.md says where they are published). `--method` is one of full, bitfit, prompt, lora, adapter, compacter,
hyperformer, read, read_pvla; `--share` says what the tasks share. An interrupted run that is started again with the
same arguments resumes from its last checkpoint. The run itself is in `reproduction/multitask.py`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).with_name("reproduction")))
from multitask import prepare
from run_folder import run_script

if __name__ == "__main__":
    run_script("vl_multitask.py", prepare)
