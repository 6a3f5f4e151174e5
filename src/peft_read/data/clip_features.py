"""ClipFeatures and TextFeatures: what a grounding model sees of a video's clips and of a query's words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .features import Features, check_features, listed

__all__ = [
    "ClipFeatures",
    "PooledFeatures",
    "TextFeatures",
    "l2_normalize",
    "query_similarity",
    "temporal_endpoints",
]

NORM_EPSILON = 1e-5  # added to the norm, as in Moment-DETR: a row of zeros stays zero
SPREAD_EPSILON = 1e-6  # of a video whose clips are all equally similar to the query
SIMILARITY_CHANNELS = 32
SIMILARITY_SCALE = 4.0  # brings the raw cosine of sentence embeddings to the size of its z-score


def l2_normalize(features: NDArray) -> NDArray:
    """Rows x / (|x| + 1e-5), as Moment-DETR normalises every kind of feature before it joins them."""
    return features / (np.linalg.norm(features, axis=-1, keepdims=True) + NORM_EPSILON)


def temporal_endpoints(num_clips: int) -> NDArray:
    """Where each clip starts and ends, as shares of the video: rows (i / L, (i + 1) / L), shape (L, 2)."""
    starts = np.arange(num_clips, dtype=np.float32) / num_clips
    return np.stack((starts, starts + np.float32(1 / num_clips)), axis=1)


def query_similarity(clips: NDArray, tokens: NDArray, *, channels: int = SIMILARITY_CHANNELS) -> NDArray:
    """How similar each clip is to the query: z-score over the clips, and 4s, of the cosine s with its mean token.

    The pair is repeated, so that an input LayerNorm over hundreds of feature channels does not drown it. A model that
    shall learn the match of video and text from a few hundred queries needs this channel; it is meaningful only where
    both sides come from one embedding space.

    Args:
        clips: (L, width).
        tokens: (T, width), of the same space.
        channels: width of the result, even.

    Returns:
        (L, channels) float32.

    Raises:
        ValueError: clips and tokens differ in width, or `channels` is odd.
    """
    if clips.shape[1] != tokens.shape[1]:
        raise ValueError(
            f"the query similarity needs one space: clips are {clips.shape[1]} wide, query tokens {tokens.shape[1]}"
        )
    if channels < 2 or channels % 2:
        raise ValueError(f"channels={channels} must be even: z-score and cosine take turns")
    cosine = l2_normalize(clips) @ l2_normalize(tokens.mean(0))  # (L,)
    score = (cosine - cosine.mean()) / (cosine.std() + SPREAD_EPSILON)
    pair = np.stack((score, SIMILARITY_SCALE * cosine), axis=1)
    return np.tile(pair, (1, channels // 2)).astype(np.float32)


class PooledFeatures:
    """Features whose rows are denser than clips: the rows of a clip are averaged.

    Args:
        features: by id, (rows, width).
        clip_of_row: by id, the clip (rows,) that each row belongs to, ascending.

    Example:
        ```python
        PooledFeatures(store, {"a": [0, 0, 1]})["a"].shape  # (2, width)
        ```
    """

    def __init__(self, features: Features, clip_of_row: Mapping[str, ArrayLike]) -> None:
        self.features, self.clip_of_row = features, clip_of_row

    def __contains__(self, video_id: object) -> bool:
        return video_id in self.features and video_id in self.clip_of_row

    def __getitem__(self, video_id: str) -> NDArray:
        """(clips, width) float32; a clip without a row of its own repeats the one before it.

        Raises:
            ValueError: not one clip number a row.
        """
        rows, clips = self.features[video_id], np.asarray(self.clip_of_row[video_id])
        if clips.shape != (len(rows),):
            raise ValueError(f"{video_id!r} has {len(rows)} feature rows and {clips.shape} clip numbers")
        last = np.searchsorted(clips, np.arange(clips[-1] + 1), side="right")
        first = np.minimum(np.searchsorted(clips, np.arange(clips[-1] + 1)), last - 1)
        sums = np.concatenate((np.zeros((1, rows.shape[1])), np.cumsum(rows, axis=0, dtype=np.float64)))
        return ((sums[last] - sums[first]) / (last - first)[:, None]).astype(np.float32)


class TextFeatures:
    """Token features of queries, found by a column of the dataset.

    Args:
        features: by id, (tokens, width): a `FeatureStore` of published features, or what `SentenceEncoder` made.
        key: the column that holds the id: `"qid"`, `"vid"`, or `"query"` for features by the text itself.
        max_tokens: tokens kept, from the start.
        normalize: L2-normalise every token.
    """

    def __init__(
        self,
        features: Features | Mapping[str, NDArray],
        *,
        key: str = "qid",
        max_tokens: int = 32,
        normalize: bool = True,
    ) -> None:
        self.features, self.key, self.max_tokens, self.normalize = features, key, max_tokens, normalize

    def raw(self, row: Mapping[str, Any]) -> NDArray:
        """The row's tokens (T, width) as they were stored, cut to `max_tokens`."""
        return np.asarray(self.features[str(row[self.key])], dtype=np.float32)[: self.max_tokens]

    def __call__(self, row: Mapping[str, Any]) -> NDArray:
        """The row's tokens (T, width) as the model gets them."""
        return l2_normalize(self.raw(row)) if self.normalize else self.raw(row)

    def check(self, rows: Iterable[Mapping[str, Any]]) -> int:
        """Reads the features of all rows once.

        Returns:
            Their width.

        Raises:
            ValueError: missing, empty or non-finite features or features of another width, by id.
        """
        return check_features(
            self.features,
            (str(row[self.key]) for row in rows),
            name=f"text features by {self.key}{_place(self.features)}",
        )


class ClipFeatures:
    """Clip features of several kinds side by side, with what a grounding model needs to know about their place.

    Every kind is L2-normalised a clip at a time and cut to the shortest, then joined; then follow the query similarity
    and the temporal endpoints, in this order.

    Args:
        kinds: one or more sources by video id, each (clips, width), such as SlowFast and CLIP.
        normalize: L2-normalise each kind.
        endpoints: append `temporal_endpoints`, 2 channels.
        similarity: append `query_similarity`, with the kind of this index; None = not.
        max_clips: clips kept, from the start; None = all.
        max_difference: by how many clips two kinds of a video may differ before `check` reports them.

    Raises:
        ValueError: no kind, or a similarity with a kind that does not exist.

    Example:
        ```python
        clips = ClipFeatures([FeatureStore("slowfast"), FeatureStore("clip")], max_clips=75)
        clips({"vid": "abc_0.0_150.0"}).shape  # (75, 2304 + 512 + 2)
        ```
    """

    def __init__(
        self,
        kinds: Sequence[Features],
        *,
        normalize: bool = True,
        endpoints: bool = True,
        similarity: int | None = None,
        max_clips: int | None = 75,
        max_difference: int = 2,
    ) -> None:
        if not kinds:
            raise ValueError("ClipFeatures needs at least one kind of features")
        if similarity is not None and not 0 <= similarity < len(kinds):
            raise ValueError(f"similarity={similarity} is not the index of one of {len(kinds)} kinds of features")
        self.kinds, self.normalize, self.endpoints = list(kinds), normalize, endpoints
        self.similarity, self.max_clips, self.max_difference = similarity, max_clips, max_difference

    def __call__(
        self, row: Mapping[str, Any], tokens: NDArray | None = None, *, at_most: int | None = None
    ) -> NDArray:
        """Features of the row's video (L, width) float32.

        Args:
            row: with `vid`.
            tokens: (T, width), not normalised; needed for the query similarity.
            at_most: clips of another stream or of the labels, which this one is cut to.

        Raises:
            ValueError: the similarity is asked for without tokens.
        """
        kinds = [kind[row["vid"]] for kind in self.kinds]
        length = min(len(features) for features in kinds)
        length = min([length, *(limit for limit in (self.max_clips, at_most) if limit is not None)])
        parts = [features[:length] for features in kinds]
        extra = []
        if self.similarity is not None:
            if tokens is None:
                raise ValueError(f"the query similarity of {row['vid']!r} needs the query's tokens")
            extra.append(query_similarity(parts[self.similarity], tokens))
        if self.endpoints:
            extra.append(temporal_endpoints(length))
        if self.normalize:
            parts = [l2_normalize(features) for features in parts]
        return np.concatenate([*parts, *extra], axis=1).astype(np.float32)

    def check(self, rows: Iterable[Mapping[str, Any]]) -> int:
        """Reads the features of all rows once.

        Returns:
            The width that the model gets, all channels together.

        Raises:
            ValueError: features that are missing, empty, non-finite, of another width or, between kinds, of another
                length, by id.
        """
        ids = list(dict.fromkeys(row["vid"] for row in rows))
        widths = [check_features(kind, ids, name=f"clip features{_place(kind)}") for kind in self.kinds]
        unequal = []
        if len(self.kinds) > 1:
            for video_id in ids:
                lengths = [len(kind[video_id]) for kind in self.kinds]
                if max(lengths) - min(lengths) > self.max_difference:
                    unequal.append(f"{video_id} ({', '.join(map(str, lengths))} clips)")
        if unequal:
            raise ValueError(
                f"{len(unequal)} videos have kinds of features that differ by more than {self.max_difference} clips: "
                f"{listed(unequal)}"
            )
        return sum(widths) + 2 * self.endpoints + SIMILARITY_CHANNELS * (self.similarity is not None)


def _place(features: object) -> str:
    return f" in {features.path}" if hasattr(features, "path") else ""
