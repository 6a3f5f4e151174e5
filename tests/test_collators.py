"""Batches of the grounding models: shared features, rows without any moment, dropped moments, other clip lengths."""

import pickle

import numpy as np
import pytest
import torch

from peft_read.data import ClipFeatures, MomentDetrCollator, TextFeatures, UMTCollator
from peft_read.models import UMTConfig, UMTForTemporalGrounding

ROWS = [{"qid": 1, "vid": "v"}, {"qid": 2, "vid": "v"}]


def rows_of(seed, length, width=4):
    return np.random.default_rng(seed).normal(size=(length, width)).astype(np.float32)


WORDS, PARAPHRASES = ({"1": rows_of(seed, 5), "2": rows_of(seed + 1, 3)} for seed in (1, 3))


@pytest.mark.parametrize("collator", [MomentDetrCollator, UMTCollator])
def test_features_shared_by_two_texts_are_those_of_each(collator):
    video = {"v": rows_of(0, 9)}
    shared = ClipFeatures([video], similarity=0)
    texts = [TextFeatures(WORDS), TextFeatures(WORDS, max_tokens=2), TextFeatures(PARAPHRASES)]
    for text in texts * 2:
        found = collator(shared, text=text)(ROWS)["video_features"]
        assert torch.equal(found, collator(ClipFeatures([video], similarity=0), text=text)(ROWS)["video_features"])
    one = collator(shared, text=texts[0])
    copy = pickle.loads(pickle.dumps(one))
    clips = copy.clips if collator is MomentDetrCollator else copy.video
    assert not clips._cache._arrays, "other texts than its own do not travel to a worker process"
    for _ in range(2):
        assert all(torch.equal(value, one(ROWS)[name]) for name, value in copy(ROWS).items())
    assert len(clips._cache._arrays) == 2


@pytest.mark.parametrize("convert", [np.float64, np.float32])
def test_moments_of_clips_of_a_fifth_of_a_second(convert):
    clips, text = ClipFeatures([{"v": rows_of(0, 7)}], clip_seconds=0.2), TextFeatures(WORDS)
    row = {**ROWS[0], "duration": 1.4, "relevant_windows": convert([[0.6, 1.4], [1.4, 1.6]])}
    with pytest.warns(UserWarning, match=r"1 moments lie after the last clip .* 0 end after it"):
        clips.check([row])
    detr = MomentDetrCollator(clips, text, span_loss_type="ce", pairs=None)
    assert detr([row])["span_labels"].tolist() == [[[3, 6]]]
    umt = UMTCollator(clips, text=text)
    batch = umt([row])
    assert batch["boundary_labels"].tolist() == [[[pytest.approx(0.6), pytest.approx(1.4)]]]
    config = UMTConfig(
        video_feature_dim=6, audio_feature_dim=None, text_feature_dim=4, d_model=8, max_positions=16,
        clip_seconds=0.2, heads=["boundary"],
    )  # fmt: skip
    assert UMTForTemporalGrounding(config)(**batch).loss.isfinite()
    assert detr.dropped_moments == umt.dropped_moments == 1, "it begins where the features end"
