"""Plain Python values out of settings: numbers of numpy and torch are converted, all else is refused by name."""

import math
import operator
from collections.abc import Sequence
from typing import Any

__all__ = ["plain_flag", "plain_integer", "plain_integers", "plain_names", "plain_number"]


def plain_number(name: str, value: Any) -> float:
    """A finite float; a numpy number or a tensor of one number counts, a truth value or a string does not.

    Args:
        name: of the setting, for the message.
        value: what was given.

    Raises:
        ValueError: anything else, NaN and infinity included.
    """
    value = _item(value)
    if isinstance(value, bool | str | bytes | complex) or not hasattr(value, "__float__") or _is_array(value):
        raise ValueError(f"{name}={value!r} is not a number")
    try:
        number = float(value)
    except OverflowError as error:
        raise ValueError(f"{name} is too large for a number") from error
    if not math.isfinite(number):
        raise ValueError(f"{name}={number} is not finite")
    return number


def plain_integer(name: str, value: Any) -> int:
    """An int; a numpy integer or a tensor of one integer counts, a truth value, a float or a string does not.

    Args:
        name: of the setting, for the message.
        value: what was given.

    Raises:
        ValueError: anything else.
    """
    value = _item(value)
    if isinstance(value, bool) or not hasattr(value, "__index__") or _is_array(value):
        raise ValueError(f"{name}={value!r} is not an integer")
    return operator.index(value)


def plain_flag(name: str, value: Any) -> bool:
    """A bool; numpy's and torch's count, 0, 1 and strings such as "no" do not.

    Args:
        name: of the setting, for the message.
        value: what was given.

    Raises:
        ValueError: anything else.
    """
    plain = _item(value)
    if not isinstance(plain, bool):
        raise ValueError(f"{name}={value!r} is neither True nor False")
    return plain


def plain_integers(name: str, value: Any) -> list[int]:
    """A list of int from a list, tuple, set, range, array or tensor of integers; sets are sorted.

    Args:
        name: of the setting, for the message.
        value: what was given.

    Raises:
        ValueError: anything else, or an entry that is not an integer.
    """
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, set | frozenset):
        value = sorted(value)
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise ValueError(f"{name}={value!r} is not a sequence of integers")
    return [plain_integer(f"{name}[{place}]", entry) for place, entry in enumerate(value)]


def plain_names(name: str, value: Any) -> list[str]:
    """A list of strings that are not empty, from a list, tuple or set of them; sets are sorted.

    Args:
        name: of the setting, for the message.
        value: what was given.

    Raises:
        ValueError: anything else; a single string is not a list of names.
    """
    if isinstance(value, str) or not isinstance(value, list | tuple | set | frozenset):
        raise ValueError(f"{name}={value!r} is not a list of names")
    for entry in value:
        if not isinstance(entry, str) or not entry:
            raise ValueError(f"{name} contains {entry!r}, which is not a name")
    return sorted(value) if isinstance(value, set | frozenset) else list(value)


def _item(value: Any) -> Any:
    """The Python value of a numpy or torch scalar, everything else as it is."""
    if hasattr(value, "item") and hasattr(value, "dtype") and getattr(value, "ndim", 1) == 0:
        return value.item()
    return value


def _is_array(value: Any) -> bool:
    return bool(getattr(value, "ndim", 0))
