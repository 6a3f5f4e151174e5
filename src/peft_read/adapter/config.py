"""READConfig: which modules READ adapts, how wide it is, and which recurrence it has."""

from __future__ import annotations

import json
import re
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

from peft import PeftConfig
from peft.utils import CONFIG_NAME, PeftType

from ..files import write_whole
from ..plain import plain_flag, plain_integer, plain_integers, plain_names, plain_number
from ..recurrence import CELLS
from .card import update_model_card

__all__ = ["READConfig"]


@dataclass
class READConfig(PeftConfig):
    """The configuration of READ, the recurrent adapter of READ-PVLA (arXiv 2312.06950, equation 5).

    The output O (B, T, d) of a feed-forward block becomes O + GELU(RNN(O W_down)) W_up, with W_down d×r and W_up r×d.

    Args:
        r: the width k of the bottleneck and of the recurrence.
        cell: "rnn", "gru" or "lstm"; "none" leaves the bottleneck adapter without a recurrence.
        target_modules: names or a regular expression of the modules to adapt, or "all-linear"; the last linear layer
            of each feed-forward block of the usual architectures if absent.
        exclude_modules: names or a regular expression of modules not to adapt.
        layers_to_transform: the indices of the layers to adapt; needs a list of target modules.
        layers_pattern: the name of the module list that the indices refer to.
        modules_to_save: modules apart from the adapter that are trained and saved as a whole.
        rank_pattern: another r for the modules whose name ends with a key (a regular expression).
        cell_pattern: another cell for the modules whose name ends with a key (a regular expression). If absent, the
            model type may bring one: the decoder of `moment_detr` has no recurrence, since its queries are a set.
        dropout: the probability of dropping an entry of GELU(h), before W_up.
        use_bias: biases in W_down, the recurrence and W_up; False is equation (5) to the letter.
        bidirectional: one cell of width r/2 in each direction of time, for encoders only.
        batch_first: whether the adapted modules see (B, T, d); False for (T, B, d).
        init_weights: True makes the adapter the identity (W_up zero); False makes W_up random too. "paper" is the
            initialisation that the paper prints, W_up and the recurrence zero, through which no gradient can flow.
        pvla: the settings of the alignment loss that the adapter was trained with, if any. A record for the model
            card; the adapter itself does not use it.

    Numbers of numpy and torch become plain ones here, so that what has been made can be saved.

    Raises:
        ValueError: if a value is not one of those above.
    """

    r: int = field(default=4, metadata={"help": "The width k of the bottleneck and of the recurrence."})
    cell: str = field(default="rnn", metadata={"help": "The recurrence: 'rnn', 'gru', 'lstm', or 'none'."})
    target_modules: Optional[Union[list[str], str]] = field(  # noqa: UP007, UP045 - read by argument parsers
        default=None,
        metadata={
            "help": (
                "List of module names or regular expression of the module names to adapt, for example ['fc2'], or "
                "'all-linear'. If not specified, the last linear layer of each feed-forward block is chosen by the "
                "model's architecture; an unknown architecture is an error."
            )
        },
    )
    exclude_modules: Optional[Union[list[str], str]] = field(  # noqa: UP007, UP045
        default=None, metadata={"help": "List of module names or regular expression of the modules not to adapt."}
    )
    layers_to_transform: Optional[Union[list[int], int]] = field(  # noqa: UP007, UP045
        default=None, metadata={"help": "The index or the indices of the layers to adapt."}
    )
    layers_pattern: Optional[Union[list[str], str]] = field(  # noqa: UP007, UP045
        default=None,
        metadata={"help": "The name of the module list that `layers_to_transform` counts, often 'layers' or 'h'."},
    )
    modules_to_save: Optional[list[str]] = field(  # noqa: UP045
        default=None, metadata={"help": "Modules apart from READ's layers that are trained and saved as a whole."}
    )
    rank_pattern: Optional[dict[str, int]] = field(  # noqa: UP045
        default=None, metadata={"help": "Module name or regular expression -> a rank other than `r`."}
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout on GELU(h), before the up projection."})
    use_bias: bool = field(default=True, metadata={"help": "Biases in down projection, recurrence and up projection."})
    bidirectional: bool = field(
        default=False, metadata={"help": "One cell of width r/2 in each direction of time; encoders only."}
    )
    batch_first: bool = field(
        default=True, metadata={"help": "Whether the adapted modules see (batch, tokens, width)."}
    )
    init_weights: Union[bool, str] = field(  # noqa: UP007
        default=True,
        metadata={
            "help": (
                "True: the adapter starts as the identity. False: W_up is random too. 'paper': W_up and the "
                "recurrence are zero, as the paper prints, which cannot be trained."
            )
        },
    )
    cell_pattern: Optional[dict[str, str]] = field(  # noqa: UP045
        default=None, metadata={"help": "Module name or regular expression -> a cell other than `cell`."}
    )
    pvla: Optional[dict[str, Any]] = field(  # noqa: UP045
        default=None, metadata={"help": "A record of the alignment loss used in training, for the model card."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.READ  # type: ignore[attr-defined]
        self._check_modules()
        self._check_layers()
        self._check_numbers()
        self._check_ranks_and_cells()
        if self.pvla is not None:
            self._check_record()
        if self.init_weights == "paper" and not self.inference_mode:
            warnings.warn(
                "init_weights='paper' sets the recurrence and W_up to zero: every gradient but that of W_up's bias "
                "is exactly zero and stays so, and the adapter cannot be trained. Use init_weights=True.",
                stacklevel=3,
            )

    def _check_modules(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                _check_pattern(name, value)
            elif value is not None:
                setattr(self, name, set(plain_names(name, value)))
        if self.target_modules is not None and not self.target_modules:
            raise ValueError("`target_modules` is empty; leave it out for the modules of the model's architecture.")
        if self.modules_to_save is not None:
            self.modules_to_save = plain_names("modules_to_save", self.modules_to_save)

    def _check_layers(self) -> None:
        layers: Any = self.layers_to_transform
        if layers is not None:
            is_list = isinstance(layers, list | tuple | set | range) or getattr(layers, "ndim", 0) > 0
            plain = plain_integers if is_list else plain_integer
            self.layers_to_transform = layers = plain("layers_to_transform", layers)  # type: ignore[operator]
            if negative := [index for index in (layers if is_list else [layers]) if index < 0]:
                raise ValueError(f"`layers_to_transform` counts layers from 0, got {negative[0]}.")
        if self.layers_pattern is not None and not isinstance(self.layers_pattern, str):
            self.layers_pattern = plain_names("layers_pattern", self.layers_pattern)
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("`layers_to_transform` cannot be used when `target_modules` is a str.")
        if isinstance(self.target_modules, str) and self.layers_pattern is not None:
            raise ValueError("`layers_pattern` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")

    def _check_numbers(self) -> None:
        self.dropout = plain_number("dropout", self.dropout)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` is a probability in [0, 1), got {self.dropout}.")
        for name in ("use_bias", "bidirectional", "batch_first"):
            setattr(self, name, plain_flag(name, getattr(self, name)))
        if self.init_weights != "paper":
            try:
                self.init_weights = plain_flag("init_weights", self.init_weights)
            except ValueError as error:
                raise ValueError(f"`init_weights` is True, False or 'paper', got {self.init_weights!r}.") from error

    def _check_ranks_and_cells(self) -> None:
        for name in ("rank_pattern", "cell_pattern"):
            patterns = getattr(self, name)
            if patterns is None:
                continue
            if not isinstance(patterns, dict):
                raise ValueError(f"`{name}` maps names of modules to values, got {patterns!r}.")
            for pattern in patterns:
                _check_pattern(f"{name}[{pattern!r}]", pattern)
        self.r = _checked_rank("r", self.r)
        if self.rank_pattern is not None:
            self.rank_pattern = {k: _checked_rank(f"rank_pattern[{k!r}]", v) for k, v in self.rank_pattern.items()}
        for origin, rank in {"r": self.r, **{f"rank_pattern[{k!r}]": v for k, v in self.ranks.items()}}.items():
            if self.bidirectional and rank % 2:
                raise ValueError(f"bidirectional=True gives each direction r/2 numbers; `{origin}`={rank} is odd.")
        for origin, cell in {
            "cell": self.cell,
            **{f"cell_pattern[{k!r}]": v for k, v in (self.cell_pattern or {}).items()},
        }.items():
            if not isinstance(cell, str) or cell not in CELLS:
                raise ValueError(f"`{origin}` should be one of {', '.join(map(repr, CELLS))}, got {cell!r}.")

    def _check_record(self) -> None:
        if not isinstance(self.pvla, dict):
            raise ValueError(f"`pvla` is the record of the alignment loss, a dict, got {self.pvla!r}.")
        for key, value in self.pvla.items():
            _check_json(f"pvla[{key!r}]", value)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the configuration, whole or not at all, and READ's part of the model card beside it.

        Raises:
            ValueError: a value that JSON cannot hold, which was put in after the configuration was made.
        """
        for name, value in self.to_dict().items():
            _check_json(name, sorted(value) if isinstance(value, set) else value)
        auto_mapping = kwargs.get("auto_mapping_dict")
        with tempfile.TemporaryDirectory() as scratch:
            super().save_pretrained(scratch, **kwargs)
            saved = json.loads(Path(scratch, CONFIG_NAME).read_text())
        for name, value in self.to_dict().items():
            if isinstance(value, set):
                saved[name] = sorted(value)  # the same file every time: a set has no order
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        with write_whole(Path(save_directory) / CONFIG_NAME) as file:
            file.write(json.dumps(saved, indent=2, sort_keys=True))
        update_model_card(save_directory, self, auto_mapping)

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> Any:
        """Load the attributes of a configuration from a JSON file.

        Raises:
            ValueError: the file holds no JSON object; it is named.
        """
        try:
            loaded = super().from_json_file(path_json_file, **kwargs)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path_json_file} holds no configuration: {error}") from error
        if not isinstance(loaded, dict):
            raise ValueError(f"{path_json_file} holds no configuration but {type(loaded).__name__}")
        return loaded

    @property
    def ranks(self) -> dict[str, int]:
        """`rank_pattern`, empty where there is none."""
        return self.rank_pattern or {}


def _checked_rank(origin: str, rank: Any) -> int:
    try:
        number = plain_integer(origin, rank)
    except ValueError as error:
        raise ValueError(f"`{origin}` should be a positive integer, got {rank!r}.") from error
    if number < 1:
        raise ValueError(f"`{origin}` should be a positive integer, got {rank!r}.")
    return number


def _check_pattern(origin: str, pattern: Any) -> None:
    if not isinstance(pattern, str) or not pattern:
        raise ValueError(f"`{origin}` should be the name of a module or a regular expression, got {pattern!r}.")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"`{origin}` is no regular expression: {pattern!r}, {error}.") from error


def _check_json(origin: str, value: Any) -> None:
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{origin}` cannot be saved as JSON: {error}.") from error
