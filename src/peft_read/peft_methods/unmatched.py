"""What a user is told whose `target_modules` or `layers_to_transform` match nothing in the model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..names import near_names, own_names, without_numbers
from .default_targets import linear_layers

__all__ = ["absent_names", "check_layers", "nothing_matched"]


def check_layers(model: nn.Module, config: Any) -> None:
    """Refuse layers that the model does not have.

    Layers without a target module are no error: not every layer of a mixture of experts has a dense block.

    Args:
        model: the model.
        config: a configuration whose `target_modules` are those to be adapted in all layers.

    Raises:
        ValueError: `layers_to_transform` has an index beyond the last layer, or `layers_pattern` names no list of
            layers around the modules.
    """
    targets, patterns = config.target_modules, _patterns(config)
    if config.layers_to_transform is None or isinstance(targets, str):
        return
    kind = type(model).__name__
    stacks = _stacks(model, targets or (), patterns)
    if not stacks:
        if patterns and _matching(model, targets or ()):
            lists = {stack.rpartition(".")[2]: None for stack in _stacks(model, targets, [])}
            found = ", ".join(map(repr, lists)) or "none"
            raise ValueError(
                f"`layers_pattern`={config.layers_pattern!r} is not the name of a list of layers around the target "
                f"modules of {kind}; the lists there are {found}"
            )
        return
    beyond = [index for index in _indices(config) if index >= max(stacks.values())]
    if beyond:
        counts = " and ".join(f"{count} layers ({_range(count)}) in {stack!r}" for stack, count in stacks.items())
        raise ValueError(
            f"`layers_to_transform`={config.layers_to_transform} names {_layers(beyond)}, and {kind} has {counts}. "
            "Choose among those, or leave `layers_to_transform` out to adapt every layer"
        )


def absent_names(model: nn.Module, targets: Any) -> list[str]:
    """The names in a list of target modules that no module of a model has.

    Args:
        model: the model.
        targets: `target_modules`; a regular expression has no names.
    """
    if targets is None or isinstance(targets, str):
        return []
    names = own_names(model)
    return sorted(t for t in targets if not any(name == t or name.endswith(f".{t}") for name in names))


def nothing_matched(model: nn.Module, config: Any, words: Sequence[str]) -> str | None:
    """Why a configuration adapts nothing in a model, and what would adapt something.

    Args:
        model: the model.
        config: the configuration.
        words: what `target_modules` may be beside names, such as "all-linear".

    Returns:
        The message; None where the names are there, and something else leaves them out.
    """
    targets, kind = config.target_modules, type(model).__name__
    if isinstance(targets, str):
        if any(re.fullmatch(targets, name) for name in own_names(model)):
            return None
        wanted = [targets]
        text = (
            f"`target_modules`={targets!r} is a string, so a regular expression that the whole name of a module must "
            f"match, and no module of {kind} does. "
        )
        if _matching(model, [targets]):
            return f"{text}A list stands for the modules whose names end so: target_modules=[{targets!r}]"
    elif not targets and config.layers_to_transform is None:
        return f"`target_modules` is 'all-linear', and {kind} has no linear layer beside its output layer"
    elif not targets:
        chosen = _layers(_indices(config))
        return f"`layers_to_transform` names {chosen}, where {kind} has no module that {config.peft_type.value} adapts"
    elif _matching(model, targets):
        return _outside_of_layers(model, config)
    else:
        wanted = sorted(targets)
        text = (
            f"`target_modules` names {', '.join(map(repr, wanted))}, and {kind} has no such module: a name in a list "
            "is the whole name of a module, or what it ends with after a dot. "
        )
        if inside := sorted(set(targets) & set(words)):
            return f"{text}As a string, {inside[0]!r} chooses a part of the model: target_modules={inside[0]!r}"
    near = _near(model, wanted, words)
    linear = f"Its linear layers are {linear_layers(model)}. "
    return (
        f"{text}{f'Near names: {near}. ' if near else linear}Without `target_modules` the modules are found by the "
        f"model's structure; the words {', '.join(map(repr, words))} choose among those"
    )


def _outside_of_layers(model: nn.Module, config: Any) -> str | None:
    """Why none of the modules is in the layers of a configuration; None if it names no layers."""
    if config.layers_to_transform is None:
        return None
    text = f"`layers_to_transform` names {_layers(_indices(config))}, and none of the target modules lies there"
    outermost = [stack for stack in _stacks(model, config.target_modules, []) if "." not in stack]
    if outermost and not config.layers_pattern:
        name = outermost[0]
        return f"{text}; a list of layers that is in no other module needs its name, layers_pattern={name!r}"
    return text


def _matching(model: nn.Module, targets: Any) -> list[str]:
    """The modules that a list of names selects, by peft's rule."""
    endings = tuple(f".{target}" for target in targets)
    return [name for name in own_names(model) if name in targets or name.endswith(endings)]


def _stacks(model: nn.Module, targets: Any, patterns: list[str]) -> dict[str, int]:
    """The lists of layers around the target modules, with their lengths."""
    around = re.compile(rf"(?:^|.*?\.)(?:{'|'.join(patterns) or '[^.]+'})(?=\.\d+(\.|$))")
    paths = [match[0] for name in _matching(model, targets) if (match := around.match(name))]
    modules = dict(model.named_modules())
    return {path: len(list(modules[path].children())) for path in dict.fromkeys(paths)}


def _patterns(config: Any) -> list[str]:
    patterns = config.layers_pattern or []
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _indices(config: Any) -> list[int]:
    indices = config.layers_to_transform
    return [indices] if isinstance(indices, int) else list(indices or ())


def _layers(indices: list[int]) -> str:
    return f"the layer{'s' * (len(indices) != 1)} {', '.join(map(str, indices))}"


def _range(count: int) -> str:
    return "0" if count == 1 else f"0 to {count - 1}"


def _near(model: nn.Module, wanted: list[str], words: Sequence[str]) -> str:
    """Parts of module names, and words, that are spelt like parts of the wanted names that no module has."""
    names = own_names(model)
    parts = {part for name in names for part in name.split(".") if not part.isdigit()}
    # The parts of a regular expression are what is left of it without its own signs, such as \. and \d.
    spelt = [part for text in wanted for part in re.findall(r"[^\W\d][\w-]*", re.sub(r"\\\W|\\\w", " ", text))]
    near = near_names([part for part in spelt if part not in parts], [*sorted(parts), *words])
    if not near and spelt:  # every part exists, in another place
        near = without_numbers(name for name in names if name.rpartition(".")[2] == spelt[-1])[:3]
    return ", ".join(map(repr, near))
