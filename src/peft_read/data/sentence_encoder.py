"""SentenceEncoder: token features of queries and sentence features of captions, in one space."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..values import array_of, count, listed, shown
from .features import read_arrays

__all__ = ["SentenceEncoder"]

logger = logging.getLogger(__name__)

# Version of the computation in `tokens`; raised whenever its results change for the same inputs.
VERSION = 1


class SentenceEncoder:
    """A frozen sentence encoder with mean pooling (MiniLM, MPNet, ...), optionally with a linear projection.

    A sentence vector is the mean of the token states, special tokens included, at unit length. Token vectors are
    divided by the length of their mean, so that the mean of a query's tokens IS its sentence vector, also after the
    projection x -> (x - mean) components', which is affine.

    Args:
        name_or_path: folder or Hub name of the encoder, such as `"sentence-transformers/all-MiniLM-L6-v2"`.
        projection: `.npz` file with `mean` (width,) and `components` (projected width, width); None = no projection.
        max_tokens: tokens kept of a text, special tokens included.
        device: where the encoder runs.

    Raises:
        FileNotFoundError: no projection file.
        ValueError: a projection that cannot be read, without its arrays, with arrays that do not fit each other or are
            not finite, or of another width than the encoder's; `max_tokens` is not positive.

    Example:
        ```python
        encoder = SentenceEncoder("sentence-transformers/all-MiniLM-L6-v2", projection="pca.npz")
        encoder.tokens(["a dog runs"])["a dog runs"].shape  # (5, 128)
        ```
    """

    def __init__(
        self,
        name_or_path: str | Path,
        *,
        projection: str | Path | None = None,
        max_tokens: int = 32,
        device: str | torch.device = "cpu",
    ) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(name_or_path)
        self.model: Any = AutoModel.from_pretrained(name_or_path).to(device).eval()
        self.max_tokens, self.device = count(max_tokens, "max_tokens"), device
        self.projection = None if projection is None else _read_projection(Path(projection))
        width = self.model.config.hidden_size
        if self.projection is not None and self.projection[1].shape[1] != width:
            raise ValueError(f"{projection} projects {self.projection[1].shape[1]} numbers, the encoder gives {width}")

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything that `tokens` depends on beside the text; use it as the key of a cache.

        It covers the encoder's weights and tokenizer, the projection's contents, `max_tokens`, and the version of
        this class.
        """
        digest = hashlib.sha256(f"{VERSION} {self.max_tokens}".encode())
        tokenizer = getattr(self.tokenizer, "backend_tokenizer", None)
        told = tokenizer.to_str() if tokenizer is not None else repr(sorted(self.tokenizer.get_vocab().items()))
        digest.update(told.encode("utf-8", "surrogatepass"))
        if self.tokenizer.padding_side != "right":  # version 1 took the states of padding there
            digest.update(b"padding before the text")
        for name, weight in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(array_of(weight)).tobytes())
        for part in self.projection or ():
            digest.update(repr(part.shape).encode())
            digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()

    def tokens(self, texts: Iterable[str], *, batch_size: int = 64) -> dict[str, NDArray]:
        """Token features by text: each (T, width) float32.

        A text of more than `max_tokens` tokens is cut, and the log says which.

        Raises:
            ValueError: an entry that is not a non-empty string, or a single string in place of a list.
        """
        if isinstance(texts, str):
            raise ValueError(f"a list of strings is expected, not the string {shown(texts)}")
        unique = list(dict.fromkeys(texts))
        count(batch_size, "batch_size")
        for text in unique:
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"texts to encode must be non-empty strings, not {shown(text)}")
        if cut := [text for text in unique if len(self.tokenizer(text, verbose=False)["input_ids"]) > self.max_tokens]:
            logger.warning(
                "%d of %d texts have more than max_tokens=%d tokens and were cut: %s",
                *(len(cut), len(unique), self.max_tokens, listed([shown(text) for text in cut])),
            )
        encoded: dict[str, NDArray] = {}
        # Texts of similar length together: less padding to compute.
        order = sorted(unique, key=len)
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            for text, states in zip(part, self._states(part), strict=True):
                scaled = states / np.linalg.norm(states.mean(0))
                encoded[text] = self._project(scaled)
        return {text: encoded[text] for text in unique}

    def sentences(self, texts: Sequence[str], *, batch_size: int = 64) -> NDArray:
        """One vector per text, (n, width) float32; before a projection of unit length."""
        tokens = self.tokens(texts, batch_size=batch_size)
        return np.stack([tokens[text].mean(0) for text in texts])

    @torch.no_grad()
    def _states(self, texts: Sequence[str]) -> list[NDArray]:
        batch = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(self.device)
        states = self.model(**batch).last_hidden_state.float().cpu().numpy()
        masks = batch["attention_mask"].cpu().numpy().astype(bool)  # padding may stand before the text
        lengths = masks.sum(1).tolist()
        if 0 in lengths:
            raise ValueError(f"the tokenizer finds no token in {shown(texts[lengths.index(0)])}")
        return [rows[mask] for rows, mask in zip(states, masks, strict=True)]

    def _project(self, vectors: NDArray) -> NDArray:
        if self.projection is None:
            return vectors
        mean, components = self.projection
        return ((vectors - mean) @ components.T).astype(np.float32)


def _read_projection(path: Path) -> tuple[NDArray, NDArray]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a projection is an .npz file with 'mean' and 'components'")
    arrays = read_arrays(path)
    if missing := {"mean", "components"} - set(arrays):
        raise ValueError(f"{path} is not a projection: it has no {sorted(missing)}, only {sorted(arrays)}")
    mean, components = arrays["mean"], arrays["components"]
    if components.ndim != 2 or mean.shape != components.shape[1:] or {mean.dtype.kind, components.dtype.kind} - {"f"}:
        raise ValueError(
            f"{path} is not a projection: 'mean' is {mean.dtype} {mean.shape} and 'components' {components.dtype} "
            f"{components.shape}; they must be numbers (width,) and (projected width, width)"
        )
    if not (np.isfinite(mean).all() and np.isfinite(components).all()):
        raise ValueError(f"{path}: the projection holds NaN or infinite numbers")
    return mean.astype(np.float32), components.astype(np.float32)
