"""What a training step costs with the bottleneck adapters, beside a plain hand-written adapter and LoRA.

    python examples/benchmarks/bottleneck_family.py              # BART of base size, some minutes; prints Markdown
    python examples/benchmarks/bottleneck_family.py --quick      # a small BART, seconds
    python examples/benchmarks/bottleneck_family.py --output docs/bottleneck_benchmark     # and .json, .md

Random weights, float32, one thread; a step is forward, backward and AdamW's step. Times are processor times, medians
of steps interleaved over the methods, as in training_step.py, whose model, batch and clock are used here. The plain
adapter is written as the paper prints it, at the same positions (after every attention and feed-forward block) and of
the same width d // 8; LoRA adapts queries and values at the rank that VL-Adapter's scripts give it.

The `adapters` library cannot stand beside them: its newest version needs transformers 4.57, this package 5.18.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import copy
import statistics
from collections.abc import Sequence

import torch
from benchmark_report import build_parser, write_report
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from training_step import LENGTHS, QUICK, QUICK_LENGTHS, SIZES, Results, a_batch, a_model, measure
from transformers.activations import NewGELUActivation

from peft_read import BottleneckConfig, CompacterConfig, HyperformerConfig, set_task

FACTOR = 8
SCRIPTS = {"phm_dim": 2, "shared_rule": None, "factorized_rank": None}  # the scripts of VL-Adapter
TASKS = ["vqa", "gqa", "nlvr", "caption"]
PLAIN, OURS, LORA = "plain adapter", "Bottleneck", "LoRA r=128"
CONFIGS = {
    OURS: lambda: BottleneckConfig(reduction_factor=FACTOR),
    "Bottleneck, multiple": lambda: BottleneckConfig(reduction_factor=FACTOR, tasks=TASKS),
    "Compacter, scripts": lambda: CompacterConfig(reduction_factor=FACTOR, **SCRIPTS),
    "Compacter, paper": lambda: CompacterConfig(reduction_factor=FACTOR),
    "Hyperformer": lambda: HyperformerConfig(reduction_factor=FACTOR, tasks=TASKS),
    "Hyperformer, shared": lambda: HyperformerConfig(reduction_factor=FACTOR, tasks=TASKS, shared_generator=True),
    LORA: lambda: LoraConfig(r=128, lora_alpha=32, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]),
}
LIMITS = {OURS: (PLAIN, 1.0), **{name: (OURS, 1.3) for name in CONFIGS if name.startswith(("Comp", "Hyper"))}}


class PlainAdapter(nn.Module):
    """y + Up(gelu(Down(y))) after a linear layer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Linear(linear.out_features, linear.out_features // FACTOR)
        self.activation = NewGELUActivation()
        self.up = nn.Linear(linear.out_features // FACTOR, linear.out_features)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y + self.up(self.activation(self.down(y)))


def plain(base: nn.Module) -> nn.Module:
    """The base model with plain adapters at Houlsby's positions."""
    for name, module in list(base.named_modules()):
        if name.endswith((".out_proj", ".fc2")):
            parent, _, last = name.rpartition(".")
            setattr(base.get_submodule(parent), last, PlainAdapter(module))
    return base


def build(base: nn.Module, methods: Sequence[str]) -> dict[str, tuple[nn.Module, None]]:
    """The model of every method; the frozen weights are there once for all."""
    base.requires_grad_(False)
    shared = {id(parameter): parameter for parameter in base.parameters()}
    models: dict[str, tuple[nn.Module, None]] = {}
    for name in methods:
        copied = copy.deepcopy(base, dict(shared))
        model = plain(copied) if name == PLAIN else get_peft_model(copied, CONFIGS[name]())
        set_task(model, TASKS[0])
        models[name] = model.train(), None
    return models


def markdown(title: str, methods: Results) -> str:
    """A table, and the ratios with their limits."""
    lines = [f"**{title}**", "", f"| method | s per step | : {PLAIN} | kept for backward, MiB | trained |",
             "|---|---|---|---|---|"]  # fmt: skip
    for name, row in methods.items():
        ratio = row["seconds"] / methods[PLAIN]["seconds"]
        lines.append(f"| {name} | {row['seconds']:.3g} | {ratio:.3f} | {row['kept MiB']:.0f} | {row['trained']:,} |")
    lines.append("")
    for name, (other, limit) in LIMITS.items():
        if name in methods and other in methods:
            pairs = zip(methods[name]["all seconds"], methods[other]["all seconds"], strict=True)
            ratios = [ours / theirs for ours, theirs in pairs]
            lines.append(
                f"* {name} : {other} = {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f} from "
                f"round to round), wanted: at most {limit}"
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> Results:
    parser = build_parser(
        __doc__, quick="a small model", repeats="steps of every method", default_repeats=5, picture=False
    )
    parser.add_argument("--batch", type=int, default=4, help="sequences")
    parser.add_argument("--length", type=int, default=None, help=f"tokens of source and target; {LENGTHS['bart']}")
    parser.add_argument("--methods", nargs="+", default=[PLAIN, *CONFIGS], choices=[PLAIN, *CONFIGS])
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = QUICK if arguments.quick else SIZES["bart"]
    length = arguments.length or (QUICK_LENGTHS if arguments.quick else LENGTHS)["bart"]
    models = build(a_model("bart", sizes, length), arguments.methods)
    methods = measure(models, a_batch("bart", sizes, arguments.batch, length), arguments.repeats)
    width, layers = sizes["width"], sizes["layers"]
    title = (
        f"BART, d = {width}, {layers} + {layers} layers, {arguments.batch} x {length} tokens, r = {width // FACTOR}, "
        f"{arguments.repeats} rounds, torch {torch.__version__}, one thread"
    )
    report = markdown(title, methods)
    print(report)
    write_report(arguments.output, report, {"title": title, "methods": methods})
    return methods


if __name__ == "__main__":
    main()
