"""The cache of generation under the name that the installed transformers gives it."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import BartModel

__all__ = ["NAME", "cache_argument"]

# transformers 5.24 renamed the argument of every model.
NAME = "cache" if "cache" in inspect.signature(BartModel.forward).parameters else "past_key_values"


def cache_argument(cache: Any, past_key_values: Any) -> dict[str, Any]:
    """The cache as a keyword argument for transformers' models, whichever of its two names the caller used.

    Args:
        cache: the name since transformers 5.24.
        past_key_values: the name before.

    Raises:
        ValueError: if both are given.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("`cache` and `past_key_values` are two names of one argument; give one of them.")
    return {NAME: past_key_values if cache is None else cache}
