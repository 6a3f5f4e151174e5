"""Registering READ with peft: the only file that touches peft's enumeration and tables."""

from __future__ import annotations

from typing import Any

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method

from .enum_extension import extend_str_enum

TABLES: tuple[dict[Any, Any], dict[Any, Any]] = (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING)

__all__ = ["PREFIX", "add_peft_type", "register"]

# Parameters, files and tables know READ by this prefix. The plain "read_" would match inside names such as
# "thread_ff", and peft tests for prefixes with `in`.
PREFIX = "readapter_"


def _claimed_by_someone_else(owner: object) -> ImportError:
    return ImportError(
        f"peft {peft.__version__} already has a READ method ({owner!r}), which is not this package's. Adapters saved "
        "by one cannot be read by the other; install a version of peft-read made for this peft, or a peft without it."
    )


def add_peft_type() -> None:
    """Make `PeftType.READ` exist.

    Raises:
        ImportError: if peft has a READ of its own.
    """
    existing = getattr(PeftType, "READ", None)
    if existing is not None and getattr(existing, "added_by", None) != __package__:
        raise _claimed_by_someone_else(TABLES[0].get("READ", existing))
    try:
        member: Any = extend_str_enum(PeftType, "READ", "READ")
    except ValueError as error:
        raise _claimed_by_someone_else(error) from error
    member.added_by = __package__


def register(config_cls: type, model_cls: type) -> None:
    """Enter the two classes in peft's tables; a reloaded module replaces what it had entered before.

    Raises:
        ImportError: if another package has registered a READ.
    """
    owner = TABLES[0].get("READ")
    if owner is None:
        register_peft_method(name="read", config_cls=config_cls, model_cls=model_cls, prefix=PREFIX)
        return
    if owner.__module__ != config_cls.__module__:
        raise _claimed_by_someone_else(owner)
    for table, cls in zip(TABLES, (config_cls, model_cls), strict=True):
        table[PeftType.READ] = cls  # type: ignore[attr-defined]
