"""The bottleneck adapter on one module: y + Up(act(Down(y))), added to the output y of the module it wraps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from ..peft_methods.endings import device_of, in_and_out
from ..peft_methods.mixed import mixed_rows
from .config import BottleneckConfig, CompacterConfig
from .hypernetwork import Generated, Position
from .samplers import LentRule, LowRankLinear, PHMLinear, Rule, reset_linear
from .shared import BottleneckState, HyperformerShared, keep_in_graph, needed_task

__all__ = ["Bottleneck", "BottleneckLayer", "CompacterLayer", "GeneratedBottleneck", "HyperformerLayer"]

# The same formula as transformers' own module computes in seven operations.
FUSED = {"gelu_new", "gelu_fast", "gelu_pytorch_tanh"}


def activation_of(name: str) -> nn.Module:
    """The module of an activation's name."""
    return nn.GELU(approximate="tanh") if name in FUSED else ACT2FN[name]


class Bottleneck(nn.Module):
    """What one adapter adds at one position: Up(act(Down(y))), with norms where they are on.

    A half that the tasks share is a sampler; a half that they have apart is a `ModuleDict` of samplers under
    "task_<name>". `norm_before`, `norm_after`, and Compacter's `down_rule` and `up_rule` of shared_rule="tasks",
    belong to the position.

    Args:
        width: d.
        r: the width of the bottleneck.
        config: the adapter's configuration.
        rule: the rules of the whole model, if Compacter shares them.
    """

    def __init__(self, width: int, r: int, config: BottleneckConfig, rule: LentRule | None = None) -> None:
        super().__init__()
        self.tasks = None if config.tasks is None else list(config.tasks)
        self.settings = (width, r, config, rule)
        self.norm_before = nn.LayerNorm(width) if config.norm_before else None
        self.norm_after = nn.LayerNorm(width) if config.norm_after else None
        self.activation = activation_of(config.activation)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        if isinstance(config, CompacterConfig) and config.shared_rule == "tasks":
            self.down_rule, self.up_rule = Rule(config.phm_dim), Rule(config.phm_dim)
        self.down_sampler = self._half("down", width, r)
        self.up_sampler = self._half("up", r, width)

    def _half(self, half: str, inputs: int, outputs: int) -> nn.Module:
        tasks = self.settings[2].tasks_apart(half)
        if not tasks:
            return self._sampler(half, inputs, outputs)
        return nn.ModuleDict({f"task_{task}": self._sampler(half, inputs, outputs) for task in tasks})

    def _sampler(self, half: str, inputs: int, outputs: int) -> nn.Module:
        _, _, config, rule = self.settings
        if isinstance(config, CompacterConfig):
            lent = LentRule(self, f"{half}_rule") if hasattr(self, f"{half}_rule") else rule
            return PHMLinear(inputs, outputs, n=config.phm_dim, rank=config.factorized_rank, lent=lent)
        if config.low_rank is not None:
            return LowRankLinear(inputs, outputs, rank=config.low_rank)
        return nn.Linear(inputs, outputs)

    def reset_parameters(self, init_weights: bool | str, deviation: float | None) -> None:
        """Initialise everything; the identity for True, by a zero Up or, where a norm follows, by its zero weight.

        Args:
            init_weights: of the configuration.
            deviation: of the base model's own linear layers, if it has one.
        """
        for name in ("down_rule", "up_rule"):
            if hasattr(self, name):
                getattr(self, name).reset_parameters(init_weights)
        for norm in (self.norm_before, self.norm_after):
            if norm is not None:
                norm.reset_parameters()
        if init_weights is True and self.norm_after is not None:
            nn.init.zeros_(self.norm_after.weight)
        for half in ("down", "up"):
            for sampler in self._samplers(half):
                self._reset(sampler, half, init_weights, deviation)

    def _samplers(self, half: str) -> list[nn.Module]:
        half_sampler: Any = getattr(self, f"{half}_sampler")
        return list(half_sampler.values()) if isinstance(half_sampler, nn.ModuleDict) else [half_sampler]

    def _reset(self, sampler: Any, half: str, init_weights: bool | str, deviation: float | None) -> None:
        zero = init_weights is True and half == "up" and self.norm_after is None
        if isinstance(sampler, nn.Linear):
            reset_linear(sampler, init_weights, zero=zero, deviation=deviation)
        else:
            sampler.reset_parameters(init_weights, zero=zero)

    def add_task(self, task: str, like: str | None, init_weights: bool | str, deviation: float | None) -> None:
        """Add the weights of a further task, of what the tasks do not share.

        Args:
            task: its name.
            like: the task whose weights it begins with; new ones if None.
            init_weights: how new ones are drawn.
            deviation: of the base model's own linear layers, if it has one.
        """
        assert self.tasks is not None
        self.tasks.append(task)
        width, r, _, _ = self.settings
        for half, inputs, outputs in (("down", width, r), ("up", r, width)):
            samplers: Any = getattr(self, f"{half}_sampler")
            if not isinstance(samplers, nn.ModuleDict):
                continue
            first = next(samplers[name] for name in samplers)
            sampler: Any = self._sampler(half, inputs, outputs)
            sampler.to(next(first.parameters()))
            self._reset(sampler, half, init_weights, deviation)
            if like is not None:
                sampler.load_state_dict(samplers[f"task_{like}"].state_dict())
            for new, old in zip(sampler.parameters(), first.parameters(), strict=True):
                new.requires_grad_(old.requires_grad)
            samplers[f"task_{task}"] = sampler

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype to compute in."""
        return next(self.up_sampler.parameters()).dtype

    def forward(self, y: Tensor, task: str | None) -> Tensor:
        """Up(act(Down(y))) of one task.

        Args:
            y: (..., d).
            task: the chosen one.

        Raises:
            ValueError: if tasks have weights apart and none, or an unknown one, was chosen.
        """
        hidden = y if self.norm_before is None else self.norm_before(y)
        hidden = self.dropout(self.activation(self._of_task(self.down_sampler, task)(hidden)))
        if self.tasks is not None:
            hidden = keep_in_graph(hidden, self._others(task))
        delta = self._of_task(self.up_sampler, task)(hidden)
        return delta if self.norm_after is None else self.norm_after(delta)

    def _of_task(self, half: Any, task: str | None) -> nn.Module:
        if not isinstance(half, nn.ModuleDict):
            return half
        assert self.tasks is not None
        return half[f"task_{needed_task(task, self.tasks)}"]

    def _others(self, task: str | None) -> list[nn.Parameter]:
        """The parameters of the tasks that are not served."""
        parameters: list[nn.Parameter] = []
        for half in (self.down_sampler, self.up_sampler):
            if isinstance(half, nn.ModuleDict):
                served = self._of_task(half, task)
                parameters += [p for sampler in half.values() if sampler is not served for p in sampler.parameters()]
        return parameters


class GeneratedBottleneck(nn.Module):
    """What one adapter adds at one position, with the weights that a hypernetwork generates.

    Args:
        position: where.
        config: the adapter's configuration.
    """

    def __init__(self, position: Position, config: BottleneckConfig) -> None:
        super().__init__()
        self.position = position
        self.activation = activation_of(config.activation)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(self, y: Tensor, weights: Generated) -> Tensor:
        """Up(act(Down(y))) with given weights.

        Args:
            y: (..., d).
            weights: those of this position.
        """
        hidden = _normed(y, weights.norm_before)
        hidden = self.dropout(self.activation(F.linear(hidden, *weights.down)))
        return _normed(F.linear(hidden, *weights.up), weights.norm_after)


def _normed(y: Tensor, norm: tuple[Tensor, Tensor] | None) -> Tensor:
    return y if norm is None else F.layer_norm(y, norm[0].shape, *norm)


class BottleneckLayer(nn.Module, BottleneckState):
    """A module and the adapters on its output, one set of weights per adapter.

    Args:
        base_layer: the module whose output y is adapted.
        path: where it stands in the model, for messages.
        batch_first: whether the module puts out (B, T, d) rather than (T, B, d).
        width: the width d of the output of a module that does not tell it, such as a mixture of experts.
    """

    other_param_names: tuple[str, ...] = ("r",)

    def __init__(
        self, base_layer: nn.Module, *, path: str = "", batch_first: bool = True, width: int | None = None
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.path = path
        self.batch_first = batch_first
        self.r: dict[str, int] = {}
        self.add_module(self.adapter_layer_names[0], nn.ModuleDict({}))
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter: list[str] = []
        self.cast_input_dtype_enabled = True  # peft.helpers.disable_input_dtype_casting switches it
        self.task = None
        base = self.get_base_layer()
        widths = in_and_out(base)
        if widths is None and width is not None and list(base.children()):
            widths = (width, width)
        if widths is None:
            raise ValueError(
                f"Target module {base} is not supported: the adapter needs a module with one output tensor (..., d) "
                "of known width, such as torch.nn.Linear or transformers' Conv1D, or the feed-forward part of a block."
            )
        self.in_features, self.out_features = widths

    def update_layer(self, adapter_name: str, bottleneck: nn.Module, *, r: int, inference_mode: bool) -> None:
        """Add the weights of one adapter.

        Args:
            adapter_name: its name.
            bottleneck: the weights.
            r: the width of the bottleneck.
            inference_mode: whether it is not to be trained.
        """
        active = self.active_adapters if len(self.parts) else [adapter_name]
        self.r[adapter_name] = r
        self.parts[adapter_name] = bottleneck
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(active, inference_mode=inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        place = device_of(self.get_base_layer()) if device is None else device
        super()._move_adapter_to_device_of_base_layer(adapter_name, place)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The base layer's output and what the active adapters add to it.

        Of a tuple, such as a mixture of experts may return with the scores of its router, the first entry is adapted.
        """
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        if isinstance(result, tuple):
            return (self._adapted(result[0]), *result[1:])
        return self._adapted(result)

    def _adapted(self, result: Tensor) -> Tensor:
        mixed = mixed_rows()
        active = self.serving
        if not active or not result.numel():  # no token of this kind, such as sound in a batch of text
            return result
        if mixed is None:
            total = result
            for adapter in active:
                total = _add(total, self._delta(adapter, result))
            return total
        total = result.clone()
        for adapter in active:
            dim, rows = mixed.places_of(adapter, result, self, path=self.path, batch_first=self.batch_first)
            delta = self._delta(adapter, result.index_select(dim, rows))
            total = total.index_add(dim, rows, delta.to(result.dtype))
        return total

    def _delta(self, adapter: str, y: Tensor) -> Tensor:
        """What one adapter adds to y (..., d)."""
        bottleneck: Any = self.parts[adapter]
        return bottleneck(self._cast_input_dtype(y, bottleneck.weight_dtype), self.task)

    def __repr__(self) -> str:
        return "peft_read." + super().__repr__()


def _add(result: Tensor, delta: Tensor) -> Tensor:
    """Result + delta in the result's dtype."""
    return result + delta.to(result.dtype)


class CompacterLayer(BottleneckLayer):
    """A module and the Compacter adapters on its output."""

    prefix = "compacter_"
    adapter_layer_names = ("compacter_parts",)


class HyperformerLayer(BottleneckLayer):
    """A module and the adapters on its output whose weights are generated.

    Args:
        base_layer: the module whose output y is adapted.
        shared: the hypernetworks of the model.
        **kwargs: of `BottleneckLayer`.
    """

    prefix = "hyperformer_"
    adapter_layer_names = ("hyperformer_parts",)

    def __init__(self, base_layer: nn.Module, *, shared: HyperformerShared, **kwargs: Any) -> None:
        super().__init__(base_layer, **kwargs)
        self.__dict__["shared"] = shared  # not a submodule: it is one of the adapted model

    @property
    def depends_on(self) -> tuple[nn.Module, ...]:  # type: ignore[override]
        """What generates the weights."""
        shared: Any = self.shared
        return (shared,)

    def _delta(self, adapter: str, y: Tensor) -> Tensor:
        bottleneck: Any = self.parts[adapter]
        shared: Any = self.shared
        weights = shared.weights_of(adapter, bottleneck.position).on(y.device)
        return bottleneck(self._cast_input_dtype(y, weights.down[0].dtype), weights)
