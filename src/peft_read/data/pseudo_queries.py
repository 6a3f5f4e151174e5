"""Weak labels for pretraining without annotation: captions as queries, runs of similar clips as their moments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..values import count, id_of, listed, number, shown
from .clip_features import l2_normalize
from .features import Features, read_features

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["moments_of_similar_clips", "pseudo_queries"]

MAX_DIFFERENCE = 2  # clips that a video may have more or less than captions
LONGEST_SHARE = 0.8  # a caption that fits nearly the whole video says nothing about when


def moments_of_similar_clips(
    clips: NDArray, anchor: int, *, threshold: float = 0.3, max_gap: int = 1
) -> list[tuple[int, int]]:
    """The runs of clips that are similar to one clip.

    A clip belongs if its cosine with the anchor's features exceeds `threshold` x (1 - mean cosine) + mean cosine, a
    threshold between the video's average and 1; so a video of one scene does not become one moment.

    Args:
        clips: (L, width) features.
        anchor: the clip that the caption was written for.
        threshold: 0 = the average, 1 = identical.
        max_gap: longest gap, in clips, at which two runs are joined.

    Returns:
        (first clip, last clip) of each run in order; the anchor lies in one of them.

    Raises:
        ValueError: the anchor is not a clip, the threshold is not finite, or the gap is negative.
    """
    clips = np.asarray(clips)
    if clips.ndim != 2 or not 0 <= anchor < len(clips):
        raise ValueError(f"anchor={anchor} is not a clip of features {clips.shape}, (clips, width)")
    number(threshold, "threshold")
    count(max_gap, "max_gap", low=0)
    unit = l2_normalize(clips)
    cosine = unit @ unit[anchor]
    bar = cosine.mean() + threshold * (1 - cosine.mean())
    chosen = np.flatnonzero((cosine >= bar) | (np.arange(len(clips)) == anchor))
    runs: list[tuple[int, int]] = []
    for clip in chosen.tolist():
        if runs and clip - runs[-1][1] <= max_gap + 1:
            runs[-1] = (runs[-1][0], clip)
        else:
            runs.append((clip, clip))
    return runs


def pseudo_queries(
    captions: Mapping[str, Sequence[str]],
    features: Features,
    *,
    videos: Sequence[str],
    per_video: int = 8,
    threshold: float = 0.3,
    max_gap: int = 1,
    min_clips: int = 2,
    max_moments: int = 5,
    seed: int = 0,
    clip_seconds: float = 2.0,
) -> Dataset:
    """Makes a grounding dataset from captions, as Moment-DETR's pretraining does from speech (its section 4).

    Captions are drawn without repetition of the text or of a moment. One whose moments cover more than 80 % of the
    video, or are all shorter than `min_clips`, is not used.

    Args:
        captions: by video, one sentence per clip.
        features: by video, (clips, width).
        videos: the ids to use; leave out those that are evaluated on later.
        per_video: most queries per video.
        threshold: of `moments_of_similar_clips`.
        max_gap: of `moments_of_similar_clips`.
        min_clips: shortest moment in clips; shorter ones are left out.
        max_moments: most moments per query; the longest are kept.
        seed: of the random draw.
        clip_seconds: length of a clip.

    Returns:
        A dataset with the columns of `load_qvhighlights` that make sense: `qid` (from 0), `query`, `vid`, `duration`,
        `relevant_windows` in seconds, and `clip_scores`, 1 inside a moment, 0 outside.

    Raises:
        ValueError: by id, a video without captions or features, captions that are not strings or not one per clip;
            a number that is not positive, or no query at all.
    """
    from datasets import Dataset

    for name, value in (("per_video", per_video), ("min_clips", min_clips), ("max_moments", max_moments)):
        count(value, name)
    number(clip_seconds, "clip_seconds", above=0)
    videos = [id_of(vid, "an id of videos") for vid in videos]
    if missing := [vid for vid in videos if vid not in captions or vid not in features]:
        raise ValueError(f"{len(missing)} videos have no captions or no features: {listed(missing)}")
    generator = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for vid in dict.fromkeys(videos):
        clips, texts = read_features(features, vid), captions[vid]
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"the captions of {vid!r} must be a list of strings, not {shown(texts)}")
        if abs(len(clips) - len(texts)) > MAX_DIFFERENCE:
            raise ValueError(
                f"{vid!r} has {len(clips)} clips of features and {len(texts)} captions: one per clip is needed"
            )
        length = min(len(clips), len(texts))
        used: set[object] = set()
        taken = 0
        for anchor in generator.permutation(length).tolist():
            if taken == per_video:
                break
            text = texts[anchor].strip()
            runs = moments_of_similar_clips(clips[:length], anchor, threshold=threshold, max_gap=max_gap)
            runs = [run for run in runs if run[1] - run[0] + 1 >= min_clips]
            runs = sorted(sorted(runs, key=lambda run: run[0] - run[1])[:max_moments])
            covered = sum(last - first + 1 for first, last in runs)
            if not text or not runs or text in used or tuple(runs) in used or covered > LONGEST_SHARE * length:
                continue
            used |= {text, tuple(runs)}
            taken += 1
            scores = np.zeros(length)
            for first, last in runs:
                scores[first : last + 1] = 1.0
            rows.append(
                {
                    "qid": len(rows),
                    "query": text,
                    "vid": vid,
                    "duration": float(clip_seconds * length),
                    "relevant_windows": [
                        [float(clip_seconds * first), float(clip_seconds * (last + 1))] for first, last in runs
                    ],
                    "clip_scores": scores.tolist(),
                }
            )
    if not rows:
        raise ValueError(f"no pseudo-query could be made of {len(videos)} videos; lower the threshold or min_clips")
    return Dataset.from_list(rows)
