"""Batches of the grounding models: shared features, rows without any moment, dropped moments, other clip lengths."""

import copy
import logging
import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset

from peft_read.data import (
    ClipFeatures,
    MomentDetrCollator,
    TextFeatures,
    UMTCollator,
    annotated_pairs,
    window_pairs,
)
from peft_read.models import MomentDetrConfig, MomentDetrForTemporalGrounding, UMTConfig, UMTForTemporalGrounding

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
    received = pickle.loads(pickle.dumps(one))
    clips = received.clips if collator is MomentDetrCollator else received.video
    assert not clips._cache._arrays, "other texts than its own do not travel to a worker process"
    for _ in range(2):
        assert all(torch.equal(value, one(ROWS)[name]) for name, value in received(ROWS).items())
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
    assert umt_model(clip_seconds=0.2)(**batch).loss.isfinite()
    assert detr.dropped_moments == umt.dropped_moments == 1, "it begins where the features end"


def umt_model(**options):
    config = UMTConfig(
        video_feature_dim=6, audio_feature_dim=None, text_feature_dim=4, d_model=8, max_positions=16,
        heads=["boundary"], **options,
    )  # fmt: skip
    return UMTForTemporalGrounding(config)


WITH = {
    **ROWS[0], "relevant_windows": [[2.0, 6.0]], "relevant_clip_ids": [1, 2],
    "saliency_scores": [[4, 4, 4], [1, 1, 1]],
}  # fmt: skip
WITHOUT = {**ROWS[1], "relevant_windows": [], "relevant_clip_ids": [], "saliency_scores": []}
EMPTY = {
    "list": WITHOUT,
    "array": {**WITHOUT, "relevant_windows": np.zeros((0, 2))},
    "tensor": Dataset.from_list([WITH, WITHOUT]).with_format("torch")[1],
    "numpy": Dataset.from_list([WITH, WITHOUT]).with_format("numpy")[1],
}


@pytest.mark.parametrize("row", EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize("kind", ["l1", "ce"])
def test_a_query_without_any_moment_trains_the_background_of_moment_detr(kind, row):
    clips, text = ClipFeatures([{"v": rows_of(0, 9)}]), TextFeatures(WORDS)
    config = MomentDetrConfig(
        video_feature_dim=6, text_feature_dim=4, d_model=8, num_attention_heads=2, ffn_dim=8, span_loss_type=kind,
        contrastive_align=True, auxiliary_loss=True,
    )  # fmt: skip
    model = MomentDetrForTemporalGrounding(config).eval()
    collator = MomentDetrCollator(clips, text, span_loss_type=kind)
    alone, mixed = collator([row]), collator([row, WITH])
    assert alone["span_labels"].shape == (1, 0, 2)
    assert mixed["span_mask"].tolist() == [[0], [1]]
    for batch in (alone, mixed):
        assert batch["saliency_pos_labels"][0].tolist() == batch["saliency_neg_labels"][0].tolist() == [-1, -1]
        model(**batch).loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    found = model(**alone)
    assert found.loss_dict["loss_span"] == found.loss_dict["loss_giou"] == found.loss_dict["loss_saliency"] == 0
    background = -config.background_weight * found.pred_logits.log_softmax(-1)[..., 1].mean()
    assert found.loss_dict["loss_label"].item() == pytest.approx(background.item(), rel=1e-5)
    ranked = MomentDetrCollator(clips, text, pairs=window_pairs)([row, WITH])
    assert ranked["saliency_pos_labels"][0].tolist() == [-1, -1]
    assert set(ranked["saliency_pos_labels"][1].tolist()) <= {1, 2}


@pytest.mark.parametrize("row", EMPTY.values(), ids=EMPTY)
def test_a_query_without_any_moment_trains_the_background_of_umt(row):
    collator, model = UMTCollator(ClipFeatures([{"v": rows_of(0, 9)}]), text=TextFeatures(WORDS)), umt_model()
    alone, mixed = collator([row]), collator([row, WITH])
    assert alone["boundary_labels"].shape == (1, 0, 2)
    assert mixed["boundary_mask"].tolist() == [[0], [1]]
    for batch in (alone, mixed):
        loss = model(**batch).loss
        assert loss > 0
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("pairs", [annotated_pairs, window_pairs])
def test_none_and_ratings_that_are_empty_beside_a_moment_are_no_labels(pairs):
    collator = MomentDetrCollator(ClipFeatures([{"v": rows_of(0, 9)}]), TextFeatures(WORDS), pairs=pairs)
    with pytest.raises(ValueError, match=r"1 of the 2 rows of a batch have no 'relevant_windows' \(qid 2\)"):
        collator([WITH, {**WITHOUT, "relevant_windows": None}])
    unrated = {**WITHOUT, "relevant_windows": [[2.0, 4.0]]}
    if pairs is annotated_pairs:
        assert "saliency_pos_labels" not in collator([unrated])
        with pytest.raises(ValueError, match=r"have no 'relevant_clip_ids' \(qid 2\)"):
            collator([WITH, unrated])


@pytest.mark.parametrize("collator", [MomentDetrCollator, UMTCollator])
def test_dropped_moments_are_counted_in_every_process_and_warned_of_once(collator, caplog):
    late = {**ROWS[0], "relevant_windows": [[2, 4], [18, 20], [30, 40]]}
    original = collator(ClipFeatures([{"v": rows_of(0, 9)}]), text=TextFeatures(WORDS))
    for counting in (original, copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
        assert counting.dropped_moments == 0
        loader = torch.utils.data.DataLoader([late] * 12, batch_size=2, num_workers=2, collate_fn=counting)
        assert len(list(loader)) == 6
        assert type(counting.dropped_moments) is int
        assert counting.dropped_moments == 24
    with caplog.at_level(logging.WARNING):
        counting = copy.deepcopy(original)
        assert counting([late] * 2) and (counting.dropped_moments, original.dropped_moments) == (28, 24)
        assert not caplog.messages, "the workers have warned"
        fresh = collator(ClipFeatures([{"v": rows_of(0, 9)}]), text=TextFeatures(WORDS))
        for _ in range(2):
            fresh([late])
    assert caplog.messages == [
        "qid 1: 2 of 3 moments lie after the 9 clips of its features and are dropped; `check` lists all"
    ]
