"""Add a member to a str enumeration that another package owns; this file needs only the standard library."""

from __future__ import annotations

from enum import Enum
from typing import Any

__all__ = ["extend_str_enum"]


def extend_str_enum(enumeration: type[Enum], name: str, value: str) -> Enum:
    """Give a `class E(str, Enum)` one more member, which behaves like the members of its definition.

    The enum module offers no way to do this, so its own tables are filled here. CPython 3.10 to 3.13 were tested;
    `tests/test_adapter_registration.py` tests the result.

    Args:
        enumeration: a subclass of str and Enum.
        name: the new member's name.
        value: the new member's value.

    Returns:
        The member; the one that exists already if name and value are the same.

    Raises:
        ValueError: if the name belongs to something else, or the value to another member.
    """
    tables: Any = enumeration
    if name in tables._member_map_:
        member = tables._member_map_[name]
        if member.value != value:
            raise ValueError(f"{enumeration.__name__}.{name} exists already with the value {member.value!r}.")
        return member
    if hasattr(enumeration, name):
        raise ValueError(f"{enumeration.__name__}.{name} exists already and is not a member of the enumeration.")
    if value in tables._value2member_map_:
        raise ValueError(f"{value!r} is already a value of {tables._value2member_map_[value]}.")

    member = str.__new__(tables, value)
    member._name_ = name
    member._value_ = value
    member.__objclass__ = enumeration
    member._sort_order_ = len(tables._member_names_)
    # The class attribute comes first: EnumType refuses to set a name that is in the member map already.
    type.__setattr__(enumeration, name, member)
    tables._member_map_[name] = member
    tables._member_names_.append(name)
    tables._value2member_map_[value] = member
    hashable = getattr(tables, "_hashable_values_", None)  # newer patch releases of 3.12 and later keep this list
    if hashable is not None:
        hashable.append(value)
    return member
