"""What a training step costs with READ, beside LoRA, the adapter without a recurrence, and full fine-tuning.

    python examples/benchmarks/training_step.py                    # BART of base size, some minutes; prints Markdown
    python examples/benchmarks/training_step.py --quick            # a small BART, seconds
    python examples/benchmarks/training_step.py --model t5 moment_detr
    python examples/benchmarks/training_step.py --output docs/training_step_benchmark    # and .json, .md, .png

Random weights, float32, one thread. A step is forward, backward and AdamW's step; "frozen" is a forward pass and the
backward pass to the input embeddings. Times are processor times, medians of steps interleaved over the methods.
Memory is what autograd keeps for the backward pass besides the weights, and the optimizer's state with the gradients.
READ-PVLA aligns the encoder's first half of tokens ("video") with its second half, in Moment-DETR clips with words.
LoRA adapts what peft adapts by default, queries and values of every attention; Moment-DETR, which peft does not know,
at the two linears of every feed-forward block, as examples/reproduction/ground_moments.py does.

With --output the results of other models that are in the files already stay there.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import copy
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmark_report import build_parser, write_report
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from peft_read import Aligner, PVLAConfig, READConfig, Stream, show_backends
from peft_read.models import MomentDetrConfig, MomentDetrForTemporalGrounding

QUICK = {"vocabulary": 500, "width": 64, "inner": 128, "layers": 2, "heads": 4}
SIZES = {
    "bart": {"vocabulary": 50265, "width": 768, "inner": 3072, "layers": 6, "heads": 12},
    "t5": {"vocabulary": 32128, "width": 768, "inner": 3072, "layers": 12, "heads": 12},
    "moment_detr": {"width": 256, "inner": 1024, "layers": 2, "heads": 8},  # as published
}
BATCHES = {"bart": 4, "t5": 4, "moment_detr": 32}
LENGTHS = {"bart": 512, "t5": 512, "moment_detr": 75}  # Moment-DETR: clips, beside 32 words
QUICK_LENGTHS = {"bart": 32, "t5": 32, "moment_detr": 12}
ENCODER_BLOCKS = {"bart": r"model\.encoder\.layers\.\d+", "t5": r"encoder\.block\.\d+"}
METHODS = ("frozen", "LoRA r=4", "Adapter k=4", "READ k=4", "READ-PVLA k=4", "full")
OURS, THEIRS = "READ-PVLA k=4", "LoRA r=4"
Results = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> dict[str, Results]:
    parser = build_parser(__doc__, quick="small models", repeats="steps of every method", default_repeats=3)
    parser.add_argument("--model", nargs="+", choices=SIZES, default=["bart"], help="one or several")
    parser.add_argument("--batch", type=int, default=None, help=f"sequences; default {BATCHES}")
    parser.add_argument("--length", type=int, default=None, help=f"tokens of source and target; default {LENGTHS}")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    everything: dict[str, Results] = {}
    if arguments.output is not None and arguments.output.with_suffix(".json").exists():
        everything = json.loads(arguments.output.with_suffix(".json").read_text())
    for kind in arguments.model:
        length = arguments.length or (QUICK_LENGTHS if arguments.quick else LENGTHS)[kind]
        batch_size = arguments.batch or BATCHES[kind]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            sizes = QUICK if arguments.quick else SIZES[kind]
            models = build(kind, a_model(kind, sizes, length), length)
            methods = measure(models, a_batch(kind, sizes, batch_size, length), arguments.repeats)
        everything[kind] = {
            "title": f"{kind}, d={sizes['width']}, B={batch_size}, T={length}",
            "setting": f"one thread, float32, torch {torch.__version__}; medians of {arguments.repeats} steps",
            "backends": show_backends().splitlines(),
            "methods": methods,
        }
        print(markdown(everything[kind]) + "\n", flush=True)
        report = "\n\n".join(markdown(results) for results in everything.values())
        write_report(arguments.output, report, everything, lambda path: draw(everything, path))
    return everything


def a_model(kind: str, sizes: dict[str, int], length: int) -> nn.Module:
    """A random model without dropout; encoder and decoder are of the same size."""
    if kind == "bart":
        each = {"layers": sizes["layers"], "ffn_dim": sizes["inner"], "attention_heads": sizes["heads"]}
        stacks = {f"{stack}_{key}": value for stack in ("encoder", "decoder") for key, value in each.items()}
        return BartForConditionalGeneration(
            BartConfig(
                vocab_size=sizes["vocabulary"], d_model=sizes["width"], max_position_embeddings=max(length, 64),
                dropout=0.0, **stacks,
            )
        )  # fmt: skip
    if kind == "t5":
        return T5ForConditionalGeneration(
            T5Config(
                vocab_size=sizes["vocabulary"], d_model=sizes["width"], d_kv=sizes["width"] // sizes["heads"],
                d_ff=sizes["inner"], num_layers=sizes["layers"], num_heads=sizes["heads"], dropout_rate=0.0,
                decoder_start_token_id=0,
            )
        )  # fmt: skip
    return MomentDetrForTemporalGrounding(
        MomentDetrConfig(
            d_model=sizes["width"], ffn_dim=sizes["inner"], num_attention_heads=sizes["heads"],
            encoder_layers=sizes["layers"], decoder_layers=sizes["layers"], dropout=0.0, input_dropout=0.0,
        )
    )  # fmt: skip


def a_batch(kind: str, sizes: dict[str, int], count: int, length: int) -> dict[str, Any]:
    """Random inputs and labels, every token real."""
    if kind == "moment_detr":
        config = MomentDetrConfig()
        return {
            "video_features": torch.randn(count, length, config.video_feature_dim),
            "video_mask": torch.ones(count, length),
            "text_features": torch.randn(count, 32, config.text_feature_dim),
            "text_mask": torch.ones(count, 32),
            "span_labels": [torch.tensor([[0.4, 0.2]])] * count,
            "saliency_pos_labels": torch.randint(length, (count, 2)),
            "saliency_neg_labels": torch.randint(length, (count, 2)),
        }
    ids = torch.randint(4, sizes["vocabulary"], (count, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.flip(0)}


def build(kind: str, base: nn.Module, length: int) -> dict[str, tuple[nn.Module, Aligner | None]]:
    """The model of every method, and what aligns it; the frozen weights are there once for all."""
    full = copy.deepcopy(base).train()
    base.requires_grad_(False)
    shared = {id(parameter): parameter for parameter in base.parameters()}
    return {
        name: (full, None) if name == "full" else adapt(kind, name, copy.deepcopy(base, dict(shared)), length)
        for name in METHODS
    }


def adapt(kind: str, name: str, base: nn.Module, length: int) -> tuple[nn.Module, Aligner | None]:
    """The model of one method that trains less than everything."""
    if name == "frozen":
        for module in embeddings(kind, base):
            module.register_forward_hook(lambda module, args, output: output.detach().requires_grad_())
        return base.train(), None
    if name.startswith("LoRA"):
        targets = r"transformer\..*\.linear[12]" if kind == "moment_detr" else None  # None: peft's default
        return get_peft_model(base, LoraConfig(r=4, target_modules=targets)).train(), None
    cell = "none" if name.startswith("Adapter") else "rnn"
    model = get_peft_model(base, READConfig(r=4, cell=cell)).train()
    if name != OURS:
        return model, None
    if kind == "moment_detr":
        return model, Aligner(model, PVLAConfig())
    halves = slice(0, length // 2), slice(length // 2, None)
    video, language = (Stream(ENCODER_BLOCKS[kind], tokens=half) for half in halves)
    return model, Aligner(model, PVLAConfig(video=video, language=language))


def embeddings(kind: str, base: Any) -> Iterable[nn.Module]:
    """The modules behind which the backward pass of the frozen model ends."""
    if kind == "moment_detr":
        return base.input_vid_proj, base.input_txt_proj
    stacks = (base.model.encoder, base.model.decoder) if kind == "bart" else (base.encoder, base.decoder)
    return {id(stack.embed_tokens): stack.embed_tokens for stack in stacks}.values()


def measure(models: dict[str, tuple[nn.Module, Aligner | None]], batch: dict[str, Any], repeats: int) -> Results:
    """Seconds of a step, MiB kept for the backward pass, MiB of gradients and optimizer, trained parameters."""
    results: Results = {}
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
        loss.backward()  # or the tensors that were noted would stay
        model.zero_grad()
        count = sum(p.numel() for p in trained)
        mebibyte = 2**20
        results[name] = {
            "kept MiB": sum(kept.values()) / mebibyte,
            "state MiB": 12 * count / mebibyte,
            "trained": count,
        }
        steps[name] = lambda model=model, aligner=aligner, optimizer=optimizer: step(model, aligner, optimizer, batch)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats):
        for name in list(steps)[:: -1 if repeat % 2 else 1]:  # to and fro, so that a drift hits all alike
            start = time.process_time()
            steps[name]()
            seconds[name].append(time.process_time() - start)
    for name, values in seconds.items():
        results[name]["seconds"] = statistics.median(values)
        results[name]["all seconds"] = values
    return results


def loss_of(model: nn.Module, aligner: Aligner | None, batch: dict[str, Any]) -> Tensor:
    if aligner is None:
        return model(**batch).loss
    with aligner.record() as recording:
        outputs = model(**batch)
    return outputs.loss + aligner.loss(recording, batch, outputs)


def step(
    model: nn.Module, aligner: Aligner | None, optimizer: torch.optim.Optimizer | None, batch: dict[str, Any]
) -> None:
    loss_of(model, aligner, batch).backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()


def markdown(results: Results) -> str:
    """The results of one model as a table, and READ-PVLA : LoRA."""
    methods = results["methods"]
    theirs = methods[THEIRS]["seconds"]
    lines = [
        f"**{results['title']}**", "", f"{results['setting']}.", "", *(f"* {line}" for line in results["backends"]),
        "",
        f"| method | s per step | : {THEIRS} | kept for backward, MiB | gradients and optimizer, MiB | trained |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, row in methods.items():
        lines.append(
            f"| {name} | {row['seconds']:.3g} | {row['seconds'] / theirs:.3f} | {row['kept MiB']:.0f} "
            f"| {row['state MiB']:.3g} | {row['trained']:,.0f} |"
        )
    pairs = zip(methods[OURS]["all seconds"], methods[THEIRS]["all seconds"], strict=True)
    ratios = sorted(ours / theirs for ours, theirs in pairs)
    return "\n".join(
        (
            *lines, "",
            f"{OURS} : {THEIRS} = {methods[OURS]['seconds'] / theirs:.3f}x in time "
            f"({ratios[0]:.3f} to {ratios[-1]:.3f} from round to round).",
        )
    )  # fmt: skip


def draw(everything: dict[str, Results], path: Path) -> None:
    """Time and memory of every method, one row per model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(everything), 2, figsize=(10, 2.6 * len(everything)), squeeze=False)
    for (time_axis, memory_axis), results in zip(axes, everything.values(), strict=True):
        methods = results["methods"]
        names = list(methods)[::-1]
        colours = ["tab:orange" if name.startswith("READ") else "tab:gray" for name in names]
        time_axis.barh(names, [methods[name]["seconds"] for name in names], color=colours)
        time_axis.set(title=results["title"], xlabel="processor time of a step, s")
        kept = [methods[name]["kept MiB"] for name in names]
        memory_axis.barh(names, kept, color=colours, label="kept for the backward pass")
        state = [methods[name]["state MiB"] for name in names]
        memory_axis.barh(names, state, left=kept, color="tab:blue", label="gradients and optimizer")
        memory_axis.set(xlabel="MiB besides the weights", yticklabels=[])
        memory_axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
