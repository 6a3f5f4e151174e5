"""What `partial_optimal_transport` checks: its options, the weights and the mass of every problem."""

import math

import torch
from torch import Tensor

from .masks import broadcasts, real_entries, shape_of

__all__ = [
    "GRADIENTS",
    "MARGINALS",
    "METHODS",
    "check_device",
    "check_size",
    "checked_fraction",
    "checked_options",
    "checked_weights",
    "smaller_sum",
]

METHODS = ("auto", "newton", "dykstra", "paper", "exact")
GRADIENTS = ("envelope", "implicit", "unrolled")
MARGINALS = ("uniform", "count")


def check_device(device: torch.device) -> None:
    """Raises for a device without float64."""
    if device.type == "mps":
        raise ValueError(
            "transport is solved in float64, which MPS does not have: pass it tensors on the CPU (.cpu())."
        )


def check_size(total: Tensor, matrix: Tensor, penalty: float | None) -> None:
    """Raises if the mass to move, or its cost, is not a normal number of the plan's dtype."""
    if penalty is not None:
        return
    limits, values = torch.finfo(matrix.dtype), matrix.detach()
    largest = torch.maximum(values.amax((-2, -1)), -values.amin((-2, -1)))
    largest = largest.double().nan_to_num(1.0, 1.0)  # NaN is reported later
    small = total < limits.tiny * matrix.shape[-2] * matrix.shape[-1] / limits.eps
    small |= (largest > 0) & (total * largest < limits.tiny / limits.eps)
    wrong = (total > 0) & (small | (total * largest.clamp_min(1) > limits.max))
    if bool(wrong.any()):
        raise ValueError(
            f"a mass of {float(total[wrong][0]):.4g} at costs up to {float(largest[wrong][0]):.4g}: {matrix.dtype} "
            f"cannot hold it in {matrix.shape[-2]} x {matrix.shape[-1]} parts, or not its cost. Scale row_weights, "
            "col_weights or the cost, or pass a float64 cost."
        )


def checked_weights(
    side: str,
    weights: Tensor | None,
    mask: Tensor | None,
    marginals: str,
    shape: tuple[int, ...],
    device: torch.device,
    check: bool,
) -> tuple[Tensor, Tensor | None]:
    """The capacities of one side, (P, N) float64, 0 on padding; and the problems (P,) where they are wrong, if any.

    Wrong values raise where `check` allows to look at them.
    """
    count = math.prod(shape[:-1])
    if mask is None and weights is None:
        weight = 1.0 if marginals == "count" else 1 / shape[-1]
        return torch.full((count, shape[-1]), weight, dtype=torch.float64, device=device), None
    if mask is None:
        valid, wrong = torch.ones((), dtype=torch.bool, device=device), None
    else:
        valid, wrong = real_entries(f"{side}_mask", mask, shape, check=check)
        valid = valid.to(device)
        wrong = None if wrong is None else wrong.to(device).broadcast_to(shape).reshape(count, -1).any(-1)
    if weights is None:
        # Before the sum: one entry of the mask may stand for several of the side.
        checked = valid.broadcast_to(shape).double()
        if marginals == "uniform":
            checked = checked / checked.sum(-1, keepdim=True).clamp_min(1)
        return checked.reshape(-1, shape[-1]), wrong
    name = f"{side}_weights"
    if marginals == "count":
        raise ValueError(f'{name} cannot be given with marginals="count", which sets every weight to 1.')
    if not isinstance(weights, Tensor) or weights.is_complex() or not broadcasts(weights.shape, shape):
        raise ValueError(
            f"{name} must be a real tensor of shape {shape}, or broadcast to it, got {shape_of(weights)}."
        )
    checked = weights.detach().to(device).double()
    good = (checked >= 0) & checked.isfinite()
    if check and not bool(good.all()):
        raise ValueError(f"{name} must be finite and at least 0, got {float(checked.nan_to_num(-math.inf).amin())}.")
    checked, valid = checked.broadcast_to(shape), valid.broadcast_to(shape)
    checked = torch.where(valid, checked, 0).reshape(-1, shape[-1])
    sums = checked.sum(-1)
    empty = (sums <= 0) & valid.reshape(-1, shape[-1]).any(-1)
    if not check:
        bad = empty | ~sums.isfinite() | ~good.broadcast_to(shape).reshape(count, -1).all(-1)
        return checked, bad if wrong is None else wrong | bad
    if bool(empty.any()):
        raise ValueError(
            f"{name} sums to zero in a problem that has real entries: every problem needs a positive sum."
        )
    if not bool(sums.isfinite().all()):
        raise ValueError(f"{name} sums to infinity: scale the weights.")
    return checked, None


def checked_fraction(
    mass: float | Tensor, leading: torch.Size, device: torch.device, check: bool
) -> tuple[float | Tensor, Tensor | None]:
    """The fraction of each problem, one for all or (P,), and where it is wrong, if values are not read."""
    if isinstance(mass, int | float) and 0 < mass <= 1:
        return float(mass), None
    fraction = torch.as_tensor(mass, dtype=torch.float64, device=device).detach()
    if not broadcasts(fraction.shape, leading):
        raise ValueError(f"mass must be a number or broadcast to shape {tuple(leading)}, got {tuple(fraction.shape)}.")
    good = (fraction > 0) & (fraction <= 1)
    fraction, wrong = fraction.broadcast_to(leading).reshape(-1), None
    if check or not isinstance(mass, Tensor):
        if not bool(good.all()):
            first = float(torch.as_tensor(mass, dtype=torch.float64)[~good.cpu()].flatten()[0])
            raise ValueError(f"mass must be in (0, 1], the fraction of the smaller side to move, got {first}.")
    else:
        wrong = ~good.broadcast_to(leading).reshape(-1)
    return fraction, wrong


def smaller_sum(rows: float | Tensor, cols: float | Tensor) -> float | Tensor:
    """The smaller of the two sides' sums of weights, each one for all problems or (P,)."""
    if isinstance(rows, Tensor) and isinstance(cols, Tensor):
        return torch.minimum(rows, cols)
    if isinstance(rows, Tensor):
        return rows.clamp_max(cols)
    return cols.clamp_max(rows) if isinstance(cols, Tensor) else min(rows, cols)


def checked_options(
    method: str,
    gradient: str,
    marginals: str,
    tol: float,
    max_iter: int | None,
    reg: float,
    penalty: float | None,
) -> str:
    """Raises for options that are wrong by themselves or together; returns the method with "auto" narrowed down."""
    for name, value, allowed in (
        ("method", method, METHODS), ("gradient", gradient, GRADIENTS), ("marginals", marginals, MARGINALS),
    ):  # fmt: skip
        if name == "method" and value in ("numba", "triton"):
            raise ValueError(
                f'method={value!r} is not an algorithm but an implementation: write method="auto" and '
                f'use_backend("{value}"), or set PEFT_READ_BACKEND={value}.'
            )
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")
    for name, number in (("reg", reg), ("tol", tol)):
        if isinstance(number, Tensor) or not 0 < number < math.inf:
            raise ValueError(f"{name} must be a finite number above 0, got {number!r}.")
    if max_iter is not None and max_iter < 1:
        raise ValueError(f"max_iter must be at least 1, got {max_iter!r}.")
    if penalty is not None and not math.isfinite(penalty):
        raise ValueError(f"penalty must be a finite number or None, got {penalty!r}.")
    if method == "paper" and (marginals == "count" or penalty is not None):
        raise ValueError('method="paper" moves the mass 1: it takes neither marginals="count" nor a penalty.')
    if method == "exact" and gradient == "implicit":
        raise ValueError('method="exact" is piecewise constant in the plan: use gradient="envelope".')
    if method == "paper" and gradient == "implicit":
        raise ValueError('method="paper" stops short of its limit: use gradient="envelope" or "unrolled".')
    if gradient == "unrolled":
        if method not in ("auto", "dykstra", "paper"):
            raise ValueError(f'gradient="unrolled" needs method="dykstra" or "paper", got {method!r}.')
        return "dykstra" if method == "auto" else method
    return method
