"""Whether the kernels are right and fast on this GPU: one command, some minutes, exit 1 where something is missed.

    python examples/benchmarks/gpu_check.py --output outputs/gpu_check      # writes .json and .md
    python examples/benchmarks/gpu_check.py --smoke         # on the CPU, small: whether the script itself runs

Runs every kernel against float64, counts the transport problems that the kernel solves by itself, times an adapter
beside cuDNN, the adapter without a recurrence and LoRA, and a training step of BART-base in bfloat16 beside LoRA's, in
eager mode and compiled; counts how often a step waits for the device, wraps it in DDP, and generates with a static
cache. "device" is the time of a CUDA graph's replay, without the host; "wall" that of the call. Each line of the
report is a check with its limit; the ones that are only informative have none.
"""

import argparse
import platform
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
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
from transformers import AutoModelForCausalLM, BartConfig, BartForConditionalGeneration, LlamaConfig

from peft_read import PVLALoss, READConfig, backends, show_backends, use_backend
from peft_read.recurrence import build_cell
from peft_read.recurrence.naive import naive_recurrence
from peft_read.transport import cosine_cost, partial_optimal_transport

DEVICE = "cuda"  # --smoke makes it the CPU
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
    parser.add_argument("--smoke", action="store_true", help="small sizes on the CPU; times and waits only inform")
    arguments = parser.parse_args(argv)
    global DEVICE
    DEVICE = "cpu" if arguments.smoke else "cuda"
    if DEVICE == "cuda" and not torch.cuda.is_available():
        print("gpu_check needs a CUDA device, and torch sees none; --smoke runs the script on the CPU.")
        return 2
    torch.manual_seed(0)
    checks: list[Check] = []
    for part in (scans, adapters, transport, training_steps, waits, data_parallel, generation):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            checks += part(arguments.repeats)
        fell = [str(one.message) for one in caught if "does not work here" in str(one.message)]
        checks.append(Check(f"{part.__name__}: fast paths that failed their trial", len(fell), 0))
        for message in fell:
            print(message)
    if arguments.smoke:  # limits of time and of waiting are those of a GPU
        checks = [replace(c, limit=None) if re.search(r"time against|wall|^waits for", c.name) else c for c in checks]
    report = markdown(checks)
    print(report)
    content = [asdict(check) | {"passed": check.passed} for check in checks]
    write_report(arguments.output, report, content)
    return 0 if all(check.passed for check in checks) else 1


def scans(repeats: int) -> list[Check]:
    """Values and gradients of every cell over widths, lengths and masks; the RNN beside cuDNN."""
    checks = []
    for kind in ("rnn", "gru", "lstm"):
        worst = 0.0
        for k in (1, 4, 17) if DEVICE == "cpu" else (1, 2, 3, 4, 5, 8, 16, 17, 31, 32, 33, 64):
            for length, masked in ((1, False), (37, True), (130, False)):
                worst = max(worst, scan_error(kind, k, length, masked))
        checks.append(Check(f"{kind}: largest relative error against float64, k = 1 to 64", worst, 1e-4))
    for batch, length, k in sized(((4, 512, 4), (32, 512, 4), (128, 512, 4), (32, 512, 16)), ((2, 16, 4),)):
        cell, x = build_cell("rnn", k).to(DEVICE), torch.randn(batch, length, k, device=DEVICE)
        theirs = nn.RNN(k, k, batch_first=True).to(DEVICE)
        with torch.no_grad():
            ours_ms, theirs_ms = on_device(lambda c=cell, x=x: c(x)), on_device(lambda c=theirs, x=x: c(x))
        row = f"rnn {batch}x{length}x{k} forward, device"
        checks += [Check(f"{row}: ms", ours_ms), Check(f"{row}: time against cuDNN", ours_ms / theirs_ms, 0.5)]
    return checks


def scan_error(kind: str, k: int, length: int, masked: bool) -> float:
    cell = build_cell(kind, k).to(DEVICE)
    x = torch.randn(5, length, k, device=DEVICE, requires_grad=True)
    mask = torch.rand(5, length, device=DEVICE) > 0.3 if masked else None
    outputs, _ = cell(x, None, mask)
    probe = torch.randn_like(outputs)
    found = [outputs, *torch.autograd.grad((outputs * probe).sum(), [x, *cell.parameters()])]
    weights = {name: p.detach().double().cpu().requires_grad_() for name, p in cell.named_parameters()}
    y = x.detach().double().cpu().requires_grad_()
    known_outputs, _ = naive_recurrence(kind, y, weights, None, None if mask is None else mask.cpu())
    total = (known_outputs * probe.double().cpu()).sum()
    known = [known_outputs, *torch.autograd.grad(total, [y, *weights.values()])]
    return max(relative(one, other) for one, other in zip(found, known, strict=True))


def adapters(repeats: int) -> list[Check]:
    """Whole adapters: against torch's own cells in values and gradients, and in time beside the others."""
    checks = []
    for dtype, limit in ((torch.float32, 1e-3), (torch.float16, 2e-2), (torch.bfloat16, 5e-2)):
        if dtype == torch.bfloat16 and not has_bfloat16():
            continue
        worst = 0.0
        for k in (1, 3, 4, 8, 16, 17):
            model, x = free_model(96, k), torch.randn(3, 70, 96, device=DEVICE, dtype=dtype)
            leaves = [parameter for parameter in model.parameters() if parameter.requires_grad]
            both = []
            for name in ("auto", "torch"):
                with use_backend(name):
                    out = model(x)
                    both.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
            worst = max(worst, *(relative(one, other) for one, other in zip(*both, strict=True)))
        checks.append(Check(f"adapter, {dtype}: largest relative error against torch's cells", worst, limit))
    rows = (((8, 2048, 2048, 8), 1.0), ((32, 512, 768, 4), 1.2))
    for (batch, length, width, k), limit in sized(rows, (((2, 16, 32, 4), 1.2),)):
        x = torch.randn(batch, length, width, device=DEVICE)
        models = {
            "READ": READConfig(r=k, target_modules=["fc2"], init_weights=False),
            "Adapter": READConfig(r=k, cell="none", target_modules=["fc2"], init_weights=False),
            "LoRA r=4": LoraConfig(r=4, target_modules=["fc2"]),
        }
        times, walls = {}, {}
        for name, config in models.items():
            model, leaf = get_peft_model(FreeModel(width), config).to(DEVICE), x.clone().requires_grad_()
            parameters = [leaf, *(p for p in model.parameters() if p.requires_grad)]

            def step(model: nn.Module = model, leaf: Tensor = leaf, wanted: list[Tensor] = parameters) -> None:
                torch.autograd.grad(model(leaf).sum(), wanted, allow_unused=True)

            times[name], walls[name] = on_device(step), wall(step, repeats)
        row = f"adapter {batch}x{length}x{width} k={k}, forward and backward"
        checks += [Check(f"{row}: {name}, device ms", ms) for name, ms in times.items()]
        checks += [Check(f"{row}: {name}, wall ms", ms) for name, ms in walls.items()]
        checks.append(Check(f"{row}: device time against Adapter", times["READ"] / times["Adapter"], limit))
    return checks


def transport(repeats: int) -> list[Check]:
    """Problems solved by the kernel itself, their errors, and the time of a call."""
    checks, unsolved, worst, count = [], 0, 0.0, 0
    generator = torch.Generator().manual_seed(0)
    for batch, n, m in sized(((32, 75, 32), (96, 256, 256), (8, 300, 77)), ((4, 20, 12),)):
        for noise in (1.0, 0.2):
            cost = cosine_cost(*tokens_about_topics(batch, n, m, noise, generator))
            for options in ({"mass": 0.5}, {"mass": 0.9}, {"mass": 1.0}, {"mass": 0.5, "reg": 0.002}):
                found = partial_optimal_transport(cost.to(DEVICE), **options)
                exact = partial_optimal_transport(cost.to(DEVICE).double(), method="newton", tol=1e-8, **options)
                unsolved += int((~found.converged).sum())
                worst = max(worst, float(((found.cost - exact.cost).abs() / exact.cost.abs().clamp_min(1e-2)).max()))
                count += batch
    checks.append(Check(f"transport: share of {count} problems that the kernel did not solve", unsolved / count, 0.0))
    checks.append(Check("transport: largest relative error of the cost", worst, 1e-4))
    problems = sized(192, 4)
    cost = cosine_cost(torch.randn(problems, 75, 256), torch.randn(problems, 32, 256)).to(DEVICE).requires_grad_()
    call = lambda: torch.autograd.grad(partial_optimal_transport(cost).cost.sum(), cost)  # noqa: E731
    checks.append(
        Check(f"transport: {problems} problems of 75x32, value and gradient, wall ms", wall(call, repeats), 1.0)
    )
    with use_backend("torch"):
        checks.append(Check("transport: the same by Newton in torch, wall ms", wall(call, 3)))
    return checks


def training_steps(repeats: int) -> list[Check]:
    """A training step of BART under autocast: READ beside the same without a recurrence, READ-PVLA beside LoRA."""
    small = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
             "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 99}  # fmt: skip
    config = BartConfig(**sized({}, small), dropout=0.0)
    batch, length = sized((16, 512), (2, 16))
    ids = torch.randint(3, 99, (batch, length), device=DEVICE)
    video, text = slice(0, length // 2), slice(length // 2, length)
    dtype = torch.bfloat16 if has_bfloat16() else torch.float16
    configs = {
        "LoRA r=4": LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        "Adapter": READConfig(r=4, cell="none"),
        "READ": READConfig(r=4),
    }
    checks, walls = [], {}
    for name, compiled in (("LoRA r=4", False), ("Adapter", False), ("READ", False), ("READ + PVLA", False),
                           ("LoRA r=4", True), ("READ", True)):  # fmt: skip
        model = get_peft_model(BartForConditionalGeneration(config), configs[name.removesuffix(" + PVLA")]).to(DEVICE)
        called = torch.compile(model, mode=sized("reduce-overhead", "default")) if compiled else model
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        loss = PVLALoss() if name.endswith("PVLA") else None

        def step(called=called, optimizer=optimizer, loss=loss) -> None:  # type: ignore[no-untyped-def]
            with torch.autocast(DEVICE, dtype=dtype):
                out = called(input_ids=ids, labels=ids, output_hidden_states=loss is not None)
            total = out.loss
            if loss is not None:
                for states in out.encoder_hidden_states[1:]:
                    total = total + 0.1 * loss(states[:, video].float(), states[:, text].float())
            total.backward()
            optimizer.step()
            optimizer.zero_grad()

        label = f"{name}, compiled" if compiled else name
        walls[label] = wall(step, sized(repeats, 2))
        checks.append(Check(f"BART {batch}x{length}, {dtype}, a step: {label}, wall ms", walls[label]))
    for ours, theirs in (("READ + PVLA", "LoRA r=4"), ("READ", "Adapter"), ("READ, compiled", "LoRA r=4, compiled")):
        ratio = walls[ours] / walls[theirs]
        checks.append(Check(f"BART {batch}x{length}, a step: {ours}, time against {theirs}", ratio, 1.05))
    return checks


def data_parallel(repeats: int) -> list[Check]:
    """One process of DDP: its gradients are those without."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"init_method": f"file://{folder}/store", "rank": 0, "world_size": 1}
        distributed.init_process_group("nccl" if DEVICE == "cuda" else "gloo", **options)
        try:
            model = free_model(64, 4)
            x, both = torch.randn(4, 30, 64, device=DEVICE), []
            for called in (model, nn.parallel.DistributedDataParallel(model)):
                called(x).square().sum().backward()
                both.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
                model.zero_grad(set_to_none=True)
        finally:
            distributed.destroy_process_group()
    worst = max(relative(one, other) for one, other in zip(*both, strict=True))
    return [Check("DDP: largest relative error of a gradient against none", worst, 1e-5)]


def waits(repeats: int) -> list[Check]:
    """Waits for the device that a step of READ and PVLA causes."""
    model = get_peft_model(FreeModel(64), READConfig(r=4, target_modules=["fc2"])).to(DEVICE)
    loss, mask = PVLALoss(), torch.rand(4, 30, device=DEVICE) > 0.2
    x, text = torch.randn(4, 30, 64, device=DEVICE), torch.randn(4, 12, 64, device=DEVICE, requires_grad=True)

    def step() -> None:
        loss(model(x), text, mask).backward()

    step()
    with Waits() as counted:
        step()
    return [Check("waits for the device in one step of READ and PVLA", counted.count, 0)]


def generation(repeats: int) -> list[Check]:
    """A static cache against none."""
    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=4, vocab_size=101, max_position_embeddings=128)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    model = get_peft_model(model, READConfig(r=4, init_weights=False, task_type="CAUSAL_LM")).to(DEVICE).eval()
    ids = torch.randint(3, 100, (2, 9), device=DEVICE)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        expected = model.generate(input_ids=ids, use_cache=False, **settings)
        found = model.generate(input_ids=ids, cache_implementation="static", **settings)
    differing = int((expected != found).sum()) if expected.shape == found.shape else expected.numel()
    return [Check("generation: tokens that differ between a static cache and none", differing, 0)]


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


def wall(function: Callable[[], object], repeats: int) -> float:
    """Median milliseconds of a call, the device's work included."""
    times = []
    wait = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
    for number in range(repeats + 3):
        wait()
        start = time.perf_counter()
        function()
        wait()
        if number >= 3:
            times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def markdown(checks: list[Check]) -> str:
    """The report."""
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "smoke test on the CPU"
    lines = [
        f"{device}, Python {platform.python_version()}, torch {torch.__version__}; fast path "
        f"there: {backends.backend(DEVICE)}.", "", *show_backends().splitlines(), "",
        "| check | value | limit | |", "|---|---|---|---|",
    ]  # fmt: skip
    for check in checks:
        limit = "" if check.limit is None else f"{check.limit:.3g}"
        verdict = "" if check.limit is None else "passed" if check.passed else "**missed**"
        lines.append(f"| {check.name} | {check.value:.4g} | {limit} | {verdict} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
