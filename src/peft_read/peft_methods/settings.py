"""The configuration of a peft method from its name and settings written as text, or from a saved adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME

__all__ = ["method_config", "method_fields", "read_settings", "saved_config"]

# What peft itself writes into a configuration.
BOOKKEEPING = {field.name for field in dataclasses.fields(PeftConfig)} - {"task_type"}


def method_fields(method: str) -> set[str]:
    """The names of the settings of a method.

    Args:
        method: its name in peft, in capitals or not.

    Raises:
        ValueError: peft has no such method.
    """
    fields = {field.name for field in dataclasses.fields(_config_class(method)) if field.init}
    return fields - BOOKKEEPING


def method_config(method: str, settings: dict[str, Any]) -> PeftConfig:
    """The configuration of a method.

    Args:
        method: its name in peft, in capitals or not.
        settings: values by the names of the configuration's fields.

    Raises:
        ValueError: peft has no such method, the method no such setting, or a value is not allowed.
    """
    known = method_fields(method)
    if unknown := sorted(set(settings) - known):
        raise ValueError(
            f"{method.upper()} has no setting {', '.join(map(repr, unknown))}; it has {', '.join(sorted(known))}"
        )
    try:
        return _config_class(method)(**settings)
    except (TypeError, AttributeError) as error:  # of configurations that do not check their values
        raise ValueError(f"{method.upper()} does not take these settings: {error}") from error


def read_settings(texts: Sequence[str]) -> dict[str, Any]:
    """Settings that are written NAME=VALUE, each value as in YAML.

    Raises:
        ValueError: a text is not of this form, or names a setting again.

    Example:
        >>> read_settings(["reduction_factor=4", "tasks=[vqa, gqa]", "share=down"])
        {'reduction_factor': 4, 'tasks': ['vqa', 'gqa'], 'share': 'down'}
    """
    settings: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"{text!r} is not a setting; write NAME=VALUE, such as r=8 or tasks=[vqa,gqa]")
        if name in settings:
            raise ValueError(f"the setting {name!r} is given twice")
        try:
            settings[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"the value of {text!r} cannot be read: {' '.join(str(error).split())}") from error
    return settings


def saved_config(folder: Path) -> PeftConfig:
    """The configuration of a saved adapter of any method, set to be trained.

    Raises:
        ValueError: there is no such folder, it holds no adapter, or one of a method that peft does not know; the file
            is damaged, or holds a value that the method does not take.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no such folder: {folder}")
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(f"{folder} holds no adapter: there is no {CONFIG_NAME} in it")
    try:
        config: PeftConfig = PeftConfig.from_pretrained(str(folder))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG_NAME} has a peft_type that is not known here: {error!r}") from error
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{folder / CONFIG_NAME} is no configuration of an adapter: {error}") from error
    config.inference_mode = False
    return config


def _config_class(method: str) -> Any:
    classes = {str(getattr(name, "value", name)): cls for name, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if method.upper() not in classes:
        raise ValueError(f"peft has no method {method!r}; it has {', '.join(sorted(classes)).lower()}")
    return classes[method.upper()]
