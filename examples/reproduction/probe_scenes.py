"""Measures a VL-BART on new generated scenes: the share of right answers of every topic of VL-mini.

    python examples/reproduction/probe_scenes.py examples/vl_mini_backbone --num_examples 128

Greedy decoding, on scenes drawn from a seed that pretraining does not use. Prints the table of the backbone's card.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from scene_batches import SceneCollator
from transformers import PreTrainedTokenizerFast

from peft_read.data import VL_MINI_TOPICS, generate_vl_mini
from peft_read.models import VLBartForConditionalGeneration

BATCH = 64
TASKS = ("verify", "ask")  # of what is described there are many true answers


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_name_or_path", help="a folder that pretrain_vl.py has written")
    parser.add_argument("--num_examples", type=int, default=128, help="of each topic and task")
    parser.add_argument("--seed", type=int, default=10**6)
    options = parser.parse_args(argv)
    if options.num_examples < 1:
        parser.error(f"--num_examples {options.num_examples} must be at least 1")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.model_name_or_path)
    model = VLBartForConditionalGeneration.from_pretrained(options.model_name_or_path).eval()
    collate = SceneCollator(tokenizer)
    shares = {
        task: {topic: right(model, tokenizer, collate, task, topic, options) for topic in VL_MINI_TOPICS}
        for task in TASKS
    }
    print("| | " + " | ".join(VL_MINI_TOPICS) + " |\n|---|" + "---|" * len(VL_MINI_TOPICS))
    for task, row in shares.items():
        print(f"| {task} | " + " | ".join(f"{share:.0f}" for share in row.values()) + " |")
    return shares


@torch.no_grad()
def right(model: Any, tokenizer: Any, collate: SceneCollator, task: str, topic: str, options: Any) -> float:
    """Percentage of answers that are the target, letter by letter."""
    drawn = generate_vl_mini(options.num_examples, seed=options.seed, tasks=[task], topics=[topic])
    said: list[str] = []
    for start in range(0, len(drawn), BATCH):
        rows = [
            {"text": f"{task}: {example.text}", "target": example.target, "tokens": example.tokens}
            for example in drawn[start : start + BATCH]
        ]
        batch = collate(rows)
        del batch["labels"]
        said += tokenizer.batch_decode(model.generate(**batch, max_new_tokens=12), skip_special_tokens=True)
    return 100 * sum(text.strip() == example.target for text, example in zip(said, drawn, strict=True)) / len(drawn)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # bad input: one line
        sys.exit(f"probe_scenes.py: {' '.join(str(error).split())}")
