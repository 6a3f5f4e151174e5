"""How fast and how exact partial optimal transport is, beside POT, geomloss and the paper's printed algorithm.

    python examples/benchmarks/transport.py                  # a few minutes; prints Markdown
    python examples/benchmarks/transport.py --quick          # under a minute, small problems
    python examples/benchmarks/transport.py --output docs/transport_benchmark   # and .json, .md, .png

One thread, float32 in. Every error is the largest relative error of the cost against the float64 optimum of the same
problem. Times are processor times (of the wall where there is a GPU), medians of repetitions interleaved over the
methods, so that a busy machine slows all of them alike; what would take minutes is timed on fewer iterations or
problems and scaled, and marked "~". Peers that are not installed are left out with a note.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import importlib.util
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from benchmark_report import build_parser, draw_times, processor, write_report
from topics import tokens_about_topics
from torch import Tensor

from peft_read import backends
from peft_read.transport import partial_optimal_transport

REG = 0.05
FULL = [
    (32, 75, 32, "aligned", 0.5), (32, 75, 32, "aligned", 0.8), (32, 75, 32, "matched", 0.8),
    (8, 300, 77, "aligned", 0.5), (8, 300, 77, "aligned", 0.8), (8, 300, 77, "matched", 0.8),
    (4, 256, 512, "aligned", 0.5), (4, 256, 512, "aligned", 0.8), (4, 256, 512, "matched", 0.8),
]  # fmt: skip
QUICK = [(4, 32, 16, "aligned", 0.5), (4, 32, 16, "matched", 0.8)]
GOALS = [  # (our method, the other one, must, aim)
    ("torch Newton", "POT entropic, 1000 iterations", 30, 100),
    ("torch Newton", "POT entropic to residual 1e-5", 3, 10),
    ("numba", "POT entropic, 1000 iterations", 200, 1000),
    ("numba", "POT entropic to residual 1e-5", 60, 200),
    ("numba", "POT exact LP", 1.5, 10),
    ("torch Newton", "paper's printed loop", 450, 2000),
]
STOPS = ("POT entropic to residual 1e-5", "POT entropic, oracle")


@dataclass
class Result:
    """One method on one row: milliseconds for the whole batch, largest relative cost error, iterations."""

    row: str
    method: str
    milliseconds: float
    error: float | None
    iterations: float | None
    scaled: bool = False


def main(argv: Sequence[str] | None = None) -> None:
    arguments = build_parser(
        __doc__, quick="small problems only", repeats="repetitions of the fast methods"
    ).parse_args(argv)
    torch.set_num_threads(1)
    # Once 28 MB have been freed, as in every training, glibc keeps the memory of smaller results. Before, it may give
    # it back after a call, as chance has it, and the next call takes up to three milliseconds more.
    torch.empty(7_000_000)
    warnings.filterwarnings("ignore")
    repeats = arguments.repeats or (5 if arguments.quick else 15)

    results: list[Result] = []
    for batch, n, m, family, mass in QUICK if arguments.quick else FULL:
        results += run_row(f"{batch}x{n}x{m} {family} {mass}", family_cost(family, batch, n, m), mass, repeats)
    notes = [f"{name} is not installed: its rows are missing" for name in ("ot", "numba", "geomloss") if not has(name)]
    balanced = run_balanced(family_cost("aligned", 4, 32, 16) if arguments.quick else
                            family_cost("aligned", 32, 75, 32), repeats)  # fmt: skip
    memory = backward_memory(family_cost("aligned", 1, 75, 32))
    device = run_gpu(repeats) if torch.cuda.is_available() else []
    tables = {"partial": results, "balanced": balanced, "gpu": device}
    content = {name: [asdict(result) for result in table] for name, table in tables.items()} | {"memory": memory}
    report = markdown(results, balanced, device, memory, notes)
    print(report)
    write_report(arguments.output, report, content, lambda path: draw(path, results))


def run_row(row: str, cost: Tensor, mass: float, repeats: int) -> list[Result]:
    """All methods on one batch of problems."""
    optimum = partial_optimal_transport(cost.double(), mass, REG, method="newton", tol=1e-9)
    assert optimum.converged.all()
    results, fast = [], {"torch Newton": "newton", "numba": "auto"}
    if backends.backend("cpu") != "numba":
        del fast["numba"]
    timed: dict[str, Callable[[], object]] = {
        name: lambda method=method: partial_optimal_transport(cost, mass, REG, method=method)
        for name, method in fast.items()
    }
    stops = dict(zip(STOPS, iterations_needed(cost.double(), mass, optimum.cost), strict=True))
    if has("ot"):
        for name, counts in stops.items():
            timed[name] = lambda counts=counts: pot_entropic(cost, mass, counts)
        timed["POT exact LP"] = lambda: pot_exact(cost, mass)
    times = interleaved(timed, repeats)
    for name, method in fast.items():
        plan = partial_optimal_transport(cost, mass, REG, method=method)
        assert plan.converged.all()
        results.append(
            Result(row, name, times[name], error(plan.cost, optimum.cost), plan.n_iter.double().mean().item())
        )
    if has("ot"):
        for name, counts in stops.items():
            wrong = error(pot_entropic(cost, mass, counts), optimum.cost)
            results.append(Result(row, name, times[name], wrong, float(np.mean(counts))))
        probe, share = cost[:1], 50
        seconds = statistics.median(clock(lambda: pot_entropic(probe, mass, [share])) for _ in range(3))
        results.append(Result(row, "POT entropic, 1000 iterations", 1e3 * seconds * len(cost) * 1000 / share, None,
                              1000, True))  # fmt: skip
        results.append(Result(row, "POT exact LP", times["POT exact LP"], None, None))
    # The paper's loop: every problem alone, every s from 1 to min(N, M), 1000 iterations each.
    share = 50
    seconds = statistics.median(clock(lambda: printed_pass(cost[0], share)) for _ in range(3))
    one_pass = 1e3 * seconds * len(cost) * 1000 / share
    results.append(Result(row, "paper's printed loop, one s", one_pass, None, 1000, True))
    results.append(Result(row, "paper's printed loop", one_pass * min(cost.shape[-2:]), None, 1000, True))
    return results


def run_balanced(cost: Tensor, repeats: int) -> list[Result]:
    """The whole mass: `ot.batch` has this problem only; geomloss' unbalanced problem is another one."""
    row = "x".join(map(str, cost.shape)) + " aligned 1.0"
    optimum = partial_optimal_transport(cost.double(), 1.0, REG, method="newton", tol=1e-9)
    batch, n, m = cost.shape
    weights = torch.full((batch, n), 1 / n), torch.full((batch, m), 1 / m)
    timed: dict[str, Callable[[], Tensor]] = {
        "torch Newton": lambda: partial_optimal_transport(cost, 1.0, REG, method="newton").cost
    }
    if backends.backend("cpu") == "numba":
        timed["numba"] = lambda: partial_optimal_transport(cost, 1.0, REG).cost
    if has("ot") and importlib.util.find_spec("ot.batch"):
        from ot.batch import solve_batch

        timed["ot.batch (balanced only)"] = lambda: (
            solve_batch(cost, REG, *weights, tol=1e-5, max_iter=5000, reg_type="entropy").value_linear
        )
    if has("geomloss"):
        points = torch.Generator().manual_seed(0)
        x, y = torch.randn(batch, n, 64, generator=points), torch.randn(batch, m, 64, generator=points)
        from geomloss import SamplesLoss

        loss = SamplesLoss("sinkhorn", p=2, blur=REG**0.5, reach=0.5, debias=False, backend="tensorized",
                           cost=lambda a, b: 1 - torch.nn.functional.normalize(a, dim=-1)
                           @ torch.nn.functional.normalize(b, dim=-1).mT)  # fmt: skip
        timed["geomloss, reach 0.5 (another problem: KL-unbalanced)"] = lambda: loss(weights[0], x, weights[1], y)
    times = interleaved(timed, repeats)
    return [
        Result(row, name, times[name], None if "another" in name else error(function(), optimum.cost), None)
        for name, function in timed.items()
    ]


def run_gpu(repeats: int) -> list[Result]:
    """On a GPU: the fused kernel and torch Newton beside the printed algorithm in eager torch, batched, one s."""
    results = []
    for batch, n, m, family, mass in FULL[:6]:
        row, cost = f"{batch}x{n}x{m} {family} {mass}", family_cost(family, batch, n, m).cuda()
        optimum = partial_optimal_transport(cost.double(), mass, REG, method="newton", tol=1e-9)
        timed = {
            "torch Newton": lambda c=cost, s=mass: partial_optimal_transport(c, s, REG, method="newton"),
            "printed algorithm, eager": lambda c=cost: partial_optimal_transport(c, 1.0, REG, method="paper"),
        }
        if backends.backend("cuda") == "triton":
            timed["triton"] = lambda c=cost, s=mass: partial_optimal_transport(c, s, REG)
        times = interleaved(timed, repeats)
        for name, function in timed.items():
            wrong = None if "printed" in name else error(function().cost, optimum.cost)
            results.append(Result(row, name, times[name], wrong, None))
    return results


def family_cost(family: str, batch: int, n: int, m: int) -> Tensor:
    """Cosine costs (B, N, M) of tokens about topics; "matched" has hardly any noise."""
    noise = {"aligned": 1.0, "matched": 0.2}[family]
    video, language = tokens_about_topics(batch, n, m, noise, torch.Generator().manual_seed(0))
    return 1 - torch.nn.functional.normalize(video, dim=-1) @ torch.nn.functional.normalize(language, dim=-1).mT


def pot_entropic(cost: Tensor, mass: float, iterations: list[int]) -> Tensor:
    """POT's partial solver, one problem after the other."""
    import ot

    arrays, (n, m) = cost.double().numpy(), cost.shape[-2:]
    rows, cols = np.full(n, 1 / n), np.full(m, 1 / m)
    plans = [
        ot.partial.entropic_partial_wasserstein(rows, cols, array, REG, m=mass, numItermax=count)
        for array, count in zip(arrays, iterations, strict=True)
    ]
    return torch.tensor([float((plan * array).sum()) for plan, array in zip(plans, arrays, strict=True)])


def pot_exact(cost: Tensor, mass: float) -> Tensor:
    """POT's linear programme, one problem after the other."""
    import ot

    arrays, (n, m) = cost.double().numpy(), cost.shape[-2:]
    rows, cols = np.full(n, 1 / n), np.full(m, 1 / m)
    return torch.tensor([float(ot.partial.partial_wasserstein2(rows, cols, array, m=mass)) for array in arrays])


def iterations_needed(cost: Tensor, mass: float, optimum: Tensor) -> tuple[list[int], list[int]]:
    """Where to stop POT's iteration: by a residual, and by an oracle.

    POT's own test compares the plans of two iterations with 1e-100, so that it always runs to the end. A user can stop
    where the next half sweep would move less than 1e-5 of the mass, about what a cost error of 1e-4 takes. An oracle
    that knows the optimum stops as soon as the cost stays within 1e-4. The iteration is run here on vectors, which
    gives the same numbers to the last digits.
    """
    kernel = (-cost / REG).exp()
    batch, n, m = cost.shape
    v, w = torch.ones(batch, m, 1, dtype=cost.dtype), mass / kernel.sum((1, 2))[:, None, None]
    u = torch.ones(batch, n, 1, dtype=cost.dtype)
    moving, wrong = torch.zeros(batch, dtype=torch.long), torch.zeros(batch, dtype=torch.long)
    for iteration in range(1, 1001):
        rows = w * (kernel @ v)
        better = (1 / n / rows).clamp_max(1)
        moving[(rows * (better - u).abs()).sum((1, 2)) / mass > 1e-5] = iteration
        u = better
        v = (1 / m / (w * (kernel.mT @ u))).clamp_max(1)
        w = mass / (u.mT @ kernel @ v)
        value = ((w * u * v.mT) * kernel * cost).sum((1, 2))
        wrong[(value / optimum - 1).abs() > 1e-4] = iteration
    return (moving + 1).clamp_max(1000).tolist(), (wrong + 1).clamp_max(1000).tolist()


def printed_pass(cost: Tensor, iterations: int) -> Tensor:
    """Lines 3 to 12 of Algorithm 1 for one problem, written down as they are printed."""
    n, m = cost.shape
    a, b, ones_n, ones_m = torch.full((n,), 1 / n), torch.full((m,), 1 / m), torch.ones(n), torch.ones(m)
    plan = torch.exp(-cost / REG)
    plan = plan / (ones_n @ plan @ ones_m)
    for _ in range(iterations):
        p_a = torch.minimum(a / (plan @ ones_m), ones_n)
        plan_a = torch.diag(p_a) @ plan
        p_b = torch.minimum(b / (plan_a.T @ ones_n), ones_m)
        plan_b = plan_a @ torch.diag(p_b)
        plan = plan_b / (ones_n @ plan_b @ ones_m)
    return (plan * cost).sum()


def backward_memory(cost: Tensor) -> dict[str, float]:
    """Bytes that autograd keeps for the backward pass: ours, and 1000 unrolled iterations of the printed algorithm."""
    cost = cost.clone().requires_grad_()
    ours = bytes_kept(lambda: partial_optimal_transport(cost, method="newton"))
    unrolled = bytes_kept(lambda: partial_optimal_transport(cost, method="paper", gradient="unrolled", max_iter=1000))
    return {"envelope": ours, "unrolled": unrolled, "ratio": unrolled / ours}


def bytes_kept(function: Callable[[], object]) -> int:
    """The memory behind the tensors that a graph keeps, each counted once."""
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.setdefault(tensor.untyped_storage().data_ptr(), tensor), lambda tensor: tensor
    ):
        function()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def interleaved(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median milliseconds of every function, taken in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    spent = dict.fromkeys(functions, 0.0)
    for repeat in range(repeats):
        for name, function in functions.items():
            if repeat >= 3 and spent[name] > 10:
                continue
            seconds[name].append(clock(function))
            spent[name] += seconds[name][-1]
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def clock(function: Callable[[], object]) -> float:
    """Seconds: of the processor where it does the work (other programs do not count), of the wall with a GPU."""
    now = time.perf_counter if torch.cuda.is_available() else time.process_time
    start = now()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return now() - start


def error(found: Tensor, optimum: Tensor) -> float:
    return float((found.double() / optimum - 1).abs().max())


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def markdown(
    results: list[Result], balanced: list[Result], device: list[Result], memory: dict[str, float], notes: list[str]
) -> str:
    """The report."""
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "numpy", "ot", "numba", "geomloss") if has(name)
    )
    lines = [f"Python {platform.python_version()}, {versions}; one thread of {processor()}; float32.", ""]
    lines += table("Partial transport: ms for the batch (largest relative cost error; mean iterations)", results)
    lines += ["| ratio over the rows | smallest | median | largest | goal (aim) |", "|---|---|---|---|---|"]
    for ours, other, must, aim in GOALS:
        ratios = speed_ups(results, ours, other)
        if ratios:
            lines.append(f"| {ours} : {other} | {min(ratios):.3g}x | {statistics.median(ratios):.3g}x | "
                         f"{max(ratios):.3g}x | {must}x ({aim}x) |")  # fmt: skip
    lines += [f"| backward memory, 1000 unrolled iterations : envelope | {memory['ratio']:.0f}x | | | 1000x |", ""]
    lines += table("The whole mass (balanced)", balanced)
    if device:
        lines += table(f"On {torch.cuda.get_device_name()}", device)
    return "\n".join([*lines, *(f"Note: {note}." for note in notes)])


def table(title: str, results: list[Result]) -> list[str]:
    methods, rows = list(dict.fromkeys(r.method for r in results)), list(dict.fromkeys(r.row for r in results))
    cells = {(r.row, r.method): r for r in results}
    lines = [f"**{title}**", "", "| | " + " | ".join(methods) + " |", "|---" * (len(methods) + 1) + "|"]
    lines += ["| " + " | ".join([row, *(cell(cells.get((row, method))) for method in methods)]) + " |" for row in rows]
    return [*lines, ""]


def cell(result: Result | None) -> str:
    if result is None:
        return ""
    details = [f"{result.error:.0e}"] if result.error is not None else []
    details += [f"{result.iterations:.0f}"] if result.iterations is not None else []
    return (
        ("~" if result.scaled else "") + f"{result.milliseconds:.3g}" + (f" ({'; '.join(details)})" if details else "")
    )


def speed_ups(results: list[Result], ours: str, other: str) -> list[float]:
    """How many times longer the other method takes, on every row that has both."""
    times = {(r.row, r.method): r.milliseconds for r in results}
    rows = dict.fromkeys(r.row for r in results)
    return [times[row, other] / times[row, ours] for row in rows if (row, other) in times and (row, ours) in times]


def version(package: str) -> str:
    return str(getattr(__import__(package), "__version__", "?"))


def draw(path: Path, results: list[Result]) -> None:
    """The times of every problem, the methods in the order of their medians."""
    rows: dict[str, dict[str, float]] = {}
    for result in results:
        rows.setdefault(result.row, {})[result.method] = result.milliseconds
    methods = {result.method for result in results}
    median = {method: statistics.median(row[method] for row in rows.values() if method in row) for method in methods}
    xlabel = "milliseconds for the batch, one thread"
    draw_times(path, rows, sorted(methods, key=median.__getitem__), xlabel=xlabel, legend="problems, mass")


if __name__ == "__main__":
    main()
