"""Fields of the records of QVHighlights: those of one query, and those of all as one array."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..values import array_of

__all__ = ["CHUNK", "Record", "Records", "concatenated", "field", "joined"]

Record = Mapping[str, Any]
Records = Mapping[Hashable, Record]

CHUNK = 512  # queries computed at a time: tables of a few megabytes, which stay in a processor's cache


def field(qid: Hashable, record: Record, name: str) -> Any:
    """A field of the ground truth of one query.

    Raises:
        ValueError: it is absent.
    """
    if record.get(name) is None:
        raise ValueError(f"query {qid!r} has no {name} in the ground truth")
    return record[name]


def joined(values: Mapping[Hashable, Any], columns: int | None) -> tuple[NDArray[np.float64], NDArray] | None:
    """The rows of all queries, concatenated, and the number of each; None if they are not finite numbers.

    One conversion for all queries is ten times as fast as one per query. None is no error yet: some values, such as
    lists of tensors in bfloat16, have to be converted one by one.
    """
    plain = [array_of(value) if hasattr(value, "detach") else value for value in values.values()]
    try:
        counts = np.array([len(value) for value in plain], dtype=np.int64)
        rows = np.asarray(list(chain.from_iterable(plain)))
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
    if not len(rows):
        rows = np.zeros((0, columns) if columns else 0)
    expected = (counts.sum(), columns) if columns else (counts.sum(),)
    if rows.dtype.kind not in "iuf" or rows.shape != expected or not np.isfinite(rows).all():
        return None
    return rows.astype(np.float64), counts


def concatenated(tables: Sequence[NDArray[np.float64]]) -> tuple[NDArray[np.float64], NDArray]:
    """As `joined`, of tables that were checked one by one."""
    return np.concatenate(tables), np.array([len(rows) for rows in tables], dtype=np.int64)
