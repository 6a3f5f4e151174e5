"""ClipFeatures and TextFeatures: a grounding model's input features of clips and of query tokens."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..spans import ROUNDING, begins_inside
from ..values import array_of, count, id_of, is_given, listed, number, shown, table
from .features import Features, check_features, place_of, read_features, row_count

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
    """Where each clip starts and ends, as fractions of the video: rows (i / L, (i + 1) / L), shape (L, 2).

    Raises:
        ValueError: no clip.
    """
    count(num_clips, "num_clips")
    starts = np.arange(num_clips, dtype=np.float32) / num_clips
    return np.stack((starts, starts + np.float32(1 / num_clips)), axis=1)


def query_similarity(clips: NDArray, tokens: NDArray, *, channels: int = SIMILARITY_CHANNELS) -> NDArray:
    """How similar each clip is to the query: z-score over the clips, and 4s, of the cosine s with its mean token.

    The pair is repeated, so that it keeps its weight in an input LayerNorm over hundreds of feature channels. A
    model that is to learn the match of video and text from a few hundred queries needs this channel; it is meaningful
    only where both sides come from one embedding space.

    Args:
        clips: (L, width).
        tokens: (T, width), of the same space.
        channels: width of the result, even.

    Returns:
        (L, channels) float32.

    Raises:
        ValueError: clips and tokens differ in width, one of them is empty, or `channels` is odd.
    """
    if clips.ndim != 2 or tokens.ndim != 2 or not len(clips) or not len(tokens):
        raise ValueError(f"the query similarity needs clips and tokens (n, width), not {clips.shape}, {tokens.shape}")
    if clips.shape[1] != tokens.shape[1]:
        raise ValueError(
            f"the query similarity needs one space: clips are {clips.shape[1]} wide, query tokens {tokens.shape[1]}"
        )
    if channels < 2 or channels % 2:
        raise ValueError(f"channels={channels} must be even: z-score and cosine alternate")
    cosine = l2_normalize(clips) @ l2_normalize(tokens.mean(0))  # (L,)
    score = (cosine - cosine.mean()) / (cosine.std() + SPREAD_EPSILON)
    pair = np.stack((score, SIMILARITY_SCALE * cosine), axis=1)
    return np.tile(pair, (1, channels // 2)).astype(np.float32)


class PooledFeatures:
    """Features with several rows per clip, averaged to one.

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
        self.path = place_of(features)

    def __contains__(self, video_id: object) -> bool:
        return video_id in self.features and video_id in self.clip_of_row

    def __getitem__(self, video_id: str) -> NDArray:
        """(clips, width) float32; a clip without a row of its own repeats the one before it.

        Raises:
            KeyError: no features of that id.
            ValueError: not one clip number per row, or numbers that are negative or decrease.
        """
        rows, clips = read_features(self.features, video_id), self._clips(video_id)
        if clips.shape != (len(rows),):
            raise ValueError(f"{video_id!r} has {len(rows)} feature rows and {clips.shape} clip numbers")
        last = np.searchsorted(clips, np.arange(clips[-1] + 1), side="right")
        first = np.minimum(np.searchsorted(clips, np.arange(clips[-1] + 1)), last - 1)
        sums = np.concatenate((np.zeros((1, rows.shape[1])), np.cumsum(rows, axis=0, dtype=np.float64)))
        return ((sums[last] - sums[first]) / (last - first)[:, None]).astype(np.float32)

    def num_rows(self, video_id: str) -> int:
        """Clips of one video."""
        return int(self._clips(video_id)[-1]) + 1

    def _clips(self, video_id: str) -> NDArray[np.int64]:
        if video_id not in self:
            raise KeyError(f"there are no features of {video_id!r} with known clip numbers")
        where = f"clip numbers of {video_id!r}"
        clips = table(self.clip_of_row[video_id], where, low=0, whole=True, empty=False).astype(np.int64)
        if clips[0] != 0 or (np.diff(clips) < 0).any():
            raise ValueError(f"{where} must increase from 0: {shown(clips.tolist())}")
        return clips


class TextFeatures:
    """Token features of queries, found by a column of the dataset.

    Args:
        features: by id, (tokens, width): a `FeatureStore` of published features, or what `SentenceEncoder` made.
        key: the column that holds the id: `"qid"`, `"vid"`, or `"query"` for features by the text itself.
        max_tokens: tokens kept, from the start.
        normalize: L2-normalise every token.

    Raises:
        ValueError: `max_tokens` is not positive.
    """

    def __init__(
        self,
        features: Features | Mapping[str, Any],
        *,
        key: str = "qid",
        max_tokens: int = 32,
        normalize: bool = True,
    ) -> None:
        if not hasattr(features, "__contains__") or isinstance(features, str | list | tuple):
            raise ValueError(f"text features must be a store or a mapping from id to tokens, not {shown(features)}")
        self.features, self.key, self.normalize = features, key, normalize
        self.max_tokens = count(max_tokens, "max_tokens")

    def id(self, row: Mapping[str, Any]) -> str:
        """The id of the row's text.

        Raises:
            ValueError: the column is missing, or holds no id.
        """
        return id_of(row.get(self.key), f"{self.key!r} of a row")

    def raw(self, row: Mapping[str, Any]) -> NDArray:
        """The row's tokens (T, width) as they were stored, cut to `max_tokens`.

        Raises:
            KeyError: no features of that text.
            ValueError: they are empty.
        """
        tokens = read_features(self.features, self.id(row))[: self.max_tokens]
        if not len(tokens):
            raise ValueError(f"the text features of {self.key} {self.id(row)!r} have no token")
        return tokens

    def __call__(self, row: Mapping[str, Any]) -> NDArray:
        """The row's tokens (T, width) as the model gets them."""
        return self.prepared(self.raw(row))

    def prepared(self, tokens: NDArray) -> NDArray:
        """Converts stored tokens to what the model gets."""
        return l2_normalize(tokens) if self.normalize else tokens

    def check(self, rows: Iterable[Mapping[str, Any]]) -> int:
        """Reads the features of all rows once, and warns of texts that are longer than `max_tokens`.

        Returns:
            Their width.

        Raises:
            ValueError: missing, unreadable, empty or non-finite features or features of another width, by id.
        """
        ids = list(dict.fromkeys(self.id(row) for row in rows))
        name = f"text features by {self.key}{_place(self.features)}"
        width = check_features(self.features, ids, name=name)
        lengths = {key: row_count(self.features, key) or 0 for key in ids}
        if longer := {key: length for key, length in lengths.items() if length > self.max_tokens}:
            warnings.warn(
                f"{name}: {len(longer)} of {len(ids)} texts are longer than max_tokens={self.max_tokens} and lose "
                f"{sum(longer.values()) - self.max_tokens * len(longer)} tokens: {listed(list(longer))}",
                stacklevel=2,
            )
        return width


class ClipFeatures:
    """Clip features of several kinds, concatenated, with channels for similarity to the query and position.

    Every kind is L2-normalised clip by clip, cut to the shortest and concatenated; the query similarity and the
    temporal endpoints are appended in this order. Results are cached.

    Args:
        kinds: one or more sources by video id, each (clips, width), such as SlowFast and CLIP.
        normalize: L2-normalise each kind.
        endpoints: append `temporal_endpoints`, 2 channels.
        similarity: index of the kind to append `query_similarity` of; None = none.
        max_clips: clips kept, from the start; None = all.
        max_difference: by how many clips two streams, or features and labels, of a video may differ. More means that
            their rates differ, and is an error.
        clip_seconds: length of a clip, which the collators and `check` take from here.
        cache_bytes: most memory of the cache; 0 = no cache.

    Raises:
        ValueError: no kind, a similarity with a kind that does not exist, a number that is not positive.

    Example:
        ```python
        clips = ClipFeatures([FeatureStore("slowfast"), FeatureStore("clip")], max_clips=75)
        clips({"vid": "abc_0.0_150.0"}).shape  # (75, 2304 + 512 + 2)
        ```
    """

    def __init__(
        self,
        kinds: Sequence[Features | Mapping[str, Any]],
        *,
        normalize: bool = True,
        endpoints: bool = True,
        similarity: int | None = None,
        max_clips: int | None = None,
        max_difference: int = 2,
        clip_seconds: float = 2.0,
        cache_bytes: int = 2**30,
    ) -> None:
        if not isinstance(kinds, list | tuple):
            raise ValueError(f"kinds must be a list of sources, [{type(kinds).__name__}] for a single one")
        if not kinds:
            raise ValueError("ClipFeatures needs at least one kind of features")
        if similarity is not None and not 0 <= similarity < len(kinds):
            raise ValueError(f"similarity={similarity} is not the index of one of {len(kinds)} kinds of features")
        self.kinds, self.normalize, self.endpoints, self.similarity = list(kinds), normalize, endpoints, similarity
        self.max_clips = None if max_clips is None else count(max_clips, "max_clips")
        self.max_difference = count(max_difference, "max_difference", low=0)
        self.clip_seconds = number(clip_seconds, "clip_seconds", above=0)
        self._cache = _Cache(count(cache_bytes, "cache_bytes", low=0))

    def __call__(
        self,
        row: Mapping[str, Any],
        tokens: NDArray | None = None,
        *,
        at_most: int | None = None,
        text_id: Hashable = None,
    ) -> NDArray:
        """Features of the row's video (L, width) float32.

        Args:
            row: with `vid`.
            tokens: (T, width), not normalised; needed for the query similarity.
            at_most: length to cut to, such as that of another stream or of the labels.
            text_id: key of the tokens in the cache, the same for the same tokens alone: `(text, text.id(row))` with
                their `TextFeatures`, for one id may have other tokens in others. With it, or without a similarity,
                the result is cached and must not be modified.

        Raises:
            KeyError: a kind has no features of the video.
            ValueError: the similarity is asked for without tokens, kinds differ by more than `max_difference` clips,
                or features are empty or not (clips, width).
        """
        video_id = id_of(row.get("vid"), "'vid' of a row")
        if self.similarity is not None and text_id is None:
            return self._computed(video_id, tokens, at_most)
        key = (video_id, text_id if self.similarity is not None else None, at_most)
        features = self._cache.get(key)
        if features is None:
            features = self._cache.keep(key, self._computed(video_id, tokens, at_most))
        return features

    def num_clips(self, video_id: str) -> int | None:
        """Clips of a video in the shortest kind, before `max_clips`; None: a kind has no features of it."""
        counts = [row_count(kind, video_id) for kind in self.kinds]
        return None if None in counts else min(length for length in counts if length is not None)

    def _computed(self, video_id: str, tokens: NDArray | None, at_most: int | None) -> NDArray[np.float32]:
        kinds = [read_features(kind, video_id) for kind in self.kinds]
        lengths = [len(features) for features in kinds]
        if max(lengths) - min(lengths) > self.max_difference:
            raise ValueError(
                f"the kinds of {video_id!r} have {', '.join(map(str, lengths))} clips: they differ by more "
                f"than max_difference={self.max_difference}, so their rates differ"
            )
        length = min([min(lengths), *(limit for limit in (self.max_clips, at_most) if limit is not None)])
        if not length:
            raise ValueError(f"the features of {video_id!r} have no clip")
        parts = [features[:length] for features in kinds]
        extra = []
        if self.similarity is not None:
            if tokens is None:
                raise ValueError(f"the query similarity of {video_id!r} needs the query's tokens")
            extra.append(query_similarity(parts[self.similarity], array_of(tokens)))
        if self.endpoints:
            extra.append(temporal_endpoints(length))
        if self.normalize:
            parts = [l2_normalize(features) for features in parts]
        return np.concatenate([*parts, *extra], axis=1).astype(np.float32)

    def check(self, rows: Iterable[Mapping[str, Any]], *, clip_seconds: float | None = None) -> int:
        """Reads the features of all rows once, and warns of what will be cut.

        Clips after `max_clips` and moments after the last clip are cut. Features that are longer or shorter than the
        video's `duration` or its `clip_scores` by more than `max_difference` clips have another rate than
        `clip_seconds`, which is an error.

        Args:
            rows: of the dataset; `duration`, `relevant_windows` and `clip_scores` are optional.
            clip_seconds: length of a clip; None = that of these features.

        Returns:
            The width of the model's input, all channels together.

        Raises:
            ValueError: features that are missing, unreadable, empty, non-finite, of another width or, between kinds or
                against the labels, of another length, by id.
        """
        rows = list(rows)
        seconds = self.clip_seconds if clip_seconds is None else number(clip_seconds, "clip_seconds", above=0)
        ids = list(dict.fromkeys(id_of(row.get("vid"), "'vid' of a row") for row in rows))
        widths = [check_features(kind, ids, name=f"clip features{_place(kind)}") for kind in self.kinds]
        lengths = {vid: [row_count(kind, vid) or 0 for kind in self.kinds] for vid in ids}
        unequal = [
            f"{vid} ({', '.join(map(str, counts))} clips)"
            for vid, counts in lengths.items()
            if max(counts) - min(counts) > self.max_difference
        ]
        if unequal:
            raise ValueError(
                f"{len(unequal)} videos have kinds of features that differ by more than {self.max_difference} clips: "
                f"{listed(unequal)}"
            )
        shortest = {vid: min(counts) for vid, counts in lengths.items()}
        self._check_rates(rows, shortest, seconds)
        self._warn_of_cuts(rows, shortest, seconds)
        return sum(widths) + 2 * self.endpoints + SIMILARITY_CHANNELS * (self.similarity is not None)

    def _check_rates(self, rows: Sequence[Mapping[str, Any]], lengths: Mapping[str, int], seconds: float) -> None:
        wrong: dict[str, str] = {}
        for row in rows:
            vid = id_of(row["vid"], "'vid' of a row")
            if is_given(row.get("clip_scores")):
                expected, what = float(len(row["clip_scores"])), "labelled clips"
            elif row.get("relevant_windows") is not None and row.get("duration") is not None:
                expected, what = number(row["duration"], f"'duration' of {vid!r}", above=0) / seconds, "clips long"
            else:
                continue
            if abs(lengths[vid] - expected) > self.max_difference:
                wrong[vid] = f"{vid} ({lengths[vid]} clips of features, {expected:g} {what})"
        if wrong:
            raise ValueError(
                f"{len(wrong)} videos have features of another rate than their annotations, at {seconds:g} seconds a "
                f"clip (pass clip_seconds, or bring the features to clips): {listed(list(wrong.values()))}"
            )

    def _warn_of_cuts(self, rows: Sequence[Mapping[str, Any]], lengths: Mapping[str, int], seconds: float) -> None:
        limit = self.max_clips
        if limit is not None and (longer := {vid: n for vid, n in lengths.items() if n > limit}):
            lost, total = sum(longer.values()) - limit * len(longer), sum(lengths.values())
            warnings.warn(
                f"{len(longer)} of {len(lengths)} videos are longer than max_clips={limit}: {lost} of {total} clips "
                f"are cut ({listed([f'{vid}: {n}' for vid, n in longer.items()])})",
                stacklevel=3,
            )
        dropped, shortened = [], 0
        for row in rows:
            vid = id_of(row["vid"], "'vid' of a row")
            end = seconds * (lengths[vid] if limit is None else min(limit, lengths[vid]))
            for start, stop in array_of(row["relevant_windows"]) if is_given(row.get("relevant_windows")) else ():
                if not begins_inside(start, end):
                    dropped.append(f"{row.get('qid', vid)} [{start:g}, {stop:g}]")
                elif stop > end * (1 + ROUNDING):
                    shortened += 1
        if dropped or shortened:
            named = f" ({listed(dropped)})" if dropped else ""
            warnings.warn(
                f"{len(dropped)} moments lie after the last clip of their video and are dropped{named}; {shortened} "
                "end after it and are cut there",
                stacklevel=3,
            )


class _Cache:
    """Arrays by key, up to a limit of memory. Copies and pickles, as for a worker process, start empty.

    Args:
        limit: in bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self._arrays: dict[Hashable, NDArray] = {}

    def __reduce__(self) -> tuple[type[_Cache], tuple[int]]:
        return _Cache, (self.limit,)

    def get(self, key: Hashable) -> NDArray | None:
        return self._arrays.get(key)

    def keep(self, key: Hashable, array: NDArray) -> NDArray:
        """Stores the array if there is room, and returns it."""
        if self.used + array.nbytes <= self.limit:
            array.flags.writeable = False
            self._arrays[key] = array
            self.used += array.nbytes
        return array


def _place(features: object) -> str:
    place = place_of(features)
    return f" in {place}" if place else ""
