"""A penalty on the activations in the bottlenecks of adapters."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..bottleneck.layer import Bottleneck, GeneratedBottleneck

__all__ = ["BottleneckPenalty"]


class BottleneckPenalty:
    """The mean over adapters of mean(z²), where z = act(Down(y)) is what an adapter has in its bottleneck.

    A context: while it is open, forward passes of the model are watched. Of an adapter that runs several times, the
    last run counts; adapters that did not run are left out. Source: the option `track_z` of VL-Adapter's published
    code, whose weight is 0.001 by default.

    Args:
        model: a model with adapters of the bottleneck family, wrapped or not.

    Raises:
        ValueError: the model has none.

    Example:
        ```python
        with BottleneckPenalty(model) as penalty:
            loss = model(**batch).loss + 0.001 * penalty.value()
        ```
    """

    def __init__(self, model: nn.Module) -> None:
        self._activations = [
            module.activation for module in model.modules() if isinstance(module, Bottleneck | GeneratedBottleneck)
        ]
        if not self._activations:
            raise ValueError(f"{type(model).__name__} has no adapters with a bottleneck")
        self._squares: dict[int, Tensor] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> BottleneckPenalty:
        self._squares.clear()
        self._hooks = [module.register_forward_hook(self._keep) for module in self._activations]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self._squares[id(module)] = output.float().pow(2).mean()

    def value(self) -> Tensor:
        """The penalty of the forward passes so far: a float32 scalar.

        Raises:
            ValueError: no adapter has run.
        """
        if not self._squares:
            raise ValueError("no adapter with a bottleneck has run while the penalty was watching")
        return torch.stack(list(self._squares.values())).mean()
