"""What `--fast_dropout` saves on the CPU: dropout alone, attention with dropout, and Moment-DETR's training step.

    python examples/benchmarks/dropout.py                # a minute; prints Markdown
    python examples/benchmarks/dropout.py --output outputs/dropout      # and .json, .md

One thread, float32, dropout of 0.1, forward and backward; in the step all parameters are trained. Times are processor
times, medians of repetitions in turns.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from benchmark_report import build_parser, processor, write_report
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "reproduction"))
from fast_dropout import FastDropout

from peft_read.models import MomentDetrConfig, MomentDetrForTemporalGrounding


def main(argv: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Milliseconds of every case with torch's dropout and with the cheaper one."""
    parser = build_parser(
        __doc__, quick="small shapes", repeats="repetitions of every case", default_repeats=9, picture=False
    )
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    batch, clips, words = (2, 5, 4) if arguments.quick else (32, 75, 20)
    length = clips + words
    cases = {
        f"dropout, {batch}x{length}x1024": dropout(batch, length, 1024),
        f"attention, {batch}x8x{length}x16": attention(batch, 8, length, 16),
        f"Moment-DETR, d=128, {batch} videos of {clips} clips": step(batch, clips, words),
    }
    times = {name: measured(case, arguments.repeats) for name, case in cases.items()}
    rows = [f"| {name} | {a:.1f} | {b:.1f} | {a / b:.2f}x |" for name, (a, b) in times.items()]
    head = ["| milliseconds | torch's | `--fast_dropout` | ratio |", "|---|---|---|---|"]
    report = "\n".join([*head, *rows, "", f"torch {torch.__version__}, {processor()}"])
    print(report)
    write_report(arguments.output, report, times)
    return times


def dropout(*shape: int) -> Callable[[], None]:
    """Forward and backward of dropout."""
    x = torch.randn(*shape, requires_grad=True)
    return with_gradient(lambda: F.dropout(x, 0.1), x)


def attention(*shape: int) -> Callable[[], None]:
    """Forward and backward of attention with a mask and dropout."""
    x = torch.randn(*shape, requires_grad=True)
    mask = torch.ones(shape[0], 1, 1, shape[2], dtype=torch.bool)
    return with_gradient(lambda: F.scaled_dot_product_attention(x, x, x, attn_mask=mask, dropout_p=0.1), x)


def with_gradient(function: Callable[[], Tensor], x: Tensor) -> Callable[[], None]:
    """The function and its backward pass."""

    def run() -> None:
        x.grad = None  # adding it up would be timed
        function().backward(x.detach())

    return run


def step(batch: int, clips: int, words: int) -> Callable[[], None]:
    """Forward and backward of the backbone that the study of methods adapts."""
    config = MomentDetrConfig(d_model=128, ffn_dim=1024, num_attention_heads=8, encoder_layers=2, decoder_layers=2)
    model = MomentDetrForTemporalGrounding(config).train()
    inputs = {
        "video_features": torch.randn(batch, clips, config.video_feature_dim),
        "video_mask": torch.ones(batch, clips),
        "text_features": torch.randn(batch, words, config.text_feature_dim),
        "text_mask": torch.ones(batch, words),
        "span_labels": [torch.tensor([[0.4, 0.2]])] * batch,
        "saliency_pos_labels": torch.zeros(batch, 2, dtype=torch.long),
        "saliency_neg_labels": torch.ones(batch, 2, dtype=torch.long),
    }
    return lambda: model(**inputs).loss.backward()


def measured(case: Callable[[], None], repeats: int) -> list[float]:
    """Milliseconds of the case with torch's dropout and with the cheaper one."""
    times: list[list[float]] = [[], []]
    for _ in range(repeats + 1):
        for enabled in (False, True):
            with FastDropout(enabled):
                started = time.process_time()
                case()
                times[enabled].append(1e3 * (time.process_time() - started))
    return [statistics.median(values[1:]) for values in times]  # the first of each is a warm-up


if __name__ == "__main__":
    main()
