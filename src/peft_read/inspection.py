"""What a peft method would adapt in a model, told from the configurations alone: no weights are loaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from . import models

__all__ = ["AdaptedModule", "Inspection", "empty_model", "inspect_model"]

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
# What peft's methods raise where a configuration does not fit a model; this package's raise ValueError.
UNFIT = (AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError)


@dataclass(frozen=True)
class AdaptedModule:
    """One module that is adapted, or that holds what a method trains beside the adapted ones.

    Args:
        path: its path in the model.
        kind: the class of the module.
        width: the width d of its output; None where it has none.
        rank: the width of the bottleneck, or the rank, k in READ; None where the method has none.
        cell: the recurrence of READ; None for other methods.
        parameters: how many are trained there. Parameters that several modules share count where they are first met.
    """

    path: str
    kind: str
    width: int | None
    rank: int | None
    cell: str | None
    parameters: int


@dataclass(frozen=True)
class Inspection:
    """What a method would adapt in one model.

    Args:
        model: the class of the model.
        method: the name of the method in peft, such as "READ" or "LORA".
        modules: the adapted modules, in the model's order, and what else is trained.
        base_parameters: how many parameters the model has without the adapter.
        parameters: how many it has with the adapter.
    """

    model: str
    method: str
    modules: tuple[AdaptedModule, ...]
    base_parameters: int
    parameters: int

    @property
    def trained(self) -> int:
        """How many parameters are trained."""
        return sum(module.parameters for module in self.modules)

    @property
    def share(self) -> float:
        """The trained parameters as a part of all, in percent: peft's `trainable%`."""
        return 100 * self.trained / self.parameters

    def groups(self) -> list[tuple[str, list[AdaptedModule]]]:
        """Modules that differ in nothing but the numbers in their paths, with those numbers as ranges."""
        groups: dict[tuple, list[AdaptedModule]] = {}
        for module in self.modules:
            alike = (module.kind, module.width, module.rank, module.cell, module.parameters)
            groups.setdefault((NUMBER.sub("#", module.path), *alike), []).append(module)
        return [(_with_ranges(key[0], [m.path for m in group]), group) for key, group in groups.items()]

    def summary(self) -> str:
        """One line: modules, parameters, share."""
        count = len(self.modules)
        return (
            f"{self.model}: {self.method} on {count} module{'s' * (count != 1)} trains {self.trained:,} of "
            f"{self.parameters:,} parameters ({self.share:.4f} %)"
        )

    def table(self) -> str:
        """The groups as a table in Markdown; a column that is empty for this method is left out."""
        rows = [
            [path, module.kind, _text(module.width), _text(module.rank), module.cell or "", str(len(group)),
             f"{module.parameters:,}", f"{sum(m.parameters for m in group):,}"]
            for path, group in self.groups()
            for module in group[:1]
        ]  # fmt: skip
        head = ["modules", "class", "d", self._rank_letter, "cell", "count", "parameters each", "together"]
        kept = [index for index in range(len(head)) if any(row[index] for row in rows)]
        return aligned_table([head[index] for index in kept], [[row[index] for index in kept] for row in rows])

    def tree(self) -> str:
        """The groups as a tree of the model's parts."""
        root: dict[str, Any] = {}
        for path, group in self.groups():
            branch = root
            *parts, last = path.split(".")
            for part in parts:
                branch = branch.setdefault(part, {})
            label = self._label(last, group[0])
            branch[label if len(group) == 1 else f"{label}, {len(group)} times"] = {}
        return "\n".join([self.model, *_branches(root, "")])

    def _label(self, name: str, module: AdaptedModule) -> str:
        sizes = (("d", module.width), (self._rank_letter, module.rank))
        told = [f"{letter}={size:,}" for letter, size in sizes if size is not None]
        told += [module.cell] if module.cell else []
        return "  ".join([name, *told, f"{module.parameters:,} parameters"])

    @property
    def _rank_letter(self) -> str:
        return "k" if self.method == "READ" else "r"


def _text(size: int | None) -> str:
    return "" if size is None else f"{size:,}"


def _with_ranges(pattern: str, paths: Sequence[str]) -> str:
    """A path in which every # is the range of the numbers that stand there."""
    columns = zip(*(map(int, NUMBER.findall(path)) for path in paths), strict=True)
    ranges = iter([_as_ranges(sorted(set(column))) for column in columns])
    return re.sub("#", lambda _: next(ranges), pattern)


def _as_ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _branches(branch: dict[str, Any], indent: str) -> list[str]:
    lines = []
    for index, (name, below) in enumerate(branch.items()):
        is_last = index == len(branch) - 1
        lines.append(f"{indent}{'└── ' if is_last else '├── '}{name}")
        lines += _branches(below, indent + ("    " if is_last else "│   "))
    return lines


def aligned_table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown whose columns are aligned in plain text too."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |" for line in lines
    )


def empty_model(name: str, **options: Any) -> PreTrainedModel:
    """A model on the meta device, built from its configuration: it has shapes and no weights.

    Args:
        name: a folder with a `config.json`, or a model of the Hub, of which the configuration alone is downloaded.
        **options: of `AutoConfig.from_pretrained`, such as `revision`.

    Raises:
        OSError: there is no such model, or the Hub cannot be reached.
        ValueError: there is no such folder, it has no `config.json`, or the configuration is not one of transformers'
            or of this project's.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            adapter = (folder / "adapter_config.json").is_file()
            raise ValueError(
                f"{name} holds no model, it has no config.json"
                + ("; it holds an adapter: peft-read inspect --adapter, or its base model" if adapter else "")
            )
    elif not HUB_NAME.fullmatch(name):
        raise ValueError(f"there is no such folder: {name}")
    try:
        config = AutoConfig.from_pretrained(str(folder) if folder.is_dir() else name, **options)
    except OSError as error:
        if folder.is_dir():
            raise
        raise OSError(f"there is no folder {name}, and no model of that name came from the Hub: {error}") from error
    cls = _class_of(name, config)
    with torch.device("meta"):
        return cls._from_config(config) if cls is not AutoModel else AutoModel.from_config(config)


def _class_of(name: str, config: PretrainedConfig) -> Any:
    architectures = config.architectures or []
    if not architectures:
        return AutoModel
    cls = getattr(transformers, architectures[0], None) or getattr(models, architectures[0], None)
    if cls is None:
        raise ValueError(
            f"{name} is a {architectures[0]}, which is not a class of transformers {transformers.__version__}: models "
            "with code of their own are built with from_pretrained(..., trust_remote_code=True) and inspected with "
            "inspect_model"
        )
    return cls


def inspect_model(model: str | nn.Module, config: PeftConfig) -> Inspection:
    """What a method with this configuration adapts in a model.

    Args:
        model: a folder or a name on the Hub, see `empty_model`; or a model, **which is adapted by this call**.
        config: the configuration of READ, or of any other method of peft.

    Raises:
        OSError, ValueError: those of `empty_model`; the method does not fit the model, or adapts nothing in it.

    Example:
        >>> from peft_read import READConfig
        >>> from transformers import BartConfig, BartModel
        >>> base = BartModel(BartConfig(d_model=16, encoder_layers=1, decoder_layers=1, vocab_size=50))
        >>> inspect_model(base, READConfig(r=4)).trained
        376
    """
    model = empty_model(model) if isinstance(model, str) else model
    base_parameters = sum(parameter.numel() for parameter in model.parameters())
    kind, method = type(model).__name__, str(getattr(config.peft_type, "value", config.peft_type))
    if config.is_prompt_learning and config.task_type is None:
        raise ValueError(f"{method} puts its vectors before a model's text and needs a task_type, such as CAUSAL_LM")
    try:
        # A model with weights is used afterwards, and needs an adapter that has them too.
        empty = any(parameter.is_meta for parameter in model.parameters())
        adapted: Any = get_peft_model(model, config, low_cpu_mem_usage=empty)  # type: ignore[arg-type]
    except UNFIT as error:
        raise ValueError(f"{method} does not fit {kind}: {error or type(error).__name__}") from error
    modules = _trained_modules(adapted)
    return Inspection(kind, method, modules, base_parameters, sum(p.numel() for p in adapted.parameters()))


def _trained_modules(adapted: Any) -> tuple[AdaptedModule, ...]:
    """The layers of the method, and the other modules that hold trained parameters, such as a prompt."""
    counted: set[int] = set()

    def newly_counted(parameters: Any) -> int:
        trained = {id(p): p.numel() for p in parameters if p.requires_grad and id(p) not in counted}
        counted.update(trained)
        return sum(trained.values())

    # Under the names of the model before it was adapted; what stands beside that model, under peft's.
    base = adapted.get_base_model()
    inside = {id(module): name for name, module in base.named_modules()}
    named = [(inside.get(id(module), name), module) for name, module in adapted.named_modules()]
    layers: list[Any] = [module for _, module in named if isinstance(module, BaseTunerLayer)]
    # What layers share is a tuner layer around nothing; it is counted there, not in the first layer that refers to it.
    parameters = {id(layer): newly_counted(layer.parameters()) for layer in sorted(layers, key=_wraps)}
    modules = []
    for name, module in named:
        if id(module) in parameters:
            modules.append(_adapted_module(name, module, parameters[id(module)]))
        elif others := newly_counted(module.parameters(recurse=False)):
            modules.append(AdaptedModule(name, type(module).__name__, None, None, None, others))
    return tuple(modules)


def _wraps(layer: Any) -> bool:
    return layer.get_base_layer() is not layer


def _adapted_module(path: str, layer: Any, parameters: int) -> AdaptedModule:
    rank, cell = (getattr(layer, name, {}) for name in ("r", "cell_name"))
    return AdaptedModule(
        path=path,
        kind=type(layer.get_base_layer()).__name__,
        width=getattr(layer, "out_features", None),
        rank=rank.get("default") if isinstance(rank, dict) else None,
        cell=cell.get("default") if isinstance(cell, dict) else None,
        parameters=parameters,
    )
