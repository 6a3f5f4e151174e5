"""Hyperformer's weights: embeddings of task and layer, an MLP, and linear generators of Down, Up and the norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .config import HyperformerConfig

__all__ = ["KINDS", "Generated", "Hypernetworks", "Position", "StackHypernetwork"]

KINDS = ("feed_forward", "self_attention", "cross_attention")  # the rows of the kind embedding begin with these
ORIGINAL_DEVIATION = 0.01  # of the original's linear layers, where the base model does not draw them anew
EPSILON = 1e-6  # of the norm of what everything is generated from, as the original has it


@dataclass(frozen=True)
class Position:
    """The position of an adapter.

    Args:
        stack: the key of the stack that its layer belongs to, "encoder" or "decoder" mostly.
        kind: the key of its generators, one of `KINDS` mostly.
        layer: the index of the layer in the stack.
        width: d.
        r: the width of the bottleneck.
    """

    stack: str
    kind: str
    layer: int
    width: int
    r: int


class Generated(NamedTuple):
    """The weights of one adapter: Down (r, d) and (r,), Up (d, r) and (d,), norms (d,) and (d,)."""

    down: tuple[Tensor, Tensor]
    up: tuple[Tensor, Tensor]
    norm_before: tuple[Tensor, Tensor] | None
    norm_after: tuple[Tensor, Tensor] | None

    def on(self, device: torch.device) -> Generated:
        """The same on the device of the layer, which may not be that of what generates (`device_map`)."""
        if self.down[0].device == device:
            return self
        return Generated(*(part and (part[0].to(device), part[1].to(device)) for part in self))  # type: ignore[arg-type]


class Generator(nn.Module):
    """e (L, p) -> the weights (L, rows, columns) and biases (L, rows) of L linear layers, or (L, rows) of L norms."""

    def __init__(self, p: int, rows: int, columns: int | None) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns
        self.weight_generator = nn.Linear(p, rows * (columns or 1))
        self.bias_generator = nn.Linear(p, rows)

    def reset_parameters(self, deviation: float | None, *, zero: bool) -> None:
        """N(0, `deviation`), or generated weights of deviation 1/√columns; biases zero, or everything."""
        for linear in (self.weight_generator, self.bias_generator):
            if zero:
                nn.init.zeros_(linear.weight)
            else:
                own = (linear.in_features * (self.columns or 1)) ** -0.5
                nn.init.normal_(linear.weight, std=own if deviation is None else deviation)
            nn.init.zeros_(linear.bias)

    def forward(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """The weights and biases of the L layers that the embeddings stand for."""
        weights = self.weight_generator(embeddings)
        if self.columns is not None:
            weights = weights.view(len(embeddings), self.rows, self.columns)
        return weights, self.bias_generator(embeddings)


class StackHypernetwork(nn.Module):
    """The hypernetwork of one stack.

    Args:
        config: the widths, and which norms there are.
        positions: of the stack's adapters.
    """

    def __init__(self, config: HyperformerConfig, positions: list[Position]) -> None:
        super().__init__()
        dim, p = config.task_embedding_dim, config.projected_dim
        sizes = {position.kind: (position.width, position.r) for position in positions}
        self.layers = 1 + max(position.layer for position in positions)
        self.kinds = [*KINDS, *(kind for kind in sizes if kind not in KINDS)]
        self.layer_embedding = nn.Embedding(self.layers, dim)
        self.kind_embedding = nn.Embedding(len(self.kinds), dim) if config.shared_generator else None
        self.mlp = nn.Sequential(
            nn.Linear((3 if config.shared_generator else 2) * dim, config.hidden_dim),
            nn.ReLU(),
            nn.Linear(config.hidden_dim, p),
        )
        self.norm = nn.LayerNorm(p, eps=EPSILON)
        generators = {"shared": next(iter(sizes.values()))} if config.shared_generator else sizes
        self.used = [kind for kind in self.kinds if kind in sizes]
        self.generators = nn.ModuleDict()
        for kind, (width, r) in generators.items():
            parts = {"down_sampler": Generator(p, r, width), "up_sampler": Generator(p, width, r)}
            for name in ("norm_before", "norm_after"):
                if getattr(config, name):
                    parts[name] = Generator(p, width, None)
            self.generators[kind] = nn.ModuleDict(parts)

    def reset_parameters(self, init_weights: bool | str, deviation: float | None) -> None:
        """Initialise everything.

        Args:
            init_weights: True makes what is generated for Up, or for the norm after it, zero; "original" draws what
                the original does.
            deviation: of the base model's own linear layers and embeddings, if it has one.
        """
        original = init_weights == "original"
        linear = (ORIGINAL_DEVIATION if deviation is None else deviation) if original else None
        for embedding in (self.layer_embedding, self.kind_embedding):
            if embedding is not None:
                nn.init.normal_(embedding.weight, std=deviation if original and deviation is not None else 1.0)
        for layer in (self.mlp[0], self.mlp[2]):
            assert isinstance(layer, nn.Linear)
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5 if linear is None else linear)
            nn.init.zeros_(layer.bias)
        self.norm.reset_parameters()
        for parts in self.generators.values():
            assert isinstance(parts, nn.ModuleDict)
            last = "norm_after" if "norm_after" in parts else "up_sampler"
            for name, part in parts.items():
                assert isinstance(part, Generator)
                part.reset_parameters(linear, zero=init_weights is True and name == last)

    def generate(self, task: Tensor, only: tuple[str, int] | None = None) -> dict[tuple[str, int], Generated]:
        """The adapters of all layers of the stack, by kind and layer.

        Args:
            task: the embedding (D,) of the task.
            only: the kind and the layer of the one adapter that is wanted; all of them if absent.
        """
        generated: dict[tuple[str, int], Generated] = {}
        layers = range(self.layers) if only is None else range(only[1], only[1] + 1)
        # Embeddings are called, not read: FSDP and offloading put weights in their place for the time of a call.
        per_layer = self.layer_embedding(torch.arange(layers.start, layers.stop, device=task.device))
        inputs = torch.cat([task.expand(len(layers), -1), per_layer], dim=-1)
        embeddings = self.norm(self.mlp(inputs)) if self.kind_embedding is None else None
        for kind in self.used if only is None else (only[0],):
            generators: Any = self.generators[kind if self.kind_embedding is None else "shared"]
            if self.kind_embedding is not None:
                index = torch.full((len(layers),), self.kinds.index(kind), device=task.device)
                of_kind = self.kind_embedding(index)
                embeddings = self.norm(self.mlp(torch.cat([inputs, of_kind], dim=-1)))
            parts = {name: zip(*(t.unbind(0) for t in generator(embeddings)), strict=True)
                     for name, generator in generators.items()}  # fmt: skip
            for layer in layers:
                weights = {name: next(pairs) for name, pairs in parts.items()}
                generated[kind, layer] = Generated(
                    weights["down_sampler"],
                    weights["up_sampler"],
                    weights.get("norm_before"),
                    weights.get("norm_after"),
                )
        return generated


class TaskEmbeddings(nn.ParameterDict):
    """The embeddings (D,) of tasks, by "task_<name>"."""

    def forward(self, task: str) -> Tensor:
        """The embedding of a task, by a call: offloading puts it in its place for the time of a call."""
        return self[f"task_{task}"]

    __call__ = nn.Module.__call__  # torch's own dictionary refuses to be called


class Hypernetworks(nn.Module):
    """One adapter's embeddings of tasks, shared by the stacks, and a hypernetwork per stack.

    Args:
        config: the configuration.
        positions: of the adapters.
    """

    def __init__(self, config: HyperformerConfig, positions: list[Position]) -> None:
        super().__init__()
        self.task_embeddings = TaskEmbeddings()
        for task in config.tasks or ():
            self.task_embeddings[f"task_{task}"] = nn.Parameter(torch.empty(config.task_embedding_dim))
        stacks: dict[str, list[Position]] = {}
        for position in positions:
            stacks.setdefault(position.stack, []).append(position)
        self.stacks = nn.ModuleDict({key: StackHypernetwork(config, places) for key, places in stacks.items()})

    def add_task(self, task: str, like: str | None, init_weights: bool | str, deviation: float | None) -> None:
        """Add the embedding of a further task.

        Args:
            task: its name.
            like: the task whose embedding it begins with; N(0, 1) if None.
            init_weights: of the configuration; the embedding is drawn in one way only.
            deviation: of the base model's linear layers, which embeddings of tasks do not follow.
        """
        first = next(iter(self.task_embeddings.values()))
        embedding = nn.init.normal_(torch.empty_like(first)) if like is None else self.task_embeddings[f"task_{like}"]
        copied = embedding.detach().clone()
        self.task_embeddings[f"task_{task}"] = nn.Parameter(copied, requires_grad=first.requires_grad)

    def reset_parameters(self, init_weights: bool | str, deviation: float | None) -> None:
        """Task embeddings N(0, 1), the rest as `StackHypernetwork` says."""
        for embedding in self.task_embeddings.values():
            nn.init.normal_(embedding)
        for stack in self.stacks.values():
            assert isinstance(stack, StackHypernetwork)
            stack.reset_parameters(init_weights, deviation)
