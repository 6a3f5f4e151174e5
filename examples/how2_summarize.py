"""Adapts a frozen vision-guided summariser with READ + PVLA, and reports what that was worth.

    accelerate launch examples/how2_summarize.py
    accelerate launch examples/how2_summarize.py --data_dir how2 --model_name_or_path facebook/bart-base \
        --num_train_samples 2000 --output_dir outputs/how2
    accelerate launch examples/how2_summarize.py --data_dir how2 --model_name_or_path google/flan-t5-base --no_pvla \
        --method lora --output_dir outputs/how2_t5
    accelerate launch examples/how2_summarize.py examples/recipes/how2_original.yaml --data_dir how2

Without `--data_dir` it generates How2-mini and adapts the small backbone beside this script to the one domain that the
backbone has never seen. With it, the data is in the How2 layout: `<split>/tran.tok.txt`, `<split>/desc.tok.txt`, and
features as `video_features/<id>.npy` or `video_features.npz`. A YAML file of arguments may come first; arguments after
it win. An interrupted run that is started again with the same arguments resumes from its last checkpoint.
The run itself is in `reproduction/summarise.py`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).with_name("reproduction")))
from run_folder import run_script
from summarise import prepare

if __name__ == "__main__":
    run_script("how2_summarize.py", prepare)
