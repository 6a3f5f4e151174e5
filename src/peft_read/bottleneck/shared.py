"""What the adapters of a model share over its layers: Compacter's rules, Hyperformer's hypernetworks."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..peft_methods.mixed import mixed_rows
from ..tasks import TaskModule
from .hypernetwork import Generated, Hypernetworks, Position
from .samplers import Rule

__all__ = ["NAME", "BottleneckState", "CompacterShared", "HyperformerShared", "SharedRule", "needed_task"]

NAME = "shared_over_layers"  # of the module in the adapted model; no prefix of a method is a part of it


class BottleneckState(BaseTunerLayer, TaskModule):
    """The base of modules that hold weights of this family: layers, and what they share.

    One container per module, named after the method, holds the weights of each adapter.
    """

    prefix: str = "bottleneckadapter_"
    adapter_layer_names: tuple[str, ...] = ("bottleneckadapter_parts",)

    @property
    def parts(self) -> nn.ModuleDict:
        """The weights by adapter."""
        return getattr(self, self.adapter_layer_names[0])

    @property
    def serving(self) -> list[str]:
        """The adapters that the running forward pass needs, in order."""
        mixed = mixed_rows()
        if self.disable_adapters:
            return []
        return [name for name in (self.active_adapters if mixed is None else mixed.adapters) if name in self.parts]

    @property
    def task_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """The tasks that the active adapters know, all of them."""
        known = [tasks for name in self.active_adapters if (tasks := self.tasks_of(name))]
        return tuple(task for task in known[0] if all(task in tasks for tasks in known)) if known else ()

    def tasks_of(self, adapter: str) -> list[str]:
        """The tasks of an adapter; none if it is not here or knows no tasks."""
        return list(getattr(self.parts[adapter], "tasks", None) or ()) if adapter in self.parts else []

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise an error: the adapters are not linear."""
        raise NotImplementedError("Bottleneck adapters cannot be merged: their activation is not linear.")

    def unmerge(self) -> None:
        """Refuse: nothing was merged."""
        raise NotImplementedError("Bottleneck adapters cannot be merged: their activation is not linear.")


def needed_task(task: str | None, tasks: list[str]) -> str:
    """The task whose weights a forward pass takes.

    Raises:
        ValueError: if none was chosen and there are several, or the chosen one is not one of them.
    """
    if task in tasks:
        return task  # type: ignore[return-value]
    if task is None and len(tasks) == 1:
        return tasks[0]
    known = ", ".join(map(repr, tasks))
    if task is None:
        raise ValueError(
            f"this model has weights per task and none was chosen: call set_task(model, task) with one of {known}"
        )
    raise ValueError(f"task {task!r} is unknown to this adapter, which has weights for: {known}")


class SharedRule(nn.Module):
    """The rules of all Kronecker products of one adapter."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.rule = Rule(n)


class _Shared(nn.Module, BottleneckState):
    """A child of the adapted model, so that peft finds, trains, saves, moves and deletes what it holds."""

    other_param_names: tuple[str, ...] = ()
    # What peft reads of the module that a layer wraps.
    weight = bias = in_features = out_features = None  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.add_module(self.adapter_layer_names[0], nn.ModuleDict({}))
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter: list[str] = []
        self.cast_input_dtype_enabled = True  # peft.helpers switches it in everything that is a layer to peft
        self.task = None

    def add(self, adapter_name: str, part: nn.Module, *, like: torch.Tensor | None) -> None:
        """Add what one adapter's layers share.

        Args:
            adapter_name: the adapter's name.
            part: what they share.
            like: a weight of the base model, whose device and dtype it is to have.
        """
        if like is not None and not any(p.is_meta for p in part.parameters()):
            part = part.to(like)
        self.parts[adapter_name] = part
        self.set_adapter(self.active_adapters or [adapter_name])

    def get_base_layer(self) -> nn.Module:
        """Itself: it wraps nothing."""
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The identity: a `torch.nn.Sequential` calls all of its modules."""
        return x

    def __repr__(self) -> str:
        return "peft_read." + super().__repr__()


class CompacterShared(_Shared):
    """The rules of Compacter with shared_rule="model", by adapter."""

    prefix = "compacter_"
    adapter_layer_names = ("compacter_parts",)


class HyperformerShared(_Shared):
    """The hypernetworks by adapter, and what they generated for the running forward pass."""

    prefix = "hyperformer_"
    adapter_layer_names = ("hyperformer_parts",)

    def __init__(self) -> None:
        super().__init__()
        # By adapter and stack; filled when the forward pass of a stack begins and emptied when it ends.
        self.generated: dict[tuple[str, str], dict[tuple[str, int], Generated]] = {}

    def tasks_of(self, adapter: str) -> list[str]:
        """The tasks of an adapter."""
        if adapter not in self.parts:
            return []
        return [key.removeprefix("task_") for key in self.hypernetworks(adapter).task_embeddings]

    def hypernetworks(self, adapter: str) -> Hypernetworks:
        """Those of one adapter."""
        networks = self.parts[adapter]
        assert isinstance(networks, Hypernetworks)
        return networks

    def task_embedding(self, adapter: str) -> torch.Tensor:
        """The embedding (D,) of the task that is served."""
        task = needed_task(self.task, self.tasks_of(adapter))
        embeddings = self.hypernetworks(adapter).task_embeddings
        others = [embedding for key, embedding in embeddings.items() if key != f"task_{task}"]
        return keep_in_graph(embeddings(task), others)

    def generate(self, stack: str) -> None:
        """Generate the adapters of a stack, whose forward pass begins."""
        for adapter in self.serving:
            networks: Any = self.hypernetworks(adapter).stacks
            if stack in networks:
                self.generated[adapter, stack] = networks[stack].generate(self.task_embedding(adapter))

    def forget(self, stack: str) -> None:
        """Drop what was generated for a stack, whose forward pass ends."""
        for key in [key for key in self.generated if key[1] == stack]:
            del self.generated[key]

    def weights_of(self, adapter: str, position: Position) -> Generated:
        """The weights of one adapter at one position; generated for it alone where its stack was not called."""
        weights = self.generated.get((adapter, position.stack))
        if weights is None:
            networks: Any = self.hypernetworks(adapter).stacks
            only = (position.kind, position.layer)
            weights = networks[position.stack].generate(self.task_embedding(adapter), only)
        return weights[position.kind, position.layer]


class _KeepInGraph(torch.autograd.Function):
    """The identity, whose backward pass reaches further parameters with no gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        ctx.others = len(others)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return (gradient, *([None] * ctx.others))


def keep_in_graph(x: torch.Tensor, others: list[nn.Parameter]) -> torch.Tensor:
    """Return x in a graph that also reaches the weights of the tasks that this pass does not serve.

    DistributedDataParallel waits for all trained parameters; those of other tasks would have to be searched for
    (`find_unused_parameters=True`), or the next step would fail. They get no gradient, so that an optimizer leaves
    them alone, unless another process serves their task.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not torch.distributed.is_available():
        return x
    if not torch.distributed.is_initialized():
        return x
    trained = [parameter for parameter in others if parameter.requires_grad]
    return _KeepInGraph.apply(x, *trained) if trained else x  # type: ignore[no-any-return]
