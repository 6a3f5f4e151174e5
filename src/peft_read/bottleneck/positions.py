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
    candidates: dict[str, list[str]] = {}
    for path, (stack, _, width) in places.items():
        kind = kinds[path]
        end = f"_{width}" if len(widths[stack, kind]) > 1 else ""
        names = _names_within(model, path) if (stack, kind) in several else [()]
        candidates[path] = ["_".join((kind, *name)) + end for name in names]
    return _unique_in_their_layers(candidates, {path: place[:2] for path, place in places.items()})


def _names_within(model: nn.Module, path: str) -> list[tuple[str, ...]]:
    """What may tell a path from others of its layer: its last two names, more of them, all below the block."""
    names = _numberless(path.split("."))
    block = block_of(model, path)
    below = path if block is None else path[len(block) + 1 :]
    return [*(names[-count:] for count in range(2, max(len(names), 2) + 1)), tuple(below.split("."))]


def _unique_in_their_layers(candidates: dict[str, list[str]], layers: dict[str, tuple[str, int]]) -> dict[str, str]:
    """The first key of each path, or the first later one that no other path of its layer has.

    Paths of a stack that have a key in common change it together, since those of one place in all layers share it.

    Args:
        candidates: the keys of each path, in order.
        layers: the stack and the layer of each.
    """
    chosen = dict.fromkeys(candidates, 0)
    while True:
        keys = {path: candidates[path][count] for path, count in chosen.items()}
        counts = Counter((*layers[path], key) for path, key in keys.items())
        shared = {(stack, key) for (stack, _, key), count in counts.items() if count > 1}
        longer = [path for path, key in keys.items()
                  if (layers[path][0], key) in shared and chosen[path] + 1 < len(candidates[path])]  # fmt: skip
        if not longer:
            return keys
        for path in longer:
            chosen[path] += 1


def _numberless(parts: list[str]) -> tuple[str, ...]:
    return tuple(part for part in parts if not part.isdigit())
