"""Sums of losses between two logs, and of what went wrong in the alignment."""

from __future__ import annotations

from torch import Tensor, nn

from .loss import AlignmentDistance

__all__ = ["Sums", "failures", "totals"]


class Sums:
    """Running sums by name, kept as tensors so that no step waits for the device."""

    def __init__(self) -> None:
        self.examples = 0
        self.values: dict[str, Tensor] = {}

    def add(self, examples: int = 0, **values: Tensor) -> None:
        """Adds the values, scalars or (blocks,), each to the sum of its name, and the examples to their number."""
        self.examples += examples
        for name, value in values.items():
            value = value.detach().float()
            before = self.values.get(name)
            if before is not None and before.shape != value.shape:  # blocks that LayerDrop left out
                longest = max(len(before), len(value))
                before, value = (nn.functional.pad(sums, (0, longest - len(sums))) for sums in (before, value))
            self.values[name] = value if before is None else before + value

    def get(self, name: str) -> float:
        """The sum of one scalar, 0 where none was added; waits for the device."""
        return float(self.values[name]) if name in self.values else 0.0


def totals(result: AlignmentDistance, rows: int) -> dict[str, Tensor]:
    """The sums over the first rows."""
    distance, mass = result.over_blocks()
    return {"pvla_loss": distance[:rows].sum(), "pvla_mass": mass[:rows].sum()}


def failures(result: AlignmentDistance) -> dict[str, Tensor]:
    """Counts, kept on the device: (blocks,) distances that are NaN or infinite, and problems that did not converge."""
    counts = {"bad": (~result.distance.detach().isfinite()).sum(1)}
    if result.converged is not None:
        counts["unsolved"] = (~result.converged).sum()
    return counts
