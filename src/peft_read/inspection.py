"""What READ would adapt in a model, told from the model's configuration alone: no weights are downloaded or loaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from . import models
from .adapter import READConfig
from .adapter.layer import Linear

__all__ = ["AdaptedModule", "Inspection", "empty_model", "inspect_model"]

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class AdaptedModule:
    """One module that READ adapts.

    Args:
        path: its path in the model.
        kind: the class of the module.
        width: the width d of its output.
        rank: the width k of the bottleneck.
        cell: the recurrence.
        parameters: how many READ trains there.
    """

    path: str
    kind: str
    width: int
    rank: int
    cell: str
    parameters: int


@dataclass(frozen=True)
class Inspection:
    """What READ would adapt in one model.

    Args:
        model: the class of the model.
        modules: the adapted modules, in the model's order.
        base_parameters: how many parameters the model has without READ.
    """

    model: str
    modules: tuple[AdaptedModule, ...]
    base_parameters: int

    @property
    def trained(self) -> int:
        """How many parameters READ trains."""
        return sum(module.parameters for module in self.modules)

    @property
    def share(self) -> float:
        """The trained parameters as a part of all, in percent: peft's `trainable%`."""
        return 100 * self.trained / (self.base_parameters + self.trained)

    def groups(self) -> list[tuple[str, list[AdaptedModule]]]:
        """Modules that differ in nothing but the numbers in their paths, with those numbers as ranges."""
        found: dict[tuple, list[AdaptedModule]] = {}
        for module in self.modules:
            key = (NUMBER.sub("#", module.path), module.kind, module.width, module.rank, module.cell)
            found.setdefault(key, []).append(module)
        return [(_with_ranges(key[0], [m.path for m in group]), group) for key, group in found.items()]

    def summary(self) -> str:
        """One line: modules, parameters, share."""
        return (
            f"{self.model}: READ on {len(self.modules)} modules trains {self.trained:,} of "
            f"{self.base_parameters + self.trained:,} parameters ({self.share:.4f} %)"
        )

    def table(self) -> str:
        """The groups as a table in Markdown."""
        rows = [
            [path, module.kind, f"{module.width:,}", str(module.rank), module.cell, str(len(group)),
             f"{module.parameters:,}", f"{sum(m.parameters for m in group):,}"]
            for path, group in self.groups()
            for module in group[:1]
        ]  # fmt: skip
        return aligned_table(["modules", "class", "d", "k", "cell", "count", "parameters each", "together"], rows)

    def tree(self) -> str:
        """The groups as a tree of the model's parts."""
        root: dict[str, Any] = {}
        for path, group in self.groups():
            branch = root
            *parts, last = path.split(".")
            for part in parts:
                branch = branch.setdefault(part, {})
            module = group[0]
            label = f"{last}  d={module.width:,}  k={module.rank}  {module.cell}  {module.parameters:,} parameters"
            branch[label if len(group) == 1 else f"{label}, {len(group)} times"] = {}
        return "\n".join([self.model, *_branches(root, "")])


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
        OSError: there is no such folder or model, or the Hub cannot be reached.
        ValueError: the configuration is none of transformers' or of this project's.
    """
    if name.startswith(("/", "./", "../", "~")) and not Path(name).expanduser().is_dir():
        raise ValueError(f"there is no such folder: {name}")  # else the Hub would call it a bad name of a model
    config = AutoConfig.from_pretrained(name, **options)
    cls = _class_of(name, config)
    with torch.device("meta"):
        return cls._from_config(config) if cls is not AutoModel else AutoModel.from_config(config)


def _class_of(name: str, config: PretrainedConfig) -> Any:
    architectures = config.architectures or []
    if not architectures:
        return AutoModel
    found = getattr(transformers, architectures[0], None) or getattr(models, architectures[0], None)
    if found is None:
        raise ValueError(
            f"{name} is a {architectures[0]}, which is no class of transformers {transformers.__version__}: models "
            "with code of their own are built with from_pretrained(..., trust_remote_code=True) and inspected with "
            "inspect_model"
        )
    return found


def inspect_model(model: str | nn.Module, config: READConfig) -> Inspection:
    """What READ with this configuration adapts in a model.

    Args:
        model: a folder or a name on the Hub, see `empty_model`; or a model, **which is adapted by this call**.
        config: the configuration of READ.

    Raises:
        OSError, ValueError: those of `empty_model`; READ finds nothing to adapt.

    Example:
        >>> from transformers import BartConfig, BartModel
        >>> base = BartModel(BartConfig(d_model=16, encoder_layers=1, decoder_layers=1, vocab_size=50))
        >>> inspect_model(base, READConfig(r=4)).trained
        376
    """
    model = empty_model(model) if isinstance(model, str) else model
    base_parameters = sum(parameter.numel() for parameter in model.parameters())
    kind = type(model).__name__
    adapted: Any = get_peft_model(model, config, low_cpu_mem_usage=True)  # type: ignore[arg-type]
    modules = tuple(
        AdaptedModule(
            path=name,
            kind=type(layer.get_base_layer()).__name__,
            width=layer.out_features,
            rank=layer.r["default"],
            cell=layer.cell_name["default"],
            parameters=sum(p.numel() for p in layer.parameters() if p.requires_grad),
        )
        for name, layer in adapted.get_base_model().named_modules()
        if isinstance(layer, Linear)
    )
    return Inspection(kind, modules, base_parameters)
