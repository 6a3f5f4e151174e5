"""The positions of Hyperformer's adapters: the stack, the kind of position and the layer of each target."""

from __future__ import annotations

from collections import Counter

from torch import nn

from ..peft_methods.endings import block_of, kind_of
from ..peft_methods.stacks import find_stack
from .config import HyperformerConfig
from .hypernetwork import Position

__all__ = ["positions_of", "stacks_of"]


def stacks_of(paths: list[str], model: nn.Module) -> dict[str, tuple[str, str]]:
    """The path and the key of the stack of each target.

    Args:
        paths: of the targets.
        model: the model that they start at.
    """
    stacks = {path: _stack_of(model, path) for path in paths}
    ends = Counter(name.rpartition(".")[2] for name in set(stacks.values()))
    keys = {
        name: (end if ends[end := name.rpartition(".")[2]] == 1 else name.replace(".", "_")) or "model"
        for name in stacks.values()
    }
    return {path: (name, keys[name]) for path, name in stacks.items()}


def positions_of(widths: dict[str, int], config: HyperformerConfig, model: nn.Module) -> dict[str, Position]:
    """The positions of the adapters, by the path of their module.

    Args:
        widths: d of each target.
        config: the adapter's configuration.
        model: the model that the paths start at.

    Raises:
        ValueError: if one pair of generators would have to make adapters of several sizes.
    """
    stacks = stacks_of(list(widths), model)
    layers = _layers_of({path: stack for path, (stack, _) in stacks.items()}, model)
    kinds = _kinds_of({path: (stacks[path][1], layers[path], widths[path]) for path in widths}, model)
    positions = {
        path: Position(stacks[path][1], kinds[path], layers[path], widths[path], config.width(widths[path], path))
        for path in widths
    }
    if config.shared_generator:
        for stack in {position.stack for position in positions.values()}:
            sizes = sorted({(p.width, p.r) for p in positions.values() if p.stack == stack})
            if len(sizes) > 1:
                raise ValueError(
                    f"shared_generator=True makes adapters of one size per stack, and those of {stack!r} would "
                    f"have (d, r) = {', '.join(map(str, sizes))}; choose `target_modules` of one width, or False"
                )
    return positions


def _stack_of(model: nn.Module, path: str) -> str:
    """The path of the stack that a module's layer belongs to: what embeds the tokens, else the owner of the layers."""
    stack = find_stack(model, path)
    if stack is not None and stack[2]:
        return stack[0]
    parts = path.split(".")
    first = next((depth for depth, part in enumerate(parts) if part.isdigit()), 1)
    return ".".join(parts[: first - 1])


def _layers_of(stacks: dict[str, str], model: nn.Module) -> dict[str, int]:
    """The index of the layer of each path in its stack: the first number below it, or a count of blocks."""
    layers: dict[str, int] = {}
    for stack in set(stacks.values()):
        paths = [path for path, around in stacks.items() if around == stack]
        rests = {path: path[len(stack) :].strip(".").split(".") for path in paths}
        numbers = {path: next((int(part) for part in rest if part.isdigit()), None) for path, rest in rests.items()}
        # The same module of two blocks under one number: there are lists within lists (Swin's stages).
        same = Counter((number, _numberless(rests[path])) for path, number in numbers.items())
        if None in numbers.values() or max(same.values()) > 1:
            blocks = list(dict.fromkeys(block_of(model, path) or path for path in paths))
            numbers = {path: blocks.index(block_of(model, path) or path) for path in paths}
        layers.update(numbers)  # type: ignore[arg-type]
    return layers


def _kinds_of(places: dict[str, tuple[str, int, int]], model: nn.Module) -> dict[str, str]:
    """The key of the generators of each path: its kind of position, more where several of a kind stand in a layer."""
    kinds = {path: kind_of(model, path) for path in places}
    widths: dict[tuple[str, str], set[int]] = {}
    for path, (stack, _, width) in places.items():
        widths.setdefault((stack, kinds[path]), set()).add(width)
    several = {
        (place[0], kinds[path])
        for path, place in places.items()
        if sum(kinds[other] == kinds[path] and places[other][:2] == place[:2] for other in places) > 1
    }
    keys = {}
    for path, (stack, _, width) in places.items():
        key = kinds[path]
        if (stack, key) in several:
            key = "_".join((key, *_numberless(path.split("."))[-2:]))
        if len(widths[stack, kinds[path]]) > 1:
            key = f"{key}_{width}"
        keys[path] = key
    return keys


def _numberless(parts: list[str]) -> tuple[str, ...]:
    return tuple(part for part in parts if not part.isdigit())
