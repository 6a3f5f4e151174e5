"""AdapterConfig: what the configurations of this package's methods check and how they are saved."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftConfig
from peft.utils import CONFIG_NAME

from ..files import write_whole
from ..plain import plain_integer, plain_integers, plain_names, plain_number
from .card import update_model_card

__all__ = ["AdapterConfig", "check_json", "check_pattern", "checked_positive"]


class AdapterConfig(PeftConfig):
    """The base of the configurations, without fields: checks, saving, and the texts of the model card.

    A configuration has the fields `target_modules`, `exclude_modules`, `layers_to_transform`, `layers_pattern`,
    `modules_to_save` and `dropout`, with peft's meaning.
    """

    target_modules: Any
    exclude_modules: Any
    layers_to_transform: Any
    layers_pattern: Any
    modules_to_save: Any
    dropout: Any

    card_title: ClassVar[str]
    card_tags: ClassVar[tuple[str, ...]]
    card_text: ClassVar[str]

    def card_facts(self) -> dict[str, str]:
        """The rows of the card's table that this method adds, between the adapted modules and their choice."""
        return {}

    def _check_modules(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                check_pattern(name, value)
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

    def _check_dropout(self) -> None:
        self.dropout = plain_number("dropout", self.dropout)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` is a probability in [0, 1), got {self.dropout}.")

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the configuration atomically, and its part of the model card beside it.

        Raises:
            ValueError: a value that JSON cannot hold, which was put in after the configuration was made.
        """
        for name, value in self.to_dict().items():
            check_json(name, sorted(value) if isinstance(value, set) else value)
        # peft records the class of the base model without a task type only, and a task does not tell the class.
        kwargs["auto_mapping_dict"] = kwargs.get("auto_mapping_dict") or getattr(self, "base_mapping", None)
        auto_mapping = kwargs["auto_mapping_dict"] or self.auto_mapping
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
            ValueError: the file does not hold a JSON object; it is named.
        """
        try:
            loaded = super().from_json_file(path_json_file, **kwargs)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path_json_file} holds no configuration: {error}") from error
        if not isinstance(loaded, dict):
            raise ValueError(f"{path_json_file} holds no configuration but {type(loaded).__name__}")
        return loaded


def checked_positive(origin: str, value: Any) -> int:
    """A positive int.

    Args:
        origin: the name of the setting, for the message.
        value: what was given.

    Raises:
        ValueError: anything else.
    """
    try:
        number = plain_integer(origin, value)
    except ValueError as error:
        raise ValueError(f"`{origin}` should be a positive integer, got {value!r}.") from error
    if number < 1:
        raise ValueError(f"`{origin}` should be a positive integer, got {value!r}.")
    return number


def check_pattern(origin: str, pattern: Any) -> None:
    """Refuse what is neither the name of a module nor a regular expression.

    Args:
        origin: the name of the setting, for the message.
        pattern: what was given.

    Raises:
        ValueError: an empty string, something else than a string, a pattern that does not compile.
    """
    if not isinstance(pattern, str) or not pattern:
        raise ValueError(f"`{origin}` should be the name of a module or a regular expression, got {pattern!r}.")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"`{origin}` is not a regular expression: {pattern!r}, {error}.") from error


def check_json(origin: str, value: Any) -> None:
    """Refuse what JSON cannot hold.

    Args:
        origin: the name of the setting, for the message.
        value: what was given.

    Raises:
        ValueError: for such a value.
    """
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{origin}` cannot be saved as JSON: {error}.") from error
