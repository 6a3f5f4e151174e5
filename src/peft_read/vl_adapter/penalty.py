"""A penalty on the activations in the bottlenecks of adapters."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..bottleneck.layer import Bottleneck, GeneratedBottleneck
from ..bottleneck.shared import HyperformerShared

__all__ = ["BottleneckPenalty"]


class BottleneckPenalty:
    """The mean over adapters of mean(z²), where z = act(Down(y)) is what an adapter has in its bottleneck.

    A context: while it is open, forward passes of the model are watched. Of an adapter that runs several times, the
    last run counts; adapters that did not run are left out. The backward pass may come in the context or after it.
    Source: the option `track_z` of VL-Adapter's published code, whose weight is 0.001 by default.

    Args:
        model: a model with adapters of the bottleneck family, wrapped or not.

    Raises:
        ValueError: the model has none.

    Example:
        ```python
        with BottleneckPenalty(model) as penalty:
            loss = model(**batch).loss + 0.001 * penalty.value()
        loss.backward()
        ```
    """

    def __init__(self, model: nn.Module) -> None:
        self._bottlenecks: dict[int, tuple[str, Any]] = {
            id(module.activation): (name, module)
            for name, module in model.named_modules()
            if isinstance(module, Bottleneck | GeneratedBottleneck)
        }
        self._generators = [module for module in model.modules() if isinstance(module, HyperformerShared)]
        if not self._bottlenecks:
            raise ValueError(f"{type(model).__name__} has no adapters with a bottleneck")
        # z itself: what is computed of it inside a checkpointed block would have to be computed again with it.
        self._states: dict[int, Tensor] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> BottleneckPenalty:
        self._states.clear()
        self._hooks = [module.activation.register_forward_hook(self._keep) for _, module in self._bottlenecks.values()]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self._states[id(module)] = output

    def value(self) -> Tensor:
        """The penalty of the forward passes so far: a float32 scalar.

        Raises:
            RuntimeError: an adapter in training has run where gradients are switched off, and they are on now.
            ValueError: no adapter has run.
        """
        if not self._states:
            raise ValueError("no adapter with a bottleneck has run while the penalty was watching")
        for key, state in self._states.items():
            name, bottleneck = self._bottlenecks[key]
            if torch.is_grad_enabled() and not state.requires_grad and self._is_trained(bottleneck):
                raise RuntimeError(
                    f"the bottleneck {name!r} ran where gradients are switched off (inside a reentrant gradient "
                    "checkpoint, or under no_grad), so the penalty would silently have no gradient. Use "
                    "gradient_checkpointing_kwargs={'use_reentrant': False}; for its value alone, call value() under "
                    "torch.no_grad()"
                )
        return torch.stack([state.float().pow(2).mean() for state in self._states.values()]).mean()

    def _is_trained(self, bottleneck: Any) -> bool:
        """Whether z of a bottleneck must have a gradient: everything that makes it Down is trained."""
        if isinstance(bottleneck, GeneratedBottleneck):
            weights = [weight for shared in self._generators for weight in shared.parameters()]
        else:
            weights = list(bottleneck.down_sampler.parameters())
        return bottleneck.training and len(weights) > 0 and all(weight.requires_grad for weight in weights)
