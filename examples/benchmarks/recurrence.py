"""How fast READ is alone, beside torch's recurrences, the adapter without a recurrence and LoRA.

    python examples/benchmarks/recurrence.py                 # some minutes; prints Markdown
    python examples/benchmarks/recurrence.py --quick         # seconds, small shapes
    python examples/benchmarks/recurrence.py --output docs/recurrence_benchmark     # and .json, .md, .png

One thread of the CPU, float32. Times are processor times, medians of repetitions interleaved over the parties of one
row, so that a busy machine slows all of them alike. What is measured is a block of calls, as many for every party of
a row (forward passes and forward with backward are rows of their own) as take the fastest of them two milliseconds:
a single call of some microseconds after other functions have emptied the caches would measure their refilling. The
adapters are built by peft around a linear layer that costs nothing (it returns its input), with a gradient for the
input.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from benchmark_report import build_parser, draw_times, processor, write_report
from free_layer import FreeModel
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from peft_read import READConfig, show_backends, use_backend
from peft_read.recurrence import build_cell

SCANS = [(4, 512, 4), (32, 75, 4), (1, 2048, 4), (32, 512, 4), (4, 512, 16), (4, 512, 64)]
ADAPTERS = [(4, 512, 768, 4), (8, 75, 768, 4), (1, 2048, 768, 4), (4, 512, 768, 8), (4, 512, 768, 16)]
QUICK_SCANS, QUICK_ADAPTERS = [(4, 64, 4)], [(2, 64, 64, 4)]
SECONDS = 2e-3  # a block of calls takes at least this long
TORCH = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
Rows = dict[str, dict[str, float]]


def main(argv: list[str] | None = None) -> None:
    arguments = build_parser(
        __doc__, quick="small shapes, few repetitions", repeats="repetitions of every measurement"
    ).parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    repeats = arguments.repeats or (3 if arguments.quick else 15)
    scans: Rows = {}
    for kind in TORCH:
        for shape in QUICK_SCANS if arguments.quick else SCANS:
            scans[f"{kind} {'x'.join(map(str, shape))}"] = time_scan(kind, *shape, repeats)
    adapters: Rows = {}
    for shape in QUICK_ADAPTERS if arguments.quick else ADAPTERS:
        adapters["x".join(map(str, shape[:3])) + f" k={shape[3]}"] = time_adapters(*shape, repeats)
    content = {"recurrence": scans, "adapter": adapters}
    report = markdown(scans, adapters)
    print(report)
    write_report(arguments.output, report, content, lambda path: draw(path, adapters))


def time_scan(kind: str, batch: int, length: int, size: int, repeats: int) -> dict[str, float]:
    """The recurrence alone: ours and torch's module."""
    x, gradient = torch.randn(batch, length, size), torch.randn(batch, length, size)
    ours, theirs = build_cell(kind, size), TORCH[kind](size, size, batch_first=True)
    forward, both = {}, {}
    for name, module in (("READ", ours), ("torch", theirs)):
        forward[f"{name} forward"] = lambda module=module: module(x)
        both[f"{name} both"] = with_gradient(lambda leaf, module=module: module(leaf)[0], x, gradient)
    with torch.no_grad():
        times = interleaved(forward, repeats)
    return times | interleaved(both, repeats)


def time_adapters(batch: int, length: int, width: int, size: int, repeats: int) -> dict[str, float]:
    """Forward and backward of whole adapters."""
    x, gradient = torch.randn(batch, length, width), torch.randn(batch, length, width)
    timed = {}
    for cell in ("rnn", "gru", "lstm", "none"):
        model = get_peft_model(
            FreeModel(width), READConfig(r=size, cell=cell, target_modules=["fc2"], init_weights=False)
        )
        run = with_gradient(model, x, gradient)
        if cell == "none":
            timed["Adapter (no recurrence)"] = run
        else:
            timed[f"READ {cell}"] = in_backend("auto", run)
            timed[f"READ {cell}, torch"] = in_backend("torch", run)
    for rank in (4, 8, 16):
        model = get_peft_model(FreeModel(width), LoraConfig(r=rank, target_modules=["fc2"]))
        timed[f"LoRA r={rank}"] = with_gradient(model, x, gradient)
    return interleaved(timed, repeats)


def with_gradient(function: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> Callable[[], object]:
    leaf = x.clone().requires_grad_()

    def run() -> None:
        leaf.grad = None  # adding it up would be timed
        function(leaf).backward(gradient)

    return run


def in_backend(name: str, function: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        with use_backend(name):
            function()

    return run


def interleaved(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median milliseconds of a call of every function, in blocks of equally many calls, taken in turns."""
    calls = 1 + int(SECONDS / min(seconds_of(function, 1) for _ in range(3) for function in functions.values()))
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            seconds[name].append(seconds_of(function, calls))
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def seconds_of(function: Callable[[], object], calls: int) -> float:
    """Processor time of a call, the mean of several in a row."""
    start = time.process_time()
    for _ in range(calls):
        function()
    return (time.process_time() - start) / calls


def markdown(scans: Rows, adapters: Rows) -> str:
    """The report."""
    lines = [
        f"Python {platform.python_version()}, torch {torch.__version__}; one thread of {processor()}; float32; ms.",
        "", *show_backends().splitlines(), "",
        "**The recurrence alone (cell B x T x k)**", "",
        "| | READ forward | torch forward | ratio | READ both | torch both | ratio |", "|---" * 7 + "|",
    ]  # fmt: skip
    for row, times in scans.items():
        cells = []
        for part in ("forward", "both"):
            ours, theirs = times[f"READ {part}"], times[f"torch {part}"]
            cells += [f"{ours:.3g}", f"{theirs:.3g}", f"{theirs / ours:.3g}x"]
        lines.append("| " + " | ".join([row, *cells]) + " |")
    names = list(next(iter(adapters.values())))
    lines += ["", "**The whole adapter, forward and backward (B x T x d)**", ""]
    lines += ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [
        "| " + " | ".join([row, *(f"{times[name]:.3g}" for name in names)]) + " |" for row, times in adapters.items()
    ]
    lines += ["", "| | READ rnn, torch : READ rnn | READ rnn : Adapter | READ rnn : LoRA r=4 |", "|---|---|---|---|"]
    for row, times in adapters.items():
        ours = times["READ rnn"]
        lines.append(
            f"| {row} | {times['READ rnn, torch'] / ours:.3g}x | {ours / times['Adapter (no recurrence)']:.2g} "
            f"| {ours / times['LoRA r=4']:.2g} |"
        )
    return "\n".join(lines)


def draw(path: Path, adapters: Rows) -> None:
    """The adapters' times, the methods in the order of the first shape's."""
    first = next(iter(adapters.values()))
    xlabel = "milliseconds, forward and backward of one adapter, one thread"
    draw_times(path, adapters, sorted(first, key=first.__getitem__), xlabel=xlabel)


if __name__ == "__main__":
    main()
