"""Values that come from outside, checked before they are used: numbers, tables of numbers, ids."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["array_of", "count", "id_of", "is_given", "listed", "number", "shown", "table"]

_LARGEST = 1e300  # beyond it products and sums overflow; no second, rating or rate comes near


def shown(value: object) -> str:
    """The value as it appears in a message: on one line, and cut where it is long."""
    return " ".join(reprlib.repr(value).split())


def is_given(value: Any) -> bool:
    """Whether a field holds anything: not None, and no empty list, array or tensor."""
    if value is None:
        return False
    shape = getattr(value, "shape", None)
    if shape is not None:
        return shape == () or bool(shape[0])
    return bool(len(value)) if hasattr(value, "__len__") else True


def array_of(value: Any) -> NDArray:
    """An array of a list, an array or a tensor, whatever its device and dtype, or of a list of such.

    Raises:
        ValueError: the parts have different lengths, or the value is not one of these.
    """
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        return (value.float() if value.is_floating_point() else value).numpy() if value.itemsize < 4 else value.numpy()
    if isinstance(value, list | tuple) and value:
        first = value[0]
        deepest = first[0] if isinstance(first, list | tuple) and first else first
        if hasattr(deepest, "shape"):  # numpy takes plain lists as they are, in a tenth of the time
            value = [
                array_of(part) if hasattr(part, "shape") or isinstance(part, list | tuple) else part for part in value
            ]
    try:
        return np.asarray(value)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{shown(value)} is not a table of numbers") from error


def table(
    value: Any,
    where: str,
    *,
    columns: int | None = None,
    low: float = -math.inf,
    high: float = math.inf,
    whole: bool = False,
    empty: bool = True,
) -> NDArray[np.float64]:
    """Finite numbers (rows,), or (rows, columns).

    Args:
        value: a list, an array or a tensor.
        where: what it is called and where it stands, the beginning of the message.
        columns: numbers in a row; None: one list of numbers; 0: rows of equal length, whichever.
        low: least number allowed.
        high: greatest number allowed.
        whole: only whole numbers.
        empty: whether there may be no row.

    Returns:
        float64.

    Raises:
        ValueError: anything else; the message begins with `where` and shows what was found.
    """
    kind = "whole numbers" if whole else "numbers"
    expected = f"a list of {kind}" if columns is None else f"rows of {columns or 'equally many'} {kind}"
    try:
        array = array_of(value)
    except ValueError:
        raise ValueError(f"{where} must be {expected}, not {shown(value)}") from None
    if columns is not None and array.ndim == 1 and not len(array):
        array = array.reshape(0, columns)
    right = array.ndim == (1 if columns is None else 2) and (not columns or array.shape[1] == columns)
    if not right or (array.dtype.kind not in "iuf" and array.size):
        raise ValueError(f"{where} must be {expected}, not {shown(value)}")
    if not empty and not array.size:
        raise ValueError(f"{where} must be {expected}, and is empty")
    array = array.astype(np.float64, copy=False)
    # One comparison for the usual case: NaN fails both sides.
    if array.size and not (array.min() >= low and array.max() <= high and np.isfinite(array).all()):
        bad = array[~((array >= low) & (array <= high) & np.isfinite(array))]
        raise ValueError(f"{where} holds {float(bad[0]):g}; allowed are finite {kind}{_bounds(low, high)}")
    if whole and array.size and (array != np.floor(array)).any():
        bad = array[array != np.floor(array)]
        raise ValueError(f"{where} holds {float(bad[0]):g}; allowed are {kind}{_bounds(low, high)}")
    return array


def number(
    value: Any, where: str, *, above: float | None = None, low: float = -math.inf, high: float = math.inf
) -> float:
    """One finite number.

    Args:
        value: a number, or a tensor or array of one.
        where: what it is called and where it stands, the beginning of the message.
        above: it must be greater than this.
        low: least number allowed.
        high: greatest number allowed.

    Raises:
        ValueError: anything else.
    """
    scalar = value.item() if getattr(value, "shape", None) == () else value
    bounds = f" above {above:g}" if above is not None else _bounds(low, high)
    if isinstance(scalar, bool) or not isinstance(scalar, int | float) or not -_LARGEST < scalar < _LARGEST:
        raise ValueError(f"{where} must be a finite number{bounds}, not {shown(value)}")
    if not low <= scalar <= high or (above is not None and not scalar > above):
        raise ValueError(f"{where} must be a number{bounds}, not {shown(value)}")
    return float(scalar)


def count(value: Any, where: str, *, low: int = 1) -> int:
    """A whole number that counts something.

    Args:
        value: an int, or a tensor or array of one.
        where: what it is called, the beginning of the message.
        low: least number allowed.

    Raises:
        ValueError: anything else, True and 3.0 included.
    """
    scalar = value.item() if getattr(value, "shape", None) == () else value
    if isinstance(scalar, bool) or not isinstance(scalar, int) or scalar < low:
        raise ValueError(f"{where} must be a whole number from {low} on, not {shown(value)}")
    return scalar


def id_of(value: Any, where: str) -> str:
    """An id as text: a string as it is, a whole number in decimal digits.

    Args:
        value: a string, an int, or a tensor or array of one int.
        where: what it is called and where it stands, the beginning of the message.

    Raises:
        ValueError: None, an empty string, a list, a float, a truth value.
    """
    if type(value) is str and value.strip() and "\0" not in value:
        return value
    scalar = value.item() if getattr(value, "shape", None) == () else value
    if isinstance(scalar, str) and scalar.strip() and "\0" not in scalar:
        return str(scalar)
    if isinstance(scalar, int) and not isinstance(scalar, bool):
        return str(scalar)
    raise ValueError(f"{where} must be an id, a string or a whole number, not {shown(value)}")


def listed(names: Sequence[object], limit: int = 5) -> str:
    """The first few names on one line, and dots where there are more."""
    text = ", ".join(str(name) for name in names[:limit]) + (" ..." if len(names) > limit else "")
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def _bounds(low: float, high: float) -> str:
    if math.isinf(low) and math.isinf(high):
        return ""
    if math.isinf(high):
        return f" from {low:g} on"
    return f" up to {high:g}" if math.isinf(low) else f" from {low:g} to {high:g}"
