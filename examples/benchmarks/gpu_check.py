"""Whether the kernels are right and fast on this GPU: one command, exit 1 where something is missed.

    python examples/benchmarks/gpu_check.py --output outputs/gpu_check      # writes .json and .md
    python examples/benchmarks/gpu_check.py --smoke         # on the CPU, small: whether the script itself runs

Runs the scans and the transport against float64 and adapters against torch's cells, counts the transport problems that
the kernel solves by itself, times an adapter beside cuDNN, the adapter without a recurrence and LoRA, and a training
step of BART-base in bfloat16 beside LoRA's, in eager mode and compiled; counts how often a step waits for the device;
compares gradients under DDP, checkpointing, fp16 with a GradScaler and CUDA graphs with plain ones; trains with the
mixin, also on NaN; and generates with a static cache. "device" is the time of a CUDA graph's replay, without the host;
"wall" that of the call; steps that are compared take turns. A line of the report with a limit is a check; the others
only inform. What is not timed runs in several processes at once, which mostly compile; what is timed runs alone.
"""

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from benchmark_report import write_report
from free_layer import FreeModel
from peft import LoraConfig, get_peft_model
from topics import tokens_about_topics
from torch import Tensor, distributed, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    Trainer,
    TrainingArguments,
)

from peft_read import (
    PVLAConfig,
    PVLALoss,
    PVLALossMixin,
    READConfig,
    Stream,
    backends,
    sequence_scope,
    show_backends,
    use_backend,
)
from peft_read.adapter.untrained import PATIENCE
from peft_read.recurrence import build_cell
from peft_read.recurrence.naive import naive_recurrence
from peft_read.transport import cosine_cost, partial_optimal_transport

DEVICE = "cuda"  # --smoke makes it the CPU
SMALL_BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 99,
}  # fmt: skip
BART_BASE = {
    "d_model": 768, "encoder_layers": 6, "decoder_layers": 6, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072,
    "encoder_attention_heads": 12, "decoder_attention_heads": 12,
}  # fmt: skip
COMPILED = "BART of 1 + 1 layers"
WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero")


@dataclass
class Check:
    """One line of the report; `limit` is the largest value that passes, None where the value only informs."""

    name: str
    value: float
    limit: float | None = None

    @property
    def passed(self) -> bool:
        return self.limit is None or self.value <= self.limit  # false of a NaN


class Waits(TorchDispatchMode):
    """Counts operations that wait for the device."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
        self.count += function.name().split("::")[1].split(".")[0] in WAITING
        return function(*arguments, **(options or {}))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=None, help="write OUTPUT.json and OUTPUT.md")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--parts", nargs="+", choices=[part.__name__ for part in PARTS], help="only these")
    parser.add_argument("--smoke", action="store_true", help="small sizes on the CPU; times and waits only inform")
    arguments = parser.parse_args(argv)
    global DEVICE
    DEVICE = "cpu" if arguments.smoke else "cuda"
    if DEVICE == "cuda" and not torch.cuda.is_available():
        print("gpu_check needs a CUDA device, and torch sees none; --smoke runs the script on the CPU.")
        return 2
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False  # torch's own cells round to TF32 by default, which is not their error
    if arguments.parts is not None:
        checks = run([part for part in PARTS if part.__name__ in arguments.parts], arguments.repeats)
    elif arguments.smoke:
        checks = run(PARTS, arguments.repeats)
    else:
        with others(*TOGETHER[1:]) as found:
            checks = run(TOGETHER[0], arguments.repeats)
        checks += found + run(ALONE, arguments.repeats)
    if arguments.smoke:  # limits of time and of waiting are those of a GPU
        checks = [replace(c, limit=None) if re.search(r"time against|wall|^waits for", c.name) else c for c in checks]
    report = markdown(checks)
    print(report)
    content = [asdict(check) | {"passed": check.passed} for check in checks]
    write_report(arguments.output, report, content)
    return 0 if all(check.passed for check in checks) else 1


def run(parts: Sequence[Callable[[int], Iterator[Check]]], repeats: int) -> list[Check]:
    """What some parts find, one after the other; an error ends its part alone."""
    checks: list[Check] = []
    for part in parts:
        start = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                for check in part(repeats):
                    checks.append(check)
                    print(line(check), file=sys.stderr, flush=True)
            except Exception:
                traceback.print_exc()
                checks.append(Check(f"{part.__name__}: ended by an error", 1, 0))
        print(f"{part.__name__}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        fell = [str(one.message) for one in caught if "does not work here" in str(one.message)]
        checks.append(Check(f"{part.__name__}: fast paths that failed their trial", len(fell), 0))
        for message in fell:
            print(message)
    return checks


@contextmanager
def others(*groups: Sequence[Callable[[int], Iterator[Check]]]) -> Iterator[list[Check]]:
    """Groups of parts in a process each, beside what runs inside; what they have found is in the list afterwards."""
    found: list[Check] = []
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for number, parts in enumerate(groups):
            names = [part.__name__ for part in parts]
            output = Path(folder) / str(number)
            command = [sys.executable, __file__, "--repeats", "1", "--output", str(output), "--parts", *names]
            processes.append((names, output, subprocess.Popen(command, stdout=subprocess.DEVNULL)))
        yield found
        for names, output, process in processes:
            process.wait()
            report = output.with_suffix(".json")
            if not report.exists():
                found.append(Check(f"{', '.join(names)}: ended without a report", 1, 0))
                continue
            for content in json.loads(report.read_text()):
                check = Check(content["name"], content["value"], content["limit"])
                if not check.name.startswith(COMPILED):  # only compiled here, for the run alone
                    found.append(check)


def scans(repeats: int) -> Iterator[Check]:
    """Values and gradients of every cell over widths, lengths and masks."""
    for kind in ("rnn", "gru", "lstm"):
        worst = 0.0
        for k in (1, 4, 17) if DEVICE == "cpu" else (1, 2, 3, 4, 5, 8, 16, 17, 32, 33, 64):
            for length, masked, continued in (
                (1, False, False),
                (37, True, False),
                (64, True, True),
                (130, False, True),
            ):
                worst = max(worst, scan_error(kind, k, length, masked, continued))
        yield Check(f"{kind}: largest relative error against float64, k = 1 to 64", worst, 1e-4)


def scan_times(repeats: int) -> Iterator[Check]:
    """The scan of the RNN beside cuDNN's."""
    for batch, length, k in sized(((4, 512, 4), (32, 512, 4), (128, 512, 4), (32, 512, 16)), ((2, 16, 4),)):
        cell, x = build_cell("rnn", k).to(DEVICE), torch.randn(batch, length, k, device=DEVICE)
        theirs = nn.RNN(k, k, batch_first=True).to(DEVICE)
        with torch.no_grad():
            ours_ms, theirs_ms = on_device(lambda c=cell, x=x: c(x)), on_device(lambda c=theirs, x=x: c(x))
        row = f"rnn {batch}x{length}x{k} forward, device"
        yield Check(f"{row}: ms", ours_ms)
        yield Check(f"{row}: time against cuDNN", ours_ms / theirs_ms, 0.5)


def scan_error(kind: str, k: int, length: int, masked: bool, continued: bool) -> float:
    cell = build_cell(kind, k).to(DEVICE)
    x = torch.randn(5, length, k, device=DEVICE, requires_grad=True)
    mask = torch.rand(5, length, device=DEVICE) > 0.3 if masked else None
    state = torch.randn(5, cell.state_size, device=DEVICE).tanh().requires_grad_() if continued else None
    begun = [] if state is None else [state]
    outputs, _ = cell(x, state, mask)
    probe = torch.randn_like(outputs)
    found = [outputs, *torch.autograd.grad((outputs * probe).sum(), [x, *begun, *cell.parameters()])]
    weights = {name: p.detach().double().cpu().requires_grad_() for name, p in cell.named_parameters()}
    y = x.detach().double().cpu().requires_grad_()
    begun = [one.detach().double().cpu().requires_grad_() for one in begun]
    known_outputs, _ = naive_recurrence(
        kind, y, weights, begun[0] if begun else None, None if mask is None else mask.cpu()
    )
    total = (known_outputs * probe.double().cpu()).sum()
    known = [known_outputs, *torch.autograd.grad(total, [y, *begun, *weights.values()])]
    return max(relative(one, other) for one, other in zip(found, known, strict=True))


def adapters(repeats: int) -> Iterator[Check]:
    """Whole adapters against torch's own cells, in values and gradients."""
    for dtype, limit in ((torch.float32, 1e-3), (torch.float16, 2e-2), (torch.bfloat16, 5e-2)):
        if dtype == torch.bfloat16 and not has_bfloat16():
            continue
        worst = 0.0
        for k in (1, 3, 4, 8, 16, 17):
            model, x = free_model(96, k), torch.randn(3, 70, 96, device=DEVICE, dtype=dtype, requires_grad=True)
            leaves = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
            for mask in (torch.ones(3, 70, device=DEVICE), torch.rand(3, 70, device=DEVICE) > 0.3):
                both = []
                for name in ("auto", "torch"):
                    with use_backend(name), sequence_scope(mask=mask):
                        out = model(x)
                    both.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
                worst = max(worst, difference(*both))
        yield Check(f"adapter, {dtype}: largest relative error against torch's cells", worst, limit)


def adapter_times(repeats: int) -> Iterator[Check]:
    """Whole adapters beside the adapter without a recurrence and LoRA."""
    rows = (
        ((8, 2048, 2048, 8), torch.float32, 1.0),
        ((32, 512, 768, 4), torch.float32, 1.2),
        ((8, 2048, 2048, 8), torch.bfloat16, None),
        ((32, 512, 768, 4), torch.bfloat16, None),
    )
    for (batch, length, width, k), dtype, limit in sized(rows, (((2, 16, 32, 4), torch.float32, 1.2),)):
        if dtype == torch.bfloat16 and not has_bfloat16():
            continue
        x = torch.randn(batch, length, width, device=DEVICE, dtype=dtype)
        models = {
            "READ": READConfig(r=k, target_modules=["fc2"], init_weights=False),
            "Adapter": READConfig(r=k, cell="none", target_modules=["fc2"], init_weights=False),
            "LoRA r=4": LoraConfig(r=4, target_modules=["fc2"]),
        }
        row = f"adapter {batch}x{length}x{width} k={k} {str(dtype)[6:]}, forward and backward"
        times = {}
        for name, config in models.items():
            model, leaf = get_peft_model(FreeModel(width), config).to(DEVICE), x.clone().requires_grad_()
            parameters = [leaf, *(p for p in model.parameters() if p.requires_grad)]

            def step(model: nn.Module = model, leaf: Tensor = leaf, wanted: list[Tensor] = parameters) -> None:
                torch.autograd.grad(model(leaf).sum(), wanted, allow_unused=True)

            times[name] = on_device(step)
            yield Check(f"{row}: {name}, device ms", times[name])
            yield Check(f"{row}: {name}, wall ms", wall(step, repeats))
        yield Check(f"{row}: device time against Adapter", times["READ"] / times["Adapter"], limit)


def transport(repeats: int) -> Iterator[Check]:
    """Problems solved by the kernel itself, and their errors."""
    # 0.002 is 500 times less than the costs range over, harder than what training asks for: it only informs.
    for reg, limit in ((0.05, 0.0), (0.02, 0.0), (0.002, None)):
        unsolved, worst, count, sweeps = 0, 0.0, 0, 0
        generator = torch.Generator().manual_seed(0)
        for batch, n, m in sized(((32, 75, 32), (96, 256, 256), (8, 300, 77)), ((4, 20, 12),)):
            for noise in (1.0, 0.2):
                cost = cosine_cost(*tokens_about_topics(batch, n, m, noise, generator))
                for mass in (0.5, 0.9, 1.0) if reg == 0.05 else (0.5,):
                    found = partial_optimal_transport(cost.to(DEVICE), mass=mass, reg=reg)
                    exact = partial_optimal_transport(
                        cost.to(DEVICE).double(), mass=mass, reg=reg, method="newton", tol=1e-8
                    )
                    solved = found.converged & exact.converged
                    unsolved += int((~found.converged).sum())
                    errors = (found.cost - exact.cost).abs() / exact.cost.abs().clamp_min(1e-2)
                    worst = max(worst, float(torch.where(solved, errors, 0).max()))
                    count, sweeps = count + batch, max(sweeps, int(found.n_iter.max()))
        row = f"transport, reg={reg}"
        yield Check(f"{row}: share of {count} problems that the kernel did not solve", unsolved / count, limit)
        yield Check(f"{row}: largest relative error of the cost of the others", worst, 1e-4)
        yield Check(f"{row}: most sweeps", sweeps)


def transport_times(repeats: int) -> Iterator[Check]:
    """The time of a call."""
    problems = sized(192, 4)
    cost = cosine_cost(torch.randn(problems, 75, 256), torch.randn(problems, 32, 256)).to(DEVICE).requires_grad_()
    call = lambda: torch.autograd.grad(partial_optimal_transport(cost).cost.sum(), cost)  # noqa: E731
    row = f"transport: {problems} problems of 75x32, value and gradient"
    yield Check(f"{row}, wall ms", wall(call, repeats), 1.0)
    yield Check(f"{row}, device ms", on_device(call))
    with use_backend("torch"):
        yield Check(f"{row}, by Newton in torch, wall ms", wall(call, 3))


def training_steps(repeats: int) -> Iterator[Check]:
    """A training step of BART-base: READ beside the same without a recurrence, READ-PVLA beside LoRA."""
    pairs = (("READ + PVLA", "LoRA r=4", 1.05), ("READ", "Adapter", 1.05))
    yield from compared_steps("BART-base, a step", pairs, repeats, compiled=False)


def compiled_steps(repeats: int) -> Iterator[Check]:
    """The same compiled to CUDA graphs, with one layer each in the encoder and the decoder."""
    yield from compared_steps(f"{COMPILED}, a compiled step", (("READ", "LoRA r=4", 1.05),), repeats, compiled=True)


def compared_steps(
    title: str, pairs: Sequence[tuple[str, str, float | None]], repeats: int, compiled: bool
) -> Iterator[Check]:
    """Steps that take turns: what else the machine does is as much in one as in the other."""
    names = dict.fromkeys(name for *pair, _ in pairs for name in pair)
    steps = {name: bart_step(name, compiled) for name in names}
    times = {name: wall(step, 0) for name, step in steps.items()}  # warm
    rounds = [{name: wall(step, 1, warm=0) for name, step in steps.items()} for _ in range(sized(repeats, 2))]
    for name in names:
        times[name] = statistics.median(one[name] for one in rounds)
        yield Check(f"{title}: {name}, wall ms", times[name])
    for ours, theirs, limit in pairs:
        ratio = statistics.median(one[ours] / one[theirs] for one in rounds)
        yield Check(f"{title}: {ours}, time against {theirs}", ratio, limit)


def bart_step(name: str, compiled: bool) -> Callable[[], None]:
    """A training step under autocast, 16 sequences of 512 tokens, 256 of them video for PVLA."""
    layers = {"encoder_layers": 1, "decoder_layers": 1} if compiled else {}
    config = BartConfig(**sized(BART_BASE | layers, SMALL_BART), dropout=0.0)
    batch, length = sized((16, 512), (2, 16))
    ids = torch.randint(3, 99, (batch, length), device=DEVICE)
    video, text = slice(0, length // 2), slice(length // 2, length)
    configs = {
        "LoRA r=4": LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        "Adapter": READConfig(r=4, cell="none"),
        "READ": READConfig(r=4),
    }
    model = get_peft_model(BartForConditionalGeneration(config), configs[name.removesuffix(" + PVLA")]).to(DEVICE)
    called = torch.compile(model, mode=sized("reduce-overhead", "default")) if compiled else model
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    loss = PVLALoss() if name.endswith("PVLA") else None

    def step() -> None:
        with torch.autocast(DEVICE, dtype=torch.bfloat16 if has_bfloat16() else torch.float16):
            out = called(input_ids=ids, labels=ids, output_hidden_states=loss is not None)
        total = out.loss
        if loss is not None:  # all blocks in one call, as the mixin does it
            blocks = out.encoder_hidden_states[1:]
            states = [[states[:, part].float() for states in blocks] for part in (video, text)]
            total = total + loss(*states)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def data_parallel(repeats: int) -> Iterator[Check]:
    """One process of DDP: its gradients are those without."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"init_method": f"file://{folder}/store", "rank": 0, "world_size": 1}
        distributed.init_process_group("nccl" if DEVICE == "cuda" else "gloo", **options)
        try:
            model, x = free_model(64, 4), torch.randn(4, 30, 64, device=DEVICE)
            parallel = nn.parallel.DistributedDataParallel(model)
            both = [gradients(model, lambda called=called: called(x).square().sum()) for called in (model, parallel)]
        finally:
            distributed.destroy_process_group()
    yield Check("DDP: largest relative error of a gradient against none", difference(*both), 1e-5)


def ways_of_training(repeats: int) -> Iterator[Check]:
    """Gradients of a small BART under checkpointing, fp16 with a GradScaler, and CUDA graphs, against plain ones."""
    model = get_peft_model(small_bart(), READConfig(r=4, init_weights=False)).to(DEVICE)
    ids = torch.randint(3, 99, (4, 16), device=DEVICE)
    mask = torch.ones_like(ids)
    mask[0, 10:], mask[1, :3] = 0, 0
    loss = lambda called=model: called(input_ids=ids, attention_mask=mask, labels=ids).loss  # noqa: E731
    plain = gradients(model, loss)
    compiled = torch.compile(model, mode=sized("reduce-overhead", "default"))
    worst = 0.0
    for _ in range(4):  # a graph is recorded at the second or third call
        torch.compiler.cudagraph_mark_step_begin()
        worst = max(worst, difference(gradients(model, lambda: loss(compiled)), plain))
    yield Check("compiled to CUDA graphs: largest relative error of a gradient against eager", worst, 1e-3)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10)
    with torch.autocast(DEVICE, dtype=torch.float16):
        half = gradients(model, lambda: scaler.scale(loss()))
    yield Check(
        "fp16 with a GradScaler: largest relative error of a gradient against fp32",
        difference([gradient / 2.0**10 for gradient in half], plain), 5e-2,
    )  # fmt: skip
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        model.train()  # dropout is 0; checkpointing is on in training only
        yield Check(
            f"checkpointing, use_reentrant={reentrant}: largest relative error of a gradient against none",
            difference(gradients(model, loss), plain), 1e-5,
        )  # fmt: skip


class AlignedTrainer(PVLALossMixin, Trainer):
    """A trainer with the alignment loss."""


def mixin(repeats: int) -> Iterator[Check]:
    """Training with the mixin: the loss is that of the CPU, and a NaN among the states ends it at the next log."""
    layers = r"model\.encoder\.layers\.\d+"
    config = PVLAConfig(video=Stream(layers, tokens=slice(0, 9)), language=Stream(layers, tokens=slice(9, None)))
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 99, (16, 16))]

    def train(folder: str, on_cpu: bool, poisoned: bool) -> list[float]:
        torch.manual_seed(0)
        model = get_peft_model(small_bart(), READConfig(r=4))
        if poisoned:
            model.base_model.model.model.encoder.layers[1].final_layer_norm.bias.data[0] = torch.nan
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=4, max_steps=4, logging_steps=2, save_strategy="no",
            report_to="none", disable_tqdm=True, use_cpu=on_cpu, learning_rate=1e-3, logging_nan_inf_filter=False,
        )  # fmt: skip
        trainer = AlignedTrainer(model=model, args=arguments, train_dataset=rows, pvla_config=config)
        trainer.train()
        return [log["loss"] for log in trainer.state.log_history if "loss" in log]

    with tempfile.TemporaryDirectory() as folder:
        here = train(folder, DEVICE == "cpu", False)
        with use_backend("torch"):  # the definition
            known = train(folder, True, False)
        worst = max(abs(one - other) for one, other in zip(here, known, strict=True))
        yield Check("Trainer with the mixin: largest difference of a logged loss from that on the CPU", worst, 1e-3)
        try:
            train(folder, DEVICE == "cpu", True)
            message = ""
        except (FloatingPointError, ValueError) as error:  # at the next log on a device, at once on the CPU
            message = str(error)
        yield Check("Trainer with the mixin: NaN states that went on unnoticed", int("block" not in message), 0)


def waits(repeats: int) -> Iterator[Check]:
    """Waits for the device that a step of READ and PVLA causes, by torch's operations and by the CUDA runtime."""
    model = get_peft_model(FreeModel(64), READConfig(r=4, target_modules=["fc2"])).to(DEVICE)
    loss, mask = PVLALoss(), torch.rand(4, 30, device=DEVICE) > 0.2
    x, text = torch.randn(4, 30, 64, device=DEVICE), torch.randn(4, 12, 64, device=DEVICE, requires_grad=True)

    def step() -> None:
        loss(model(x), text, mask).backward()

    for _ in range(PATIENCE):  # in the first backward passes READ looks for parameters without a gradient
        step()
    with Waits() as counted:
        step()
    yield Check("waits for the device in one step of READ and PVLA, in torch's operations", counted.count, 0)
    if DEVICE == "cuda":
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                step()
                x.sum().item()  # one wait that has to be seen
            finally:
                torch.cuda.set_sync_debug_mode("default")
        count = sum("synchronizing CUDA operation" in str(one.message) for one in caught)
        yield Check("waits for the device in the same step, by torch's debug mode", count - 1 if count else 99, 0)


def generation(repeats: int) -> Iterator[Check]:
    """Generation with a static cache, whose steps transformers compiles on CUDA, against none."""
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    for cell in ("rnn", "gru", "lstm"):
        config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                             num_key_value_heads=4, vocab_size=101, max_position_embeddings=128)  # fmt: skip
        model = AutoModelForCausalLM.from_config(config)
        read = READConfig(r=4, cell=cell, init_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(model, read).to(DEVICE).eval()
        ids = torch.randint(3, 100, (2, 9), device=DEVICE)
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        with torch.no_grad():
            expected = model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **settings)
            found = model.generate(input_ids=ids, attention_mask=mask, cache_implementation="static", **settings)
        differing = int((expected != found).sum()) if expected.shape == found.shape else expected.numel()
        yield Check(f"generation, {cell}: tokens that differ between a static cache and none", differing, 0)
        counters = torch._dynamo.utils.counters
        yield Check(f"generation, {cell}: graphs that transformers compiled", counters["stats"]["unique_graphs"])
        for reason, count in counters["graph_break"].items():
            print("graph break:", count, reason)
        yield Check(f"generation, {cell}: graph breaks", sum(counters["graph_break"].values()), 0)


# What is not timed, at once in a process each; compiled steps are there only compiled, into the cache on the disk.
TOGETHER = (
    (scans, adapters, transport, waits), (generation, mixin, data_parallel), (ways_of_training, compiled_steps),
)  # fmt: skip
ALONE = (scan_times, adapter_times, transport_times, training_steps, compiled_steps)
PARTS = tuple(dict.fromkeys([part for parts in (*TOGETHER, ALONE) for part in parts]))


def small_bart() -> BartForConditionalGeneration:
    """A BART of a few thousand parameters, without dropout."""
    return BartForConditionalGeneration(BartConfig(**SMALL_BART, dropout=0.0))


def gradients(model: nn.Module, loss: Callable[[], Tensor]) -> list[Tensor]:
    """The gradients of the trainable parameters."""
    model.zero_grad(set_to_none=True)
    loss().backward()
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad(set_to_none=True)
    return found


def difference(found: list[Tensor], known: list[Tensor]) -> float:
    """The largest relative error of a list."""
    return max(relative(one, other) for one, other in zip(found, known, strict=True))


def relative(found: Tensor, known: Tensor) -> float:
    found, known = found.detach().double().cpu(), known.detach().double().cpu()
    return float((found - known).abs().max() / known.abs().max().clamp_min(1e-3))


def free_model(width: int, r: int) -> nn.Module:
    """READ around a layer that costs nothing, not the identity."""
    config = READConfig(r=r, target_modules=["fc2"], init_weights=False)
    return get_peft_model(FreeModel(width), config).to(DEVICE)


def sized(whole: Any, small: Any) -> Any:
    """A size of the check, or of the smoke test."""
    return small if DEVICE == "cpu" else whole


def has_bfloat16() -> bool:
    return DEVICE == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)


def on_device(function: Callable[[], object]) -> float:
    """Milliseconds of a replay of the function's CUDA graph; in the smoke test of a call."""
    if DEVICE == "cpu":
        return wall(function, 2)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return wall(graph.replay, 20)


def wall(function: Callable[[], object], repeats: int, warm: int = 3) -> float:
    """Median milliseconds of a call, the device's work included; 0 for none."""
    times = []
    wait = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
    for number in range(repeats + warm):
        wait()
        start = time.perf_counter()
        function()
        wait()
        if number >= warm:
            times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times) if times else 0.0


def markdown(checks: list[Check]) -> str:
    """The report."""
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "smoke test on the CPU"
    lines = [
        f"{device}, Python {platform.python_version()}, torch {torch.__version__}; fast path "
        f"there: {backends.backend(DEVICE)}.", "", *show_backends().splitlines(), "",
        "| check | value | limit | |", "|---|---|---|---|",
    ]  # fmt: skip
    for check in checks:
        lines.append(line(check))
    return "\n".join(lines)


def line(check: Check) -> str:
    """A line of the report."""
    limit = "" if check.limit is None else f"{check.limit:.3g}"
    verdict = "" if check.limit is None else "passed" if check.passed else "**missed**"
    return f"| {check.name} | {check.value:.4g} | {limit} | {verdict} |"


if __name__ == "__main__":
    sys.exit(main())
