"""What a training step costs with READ, beside LoRA, the adapter without a recurrence, and full fine-tuning.

    python examples/benchmarks/training_step.py              # BART of base size, some minutes; prints Markdown
    python examples/benchmarks/training_step.py --quick      # a small BART, seconds
    python examples/benchmarks/training_step.py --output docs/training_step_benchmark    # and .json, .md

Random weights, float32, one thread. A step is forward, backward and AdamW's step; "frozen" is a forward pass and the
backward pass to the input embeddings. Times are processor times, medians of steps interleaved over the methods.
Memory is what autograd keeps for the backward pass besides the weights, and the optimizer's state with the gradients.
READ-PVLA aligns the encoder's first half of tokens ("video") with its second half.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import copy
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration

from peft_read import Aligner, PVLAConfig, READConfig, Stream
from peft_read.recurrence import show_backends, warm_up

QUICK = {"vocab_size": 500, "d_model": 64, "ffn_dim": 128, "layers": 2, "attention_heads": 4}
BASE = {"vocab_size": 50265, "d_model": 768, "ffn_dim": 3072, "layers": 6, "attention_heads": 12}
METHODS = ("frozen", "LoRA r=4", "Adapter k=4", "READ k=4", "READ-PVLA k=4", "full")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model")
    parser.add_argument("--repeats", type=int, default=3, help="steps of every method")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=None, help="tokens of source and target (512; quick: 32)")
    parser.add_argument("--output", type=Path, default=None, help="write OUTPUT.json and OUTPUT.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    warm_up()
    length = arguments.length or (32 if arguments.quick else 512)
    settings = QUICK if arguments.quick else BASE
    base = BartForConditionalGeneration(configuration(settings, length))
    ids = torch.randint(4, settings["vocab_size"], (arguments.batch, length))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.flip(0)}
    results = measure({name: build(name, copy.deepcopy(base), length) for name in METHODS}, batch, arguments.repeats)
    report = markdown(results, f"BART, d={settings['d_model']}, B={arguments.batch}, T={length}")
    print(report)
    if arguments.output is not None:
        arguments.output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        arguments.output.with_suffix(".md").write_text(report + "\n")


def configuration(settings: dict[str, int], length: int) -> BartConfig:
    """Encoder and decoder of the same size."""
    sizes = {key: settings[key] for key in ("vocab_size", "d_model")}
    for key in ("ffn_dim", "layers", "attention_heads"):
        sizes |= {f"{stack}_{key}": settings[key] for stack in ("encoder", "decoder")}
    return BartConfig(**sizes, max_position_embeddings=max(length, 64), dropout=0.0)


def build(name: str, base: nn.Module, length: int) -> tuple[nn.Module, Aligner | None]:
    """The model of one method, and what aligns it."""
    if name == "full":
        return base.train(), None
    if name == "frozen":
        base.requires_grad_(False)
        for stack in (base.model.encoder, base.model.decoder):
            stack.embed_tokens.register_forward_hook(lambda module, args, output: output.detach().requires_grad_())
        return base.train(), None
    if name.startswith("LoRA"):
        return get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).train(), None
    cell = "none" if name.startswith("Adapter") else "rnn"
    model = get_peft_model(base, READConfig(r=4, cell=cell, target_modules=["fc2"])).train()
    if "PVLA" not in name:
        return model, None
    blocks = r"model\.encoder\.layers\.\d+"
    video, language = (Stream(blocks, tokens=half) for half in (slice(0, length // 2), slice(length // 2, None)))
    return model, Aligner(model, PVLAConfig(video=video, language=language))


def measure(
    models: dict[str, tuple[nn.Module, Aligner | None]], batch: dict[str, Tensor], repeats: int
) -> dict[str, dict[str, float]]:
    """Seconds of a step, MiB kept for the backward pass, MiB of gradients and optimizer, trained parameters."""
    results: dict[str, dict[str, float]] = {}
    steps: dict[str, Callable[[], object]] = {}
    for name, (model, aligner) in models.items():
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, int] = {}

        def note(tensor: Tensor, weights: set[int] = weights, kept: dict[int, int] = kept) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = loss_of(model, aligner, batch)
        del loss
        count = sum(p.numel() for p in trained)
        mebibyte = 2**20
        results[name] = {
            "kept MiB": sum(kept.values()) / mebibyte,
            "state MiB": 12 * count / mebibyte,
            "trained": count,
        }
        steps[name] = lambda model=model, aligner=aligner, optimizer=optimizer: step(model, aligner, optimizer, batch)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, run in steps.items():
            start = time.process_time()
            run()
            if repeat:
                seconds[name].append(time.process_time() - start)
    for name, values in seconds.items():
        results[name]["seconds"] = statistics.median(values)
    return results


def loss_of(model: nn.Module, aligner: Aligner | None, batch: dict[str, Tensor]) -> Tensor:
    if aligner is None:
        return model(**batch).loss
    with aligner.record() as recording:
        outputs = model(**batch)
    return outputs.loss + aligner.loss(recording, batch, outputs)


def step(
    model: nn.Module, aligner: Aligner | None, optimizer: torch.optim.Optimizer | None, batch: dict[str, Tensor]
) -> None:
    loss_of(model, aligner, batch).backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()


def markdown(results: dict[str, dict[str, float]], title: str) -> str:
    lora = results["LoRA r=4"]["seconds"]
    lines = [
        f"{title}; one thread, float32, torch {torch.__version__}.", "", *show_backends().splitlines(), "",
        "| method | s a step | : LoRA r=4 | kept for backward, MiB | gradients and optimizer, MiB | trained |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, row in results.items():
        lines.append(
            f"| {name} | {row['seconds']:.3g} | {row['seconds'] / lora:.3f} | {row['kept MiB']:.0f} "
            f"| {row['state MiB']:.3g} | {row['trained']:,.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
