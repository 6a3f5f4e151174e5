"""BART's pretraining: spans of a text become a mask each, and the model writes the text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MASK_RATIO, MEAN_SPAN = 0.3, 3.0  # Lewis et al., 2020, section 4.1


def infill(words: Sequence[str], rng: np.random.Generator) -> str:
    """The words with spans of Poisson length replaced by one <mask> each, about 30 % of the words in all."""
    words = list(words)
    to_mask = round(MASK_RATIO * len(words))
    while to_mask > 0:
        length = min(int(rng.poisson(MEAN_SPAN)), to_mask, len(words))
        start = int(rng.integers(0, len(words) - length + 1))
        words[start : start + length] = ["<mask>"]
        to_mask -= max(1, length)
    return " ".join(words)
