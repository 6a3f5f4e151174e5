"""SentenceEncoder: token features of queries and sentence features of captions, in one space."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["SentenceEncoder"]


class SentenceEncoder:
    """A frozen sentence encoder of the mean-pooling kind (MiniLM, MPNet, ...), optionally with a linear projection.

    A sentence is the mean of its token states, special tokens included, at unit length. Tokens are divided by the
    length of their mean, so that the mean of a query's tokens IS its sentence, also after the projection
    x -> (x - mean) components', which is affine.

    Args:
        name_or_path: folder or Hub name of the encoder, such as `"sentence-transformers/all-MiniLM-L6-v2"`.
        projection: `.npz` file with `mean` (width,) and `components` (projected width, width); None = no projection.
        max_tokens: tokens kept of a text, special tokens included.
        device: where the encoder runs.

    Raises:
        FileNotFoundError: no projection file.
        ValueError: a projection without its arrays, or of another width than the encoder's.

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
        self.max_tokens, self.device = max_tokens, device
        self.projection = None if projection is None else _read_projection(Path(projection))
        width = self.model.config.hidden_size
        if self.projection is not None and self.projection[1].shape[1] != width:
            raise ValueError(f"{projection} projects {self.projection[1].shape[1]} numbers, the encoder gives {width}")

    def tokens(self, texts: Iterable[str], *, batch_size: int = 64) -> dict[str, NDArray]:
        """Token features of every different text, by the text: each (T, width) float32."""
        unique = list(dict.fromkeys(texts))
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
        """One vector a text, (n, width) float32; before a projection of unit length."""
        tokens = self.tokens(texts, batch_size=batch_size)
        return np.stack([tokens[text].mean(0) for text in texts])

    @torch.no_grad()
    def _states(self, texts: Sequence[str]) -> list[NDArray]:
        batch = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(self.device)
        states = self.model(**batch).last_hidden_state.float().cpu().numpy()
        lengths = batch["attention_mask"].sum(1).tolist()
        return [rows[:length] for rows, length in zip(states, lengths, strict=True)]

    def _project(self, vectors: NDArray) -> NDArray:
        if self.projection is None:
            return vectors
        mean, components = self.projection
        return ((vectors - mean) @ components.T).astype(np.float32)


def _read_projection(path: Path) -> tuple[NDArray, NDArray]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a projection is an .npz file with 'mean' and 'components'")
    with np.load(path, allow_pickle=False) as file:
        if missing := {"mean", "components"} - set(file.files):
            raise ValueError(f"{path} is no projection: it has no {sorted(missing)}, only {sorted(file.files)}")
        return file["mean"].astype(np.float32), file["components"].astype(np.float32)
