"""PVLA in a training loop of your own, with accelerate and without Trainer.

accelerate launch examples/accelerate_loop.py --steps 60
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from peft_read import Aligner, PVLAConfig, READConfig
from peft_read.data import How2Collator, generate_how2_mini

BACKBONE = Path(__file__).with_name("how2_mini_backbone")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args(arguments).steps
    accelerator = Accelerator()
    torch.manual_seed(0)
    base = AutoModelForSeq2SeqLM.from_pretrained(BACKBONE)
    model = get_peft_model(base, READConfig(r=8, task_type="SEQ_2_SEQ_LM"))

    clips = generate_how2_mini(16 * steps, seed=1)
    items = [{"video_id": c.video_id, "transcript": c.transcript, "summary": c.summary} for c in clips]
    features = {clip.video_id: clip.features for clip in clips}
    collator = How2Collator(AutoTokenizer.from_pretrained(BACKBONE), features, decoder_start_token_id=2)
    loader = DataLoader(items, batch_size=16, collate_fn=collator)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    aligner = Aligner(model, PVLAConfig(weight=0.01, mass=0.5))
    progress = tqdm(loader, disable=not accelerator.is_main_process)
    for batch in progress:
        with aligner.record() as recording:  # opens the hooks for this one forward pass
            outputs = model(**batch)
        pvla = aligner.loss(recording, batch, outputs)
        accelerator.backward(outputs.loss + pvla)
        optimizer.step()
        optimizer.zero_grad()
        progress.set_postfix(task=f"{float(outputs.loss.detach()):.3f}", pvla=f"{float(pvla.detach()):.4f}")
    accelerator.print(f"last task loss {float(outputs.loss.detach()):.4f}, weighted PVLA {float(pvla.detach()):.5f}")


if __name__ == "__main__":
    main()
