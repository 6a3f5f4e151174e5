"""What passed silently once: each case has the right value now, or an error that names the place."""

import gzip
import json
import os
import time
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset
from test_data_how2 import word_tokenizer

from peft_read.data import (
    ClipFeatures,
    FeatureStore,
    How2Collator,
    MomentDetrCollator,
    PooledFeatures,
    TextFeatures,
    UMTCollator,
    annotated_pairs,
    generate_how2_mini,
    load_how2,
    load_qvhighlights,
    load_tvsum,
    load_youtube_highlights,
    low_resource_split,
    pool_frames,
    pseudo_queries,
    window_pairs,
    write_feature_archive,
    write_how2_mini,
)
from peft_read.data.qvhighlights import source_of

QUERY = {
    "qid": 1, "query": "café", "vid": "v", "duration": 10, "relevant_windows": [[0, 4]], "relevant_clip_ids": [0, 1],
    "saliency_scores": [[1, 2, 3], [2, 2, 2]],
}  # fmt: skip
YOUTUBE = {"vid": "v", "match": [1], "clip": [[0, 99]], "domain": "dog", "fps": 25, "frames": 100}
TVSUM = {"vid": "v", "query": "q", "domain": "BK", "label": [[1] * 20] * 2}
WORDS = {"1": np.ones((3, 4), np.float32), "2": np.ones((2, 4), np.float32)}


def write(path, *records, encoding="utf-8"):
    path.write_bytes("\n".join(json.dumps(r, ensure_ascii=False) for r in records).encode(encoding))
    return path


def clips_of(length, width=8, seed=0):
    return np.random.default_rng(seed).normal(size=(length, width)).astype(np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qid": "q1"}, "'qid' must be a whole number"),
        ({"qid": None}, "'qid' must be a whole number"),
        ({"vid": ["v"]}, "'vid' must be a non-empty string"),
        ({"vid": 7}, "'vid' must be a non-empty string"),
        ({"query": " "}, "'query' must be a non-empty string"),
        ({"duration": "10"}, "'duration' must be a finite number above 0"),
        ({"duration": -1}, "'duration' must be a number above 0"),
        ({"relevant_clip_ids": [-1, 0]}, "'relevant_clip_ids' holds -1"),
        ({"relevant_clip_ids": [0, 0]}, "'relevant_clip_ids' names a clip twice"),
        ({"relevant_clip_ids": [0, 99]}, "names clip 99, which begins at 198 s; the video ends at 10 s"),
        ({"saliency_scores": [[1.5] * 3, [1] * 3]}, "'saliency_scores' holds 1.5"),
        ({"saliency_scores": [[9] * 3, [1] * 3]}, "'saliency_scores' holds 9"),
        ({"saliency_scores": [[-1] * 3, [1] * 3]}, "'saliency_scores' holds -1"),
        ({"saliency_scores": [1, 2]}, "'saliency_scores' must be rows of 3 whole numbers"),
        ({"relevant_windows": [[4, 0]]}, r"'relevant_windows': the window \[4, 0\] ends before it starts"),
        ({"relevant_windows": [[-4, 2]]}, "starts before the video"),
        ({"relevant_windows": [[2, 2]]}, "has no length"),
        ({"relevant_windows": [[2, 400]]}, "ends after the video, which ends at 10 s"),
        ({"relevant_windows": [[0, float("nan")]]}, "'relevant_windows' holds nan"),
    ],
)
def test_invalid_fields_of_a_query_are_errors_with_file_line_and_field(tmp_path, change, message):
    path = write(tmp_path / "q.jsonl", {**QUERY, "qid": 9}, {**QUERY, **change})
    with pytest.raises(ValueError, match=rf"q\.jsonl, line 2: {message if message[0] == chr(39) else '.*' + message}"):
        load_qvhighlights(path)


def test_encodings_byte_order_marks_and_compressed_files(tmp_path):
    assert load_qvhighlights(write(tmp_path / "bom.jsonl", QUERY, encoding="utf-8-sig"))[0]["query"] == "café"
    with pytest.raises(ValueError, match=r"l\.jsonl, line 1: not UTF-8 \(byte 0xe9 at position 24\)"):
        load_qvhighlights(write(tmp_path / "l.jsonl", QUERY, encoding="latin-1"))
    with pytest.raises(ValueError, match=r"u\.jsonl, line 1: a NUL byte"):
        load_qvhighlights(write(tmp_path / "u.jsonl", QUERY, encoding="utf-16"))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"{}" * 99)[:-9])
    (tmp_path / "plain.jsonl.gz").write_text("{}")
    (tmp_path / "plain.jsonl.xz").write_text("{}")
    for name in ("cut.jsonl.gz", "plain.jsonl.gz", "plain.jsonl.xz"):
        with pytest.raises(ValueError, match=f"{name} is truncated, or not a"):
            load_qvhighlights(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(FileNotFoundError, match="is not a regular file"):
        load_qvhighlights(tmp_path / "pipe.jsonl")


def test_duplicate_fields_and_ids_are_errors(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"qid": 1, "qid": 2}')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: invalid JSON: 'qid' appears twice"):
        load_qvhighlights(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"y\.jsonl, line 2: the video 'v' was already given"):
        load_youtube_highlights(write(tmp_path / "y.jsonl", YOUTUBE, {**YOUTUBE, "match": [-1]}))
    with pytest.raises(ValueError, match=r"t\.jsonl, line 2: the video 'v' was already given"):
        load_tvsum(write(tmp_path / "t.jsonl", TVSUM, TVSUM))
    for loader, record in ((load_tvsum, TVSUM), (load_youtube_highlights, YOUTUBE)):
        (tmp_path / "b.json").write_text(f'{{"v": {json.dumps(record)},\n "v": {json.dumps(record)}}}')
        with pytest.raises(ValueError, match=r"b\.json, line 2: 'v' appears twice"):
            loader(tmp_path / "b.json")


def test_videos_of_the_other_datasets_are_checked_by_field(tmp_path):
    for change, message in [
        ({"fps": -25}, "'fps' must be a number above 0"),
        ({"fps": float("nan")}, "'fps' must be a finite number above 0"),
        ({"clip": [[0, 50], [50, 99]]}, "'clip' has 2 clips, 'match' has 1"),
        ({"clip": [[99, 0]]}, r"'clip' holds the clip \[99.0, 0.0\]"),
        ({"clip": [[500, 600]]}, "inside the video's 100 frames"),
        ({"match": [7]}, "'match' holds 7"),
        ({"domain": None}, "'domain' must be a non-empty string"),
    ]:
        with pytest.raises(ValueError, match=rf"y\.jsonl, line 1: {'.*' if message[0] == 'i' else ''}{message}"):
            load_youtube_highlights(write(tmp_path / "y.jsonl", {**YOUTUBE, **change}))
    with pytest.raises(ValueError, match="videos must be a list of different ids, not 'v'"):
        load_youtube_highlights(write(tmp_path / "y.jsonl", YOUTUBE), videos="v")
    for change, message in [
        ({"label": [[1] * 2] * 20}, "20 rows and 2 columns: is it transposed"),
        ({"label": [[float("nan")] * 20] * 2}, "'label' holds nan"),
        ({"label": [[9] * 20] * 2}, "'label' holds 9"),
        ({"n_frames": -5}, "'n_frames' must be a number from 1 on"),
        ({"vid": 5}, "'vid' must be a non-empty string"),
    ]:
        with pytest.raises(ValueError, match=rf"t\.jsonl, line 1: .*{message}"):
            load_tvsum(write(tmp_path / "t.jsonl", {**TVSUM, **change}))
    with pytest.raises(ValueError, match=r"t\.jsonl, line 2: 'w' has labels of 3 annotators, 'v' of 20"):
        load_tvsum(write(tmp_path / "t.jsonl", TVSUM, {**TVSUM, "vid": "w", "label": [[1] * 3] * 2}))


def test_how2_files_with_byte_order_marks_tabs_and_other_encodings(tmp_path):
    folder = tmp_path / "s"
    folder.mkdir()
    for name in ("tran.tok.txt", "desc.tok.txt"):
        (folder / name).write_text("v1\tsome words\nv2 others", encoding="utf-8-sig")
    assert load_how2(tmp_path, "s")["video_id"][:] == ["v1", "v2"]
    assert load_how2(tmp_path, "s")["summary"][:] == ["some words", "others"]
    (folder / "tran.tok.txt").write_bytes("v1 a\nv2 caf\xe9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"tran\.tok\.txt, line 2: not UTF-8"):
        load_how2(tmp_path, "s")
    for value in (True, 1.0, "1", -1):
        (folder / "tran.tok.txt").write_text("v1 a\nv2 b")
        with pytest.raises(ValueError, match=rf"num_samples={value} is outside 1 \.\. 2"):
            load_how2(tmp_path, "s", num_samples=value)


def test_a_clip_of_one_second_and_a_remainder_after_the_last_whole_clip(tmp_path):
    second = {**QUERY, "relevant_clip_ids": [0, 9], "relevant_windows": [[9, 10]]}
    with pytest.raises(ValueError, match="names clip 9, which begins at 18 s"):
        load_qvhighlights(write(tmp_path / "a.jsonl", second))
    row = load_qvhighlights(tmp_path / "a.jsonl", clip_seconds=1)[0]
    assert len(row["clip_scores"]) == 10
    assert row["clip_scores"][9] == 0.5
    odd = {**QUERY, "duration": 9, "relevant_clip_ids": [0, 4], "relevant_windows": [[8, 10]]}
    assert len(load_qvhighlights(write(tmp_path / "b.jsonl", odd))[0]["clip_scores"]) == 5
    moments = {name: QUERY[name] for name in ("qid", "query", "vid", "duration", "relevant_windows")}
    row = load_qvhighlights(write(tmp_path / "c.jsonl", moments), require_labels=False)[0]
    assert (row["relevant_windows"], row["relevant_clip_ids"], row["clip_scores"]) == ([[0, 4]], None, None)


# Training and validation qids as they were drawn before it was made linear.
DRAWN = ([0, 1, 18, 19, 20, 27, 28, 29], [8, 12, 13, 15, 17])


def test_the_low_resource_split_is_drawn_as_before_and_in_linear_time():
    rows = Dataset.from_dict({"vid": [f"s{i // 3}_{i % 3}.0_9.0" for i in range(30)], "qid": list(range(30))})
    train, validation = low_resource_split(rows, num_train=8, num_validation=5, seed=3)
    assert (train["qid"][:], validation["qid"][:]) == DRAWN
    many = Dataset.from_dict({"vid": [f"s{i}_0.0_9.0" for i in range(40_000)]})
    started = time.process_time()
    low_resource_split(many, num_train=20_000)
    assert time.process_time() - started < 5  # it took 20 s when it was quadratic
    with pytest.raises(ValueError, match="num_train must be a whole number from 1 on, not 0"):
        low_resource_split(rows, num_train=0)


@pytest.mark.parametrize(
    ("vid", "source"),
    [
        ("RoripwjYFp8_60.0_210.0", "RoripwjYFp8"),
        ("-a_b_c_0.0_150.0", "-a_b_c"),
        ("x_0_150", "x"),
        ("v_000", "v_000"),
        ("0tmA_C6XwfM", "0tmA_C6XwfM"),
        ("a_b_c", "a_b_c"),
        ("a_1_b", "a_1_b"),
        ("_1_2", "_1_2"),
        ("plain", "plain"),
    ],
)
def test_the_source_of_a_video_is_what_its_times_leave(vid, source):
    assert source_of(vid) == source


def test_numbered_videos_are_split_as_videos_of_their_own():
    numbered = Dataset.from_dict({"vid": [f"v_{i:03}" for i in range(20)]})
    train, validation = low_resource_split(numbered, num_train=8, num_validation=5)
    assert (len(train), len(validation)) == (8, 5)
    assert not set(train["vid"]) & set(validation["vid"])


def test_sources_of_qvhighlights_are_counted_and_videos_of_other_datasets_stay_apart(reference_data):
    for part, sources in (("val_release", 474), ("test_with_gt", 476)):
        data = load_qvhighlights(reference_data(f"data/qvhighlights/highlight_{part}.jsonl.xz"), require_labels=False)
        videos = set(data["vid"])
        assert {source_of(vid) for vid in videos} == {vid.rsplit("_", 2)[0] for vid in videos}
        assert len({source_of(vid) for vid in videos}) == sources
    data = load_youtube_highlights(reference_data("data/youtube_highlights/youtube_highlight_train_release.jsonl.xz"))
    assert len({source_of(vid) for vid in data["vid"]}) == len(set(data["vid"])) == 233


def test_check_names_every_broken_file(tmp_path):
    np.save(tmp_path / "good.npy", np.ones((3, 4)))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "good.npy").read_bytes()[:-8])
    (tmp_path / "zero.npy").write_bytes(b"")
    np.save(tmp_path / "three.npy", np.ones((1, 3, 4)))
    np.save(tmp_path / "complex.npy", np.ones((3, 4), complex))
    np.save(tmp_path / "words.npy", np.array([["a"]]))
    np.savez(tmp_path / "none.npz")
    os.mkfifo(tmp_path / "pipe.npy")
    (tmp_path / "link.npy").symlink_to(tmp_path / "nothing.npy")
    store = FeatureStore(tmp_path)
    broken = ["cut", "zero", "three", "complex", "words", "none", "pipe", "link"]
    for name in broken:
        with pytest.raises(ValueError, match=rf"{name}\.np"):
            store[name]
    with pytest.raises(ValueError) as error:
        store.check(["good", "missing", *broken[:4]])
    assert "1 ids have no features: missing; 4 ids cannot be read: cut (" in str(error.value)
    assert all(f"{name} (" in str(error.value) for name in broken[:4])


def test_integer_ids_are_converted_to_strings(tmp_path):
    np.save(tmp_path / "7.npy", np.ones((3, 4)))
    store = FeatureStore(tmp_path)
    for number in (7, np.int64(7), torch.tensor(7), "7"):
        assert number in store
        assert store[number].shape == (3, 4)
        assert store.check([number]) == 4
    assert None not in store
    with pytest.raises(ValueError, match="2 ids have no features: 1, 2"):
        store.check([1, 2])
    with pytest.raises(ValueError, match="not the string '7'"):
        store.check("7")


def test_an_id_with_two_files_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((3, 4)))
    np.savez(tmp_path / "a.npz", features=np.zeros((3, 4)))
    with pytest.raises(ValueError, match=r"1 ids have two files, .* a\.npy and a\.npz"):
        FeatureStore(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": np.array([1, 2, 3])}, "'offsets' must increase from 0 to 3"),
        ({"offsets": np.array([0, 1, 2])}, "they go from 0 to 2"),
        ({"offsets": np.array([0, 4, 3])}, "decrease in between"),
        ({"offsets": np.array([0, 3])}, "2 ids need 3 whole numbers"),
        ({"ids": np.array(["a", "a"])}, "'a' appears twice"),
        ({"features": np.ones((3, 2), complex)}, "'features' is complex128"),
        ({"scale": np.ones(2)}, r"'scale' is \(2,\); 3 rows of features need as many"),
    ],
)
def test_archives_whose_index_does_not_fit_are_refused(tmp_path, change, message):
    arrays = {"ids": np.array(["a", "b"]), "offsets": np.array([0, 1, 3]), "features": np.ones((3, 2), np.float32)}
    np.savez(tmp_path / "f.npz", **{**arrays, **change})
    with pytest.raises(ValueError, match=rf"f\.npz: {message if message[0] == chr(39) else '.*' + message}"):
        FeatureStore(tmp_path / "f.npz")


def test_archives_are_written_atomically_to_the_given_path(tmp_path):
    path = write_feature_archive(tmp_path / "archive", {"a": [[1, 2, 3]], 5: torch.ones(2, 3)})
    assert path.exists()
    assert FeatureStore(path)["5"].tolist() == [[1, 1, 1]] * 2
    before = path.read_bytes()
    for features, message in [
        ({}, "no ids were given"),
        ({"a": np.ones((2, 3)), "b": np.ones((2, 4))}, r"do not have the width 3: b \(4\)"),
        ({"a": np.full((2, 3), np.nan)}, "NaN"),
        ({"5": np.ones((1, 2)), 5: np.ones((1, 2))}, "the same string"),
        ({None: np.ones((1, 2))}, "must be an id"),
    ]:
        with pytest.raises(ValueError, match=message):
            write_feature_archive(path, features)
        assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["archive"]


def test_a_single_source_and_invalid_numbers_are_refused(tmp_path):
    np.save(tmp_path / "good.npy", np.ones((3, 4)))
    with pytest.raises(ValueError, match=r"kinds must be a list of sources, \[FeatureStore\]"):
        ClipFeatures(FeatureStore(tmp_path))
    for options in ({"max_clips": 0}, {"max_clips": -1}, {"clip_seconds": 0}, {"max_difference": -1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            ClipFeatures([{}], **options)
    with pytest.raises(ValueError, match="max_tokens"):
        TextFeatures(WORDS, max_tokens=0)
    with pytest.raises(ValueError, match="must increase from 0"):
        PooledFeatures({"v": np.ones((2, 1))}, {"v": [1, 0]})["v"]


def test_results_are_cached_and_equal():
    sources = [{"v": clips_of(9, 4), "w": clips_of(7, 4, seed=1)}]
    text = TextFeatures(WORDS)
    rows = [{"qid": q, "vid": v} for q in (1, 2) for v in ("v", "w")] * 2
    kept, fresh = (ClipFeatures(sources, similarity=0, cache_bytes=size) for size in (2**20, 0))
    for collator in (partial(MomentDetrCollator, text=text), partial(UMTCollator, text=text)):
        a, b = (collator(clips)(rows) for clips in (kept, fresh))
        assert all(torch.equal(a[name], b[name]) for name in b)
    assert kept({"vid": "v"}, WORDS["1"], text_id="1") is kept({"vid": "v"}, WORDS["1"], text_id="1")
    computed = []
    counted = ClipFeatures(sources, similarity=0)
    counted._computed = lambda *a, inner=counted._computed: computed.append(a[0]) or inner(*a)
    for _ in range(3):
        MomentDetrCollator(counted, text)(rows)
    assert sorted(computed) == ["v", "v", "w", "w"], "once a pair of video and query"


LONG = {
    "qid": 1, "vid": "v", "duration": 600, "relevant_windows": [[400, 420], [10, 20]],
    "relevant_clip_ids": list(range(200, 210)), "saliency_scores": [[4, 4, 4]] * 5 + [[1, 1, 1]] * 5,
    "clip_scores": [0.0] * 200 + [1.0] * 10 + [0.0] * 90,
}  # fmt: skip


def test_the_collators_clip_length_reaches_the_pairs_and_the_spans():
    row = {"qid": 1, "vid": "v", "relevant_windows": [[20, 30]]}
    source = [{"v": clips_of(30)}]
    for clips, options in (
        (ClipFeatures(source, clip_seconds=1), {}),
        (ClipFeatures(source), {"clip_seconds": 1.0}),
    ):
        batch = MomentDetrCollator(clips, TextFeatures(WORDS), pairs=window_pairs, **options)([row] * 50)
        assert batch["span_labels"][0].tolist() == [[pytest.approx(5 / 6), pytest.approx(1 / 3)]]
        assert set(batch["saliency_pos_labels"].flatten().tolist()) == set(range(20, 30))
        assert not set(batch["saliency_neg_labels"].flatten().tolist()) & set(range(20, 30))
    with pytest.raises(ValueError, match=r"pairs has clip_seconds=2\.0, the collator 1"):
        pairs = partial(window_pairs, clip_seconds=2.0)
        MomentDetrCollator(ClipFeatures(source, clip_seconds=1), TextFeatures(WORDS), pairs=pairs)
    umt = UMTCollator(ClipFeatures(source, clip_seconds=1))([{**row, "relevant_windows": [[20, 99], [40, 50]]}])
    assert umt["boundary_labels"].tolist() == [[[20, 30]]], (
        "what lies after 30 clips of a second is no moment of theirs"
    )


def test_a_long_video_is_kept_whole_unless_told_otherwise():
    text = TextFeatures(WORDS)
    clips = ClipFeatures([{"v": clips_of(300)}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert clips.check([LONG]) == 10
    batch = MomentDetrCollator(clips, text)([LONG])
    assert batch["video_features"].shape == (1, 300, 10)
    assert batch["span_labels"][0, 0].tolist() == pytest.approx([410 / 600, 20 / 600])
    cut = ClipFeatures([{"v": clips_of(300)}], max_clips=75)
    with pytest.warns(UserWarning) as said:
        cut.check([LONG])
    told = " ".join(str(warning.message) for warning in said)
    assert "1 of 1 videos are longer than max_clips=75: 225 of 300 clips are cut (v: 300)" in told
    assert "1 moments lie after the last clip of their video and are dropped (1 [400, 420])" in told
    collator = MomentDetrCollator(cut, text)
    batch = collator([LONG])
    assert batch["span_labels"].tolist() == [[[pytest.approx(0.1), pytest.approx(10 / 150)]]]
    assert collator.dropped_moments == 1
    assert batch["saliency_pos_labels"].tolist() == [[-1, -1]], "its relevant clips were cut away"
    only = {**LONG, "relevant_windows": [[400, 420]]}
    assert collator([only])["span_labels"].shape == (1, 0, 2)
    umt = UMTCollator(cut, text=text)
    batch = umt([LONG])
    assert batch["boundary_labels"].tolist() == [[[10, 20]]]
    assert umt.dropped_moments == 1


def test_tvsum_loses_no_clip_with_default_arguments(reference_data):
    tvsum = load_tvsum(reference_data("data/tvsum/tvsum50.jsonl.xz"))
    clips = ClipFeatures([pool_frames(FeatureStore(reference_data("data/features/tvsum_captions.npz")), tvsum)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clips.check(tvsum)
    batches = [UMTCollator(clips)([row]) for row in tvsum]
    assert sum(int(batch["video_mask"].sum()) for batch in batches) == 6266


def test_streams_and_labels_of_another_rate_are_refused():
    row = {"qid": 1, "vid": "v", "duration": 20, "relevant_windows": [[0, 4]]}
    with pytest.raises(ValueError, match=r"another rate .* v \(20 clips of features, 10 clips long\)"):
        ClipFeatures([{"v": clips_of(20)}]).check([row])
    assert ClipFeatures([{"v": clips_of(20)}], clip_seconds=1).check([row]) == 10
    with pytest.raises(ValueError, match=r"v \(20 clips of features, 10 labelled clips\)"):
        ClipFeatures([{"v": clips_of(20)}]).check([{"vid": "v", "clip_scores": [0.0] * 10}])
    with pytest.raises(ValueError, match="have 10, 20 clips: they differ by more than max_difference=2"):
        ClipFeatures([{"v": clips_of(10)}, {"v": clips_of(20)}])({"vid": "v"})
    video, audio = ClipFeatures([{"v": clips_of(10)}]), ClipFeatures([{"v": clips_of(20)}])
    for run in (UMTCollator(video, audio=audio).check, UMTCollator(video, audio=audio)):
        with pytest.raises(ValueError, match="10 clips of video, 20 of audio"):
            run([{"vid": "v"}])
    with pytest.raises(ValueError, match="10 clips of video, 30 labels"):
        UMTCollator(video)([{"vid": "v", "clip_scores": [0.0] * 30}])
    with pytest.raises(ValueError, match="those of the audio 1 s"):
        UMTCollator(video, audio=ClipFeatures([{"v": clips_of(20)}], clip_seconds=1))
    data = Dataset.from_list([{"vid": "v", "label": [[1]] * 10, "num_frames": 300}])
    with pytest.raises(ValueError, match=r"not have one row every 15 frames: v \(40 rows for 300 frames\)"):
        pool_frames({"v": clips_of(40)}, data)
    with pytest.raises(ValueError, match="10 clips of features and 4 captions"):
        pseudo_queries({"v": ["a"] * 4}, {"v": clips_of(10)}, videos=["v"])


def test_long_texts_are_reported_before_training(tmp_path):
    with pytest.warns(UserWarning, match="1 of 2 texts are longer than max_tokens=2 and lose 1 tokens: 1"):
        TextFeatures(WORDS, max_tokens=2).check([{"qid": 1}, {"qid": 2}])
    collator = How2Collator(
        word_tokenizer("a b"), {"v": clips_of(5)}, decoder_start_token_id=0, max_source_length=2, max_frames=3
    )
    with pytest.warns(UserWarning) as said:
        collator.check([{"video_id": "v", "transcript": "a b a", "summary": "a"}])
    told = [str(warning.message) for warning in said]
    assert told[0] == (
        "1 of 1 transcript entries are longer than max_source_length=2 tokens and lose 1 of them, at most 1"
    )
    assert told[1].startswith("1 of 1 video entries are longer than max_frames=3 frames and lose 2")
    for item, message in [
        ({"video_id": "v", "transcript": None, "summary": "a"}, "'transcript' of 'v' must be a string"),
        ({"video_id": "w", "transcript": "a", "summary": "a"}, "no features of 'w'"),
        ({"video_id": None, "transcript": "a", "summary": "a"}, "must be an id"),
    ]:
        with pytest.raises((ValueError, KeyError), match=message):
            collator([item])
    with pytest.raises(ValueError, match="max_frames must be a whole number"):
        How2Collator(word_tokenizer("a"), {}, decoder_start_token_id=0, max_frames=0)


def test_generated_ids_that_lead_out_of_the_folder_are_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be the name of a file"):
        write_how2_mini(tmp_path / "a", {"s": generate_how2_mini(1, seed=0, prefix="../x")})
    with pytest.raises(ValueError, match="cannot be the name of a file"):
        write_how2_mini(tmp_path / "a", {"../s": generate_how2_mini(1, seed=0)})
    assert not list(tmp_path.iterdir())


RATED = {
    "qid": 1, "vid": "v", "relevant_windows": [[0.0, 4.0]], "relevant_clip_ids": [0, 1],
    "saliency_scores": [[4, 4, 4], [1, 1, 1]],
}  # fmt: skip


def test_arrays_and_tensors_are_taken_where_lists_are():
    def collator():
        return MomentDetrCollator(ClipFeatures([{"v": clips_of(10)}]), TextFeatures(WORDS))

    data = Dataset.from_list([RATED])
    expected = collator()([data[0]])
    for kind in ("torch", "numpy"):
        batch = collator()([data.with_format(kind)[0]])
        assert all(torch.equal(batch[name], expected[name]) for name in expected)
    tensors = ClipFeatures([{"v": torch.from_numpy(clips_of(10)).bfloat16()}])
    assert tensors({"vid": "v"}).dtype == np.float32


def test_rows_without_ratings_give_batches_without_pairs_and_mixed_rows_are_named():
    collator = MomentDetrCollator(ClipFeatures([{"v": clips_of(10)}]), TextFeatures(WORDS))
    unrated = {name: RATED[name] for name in ("qid", "vid", "relevant_windows")}
    for row in (unrated, {**unrated, "relevant_clip_ids": None, "saliency_scores": None}):
        batch = collator([row])
        assert "span_labels" in batch
        assert "saliency_pos_labels" not in batch
    for rows, name in (
        ([RATED, {**RATED, "qid": 2, "relevant_windows": None}], "relevant_windows"),
        ([RATED, {**unrated, "qid": 2}], "relevant_clip_ids"),
    ):
        with pytest.raises(ValueError, match=rf"1 of the 2 rows of a batch have no '{name}' \(qid 2\)"):
            collator(rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"relevant_windows": [[4, 0]]}, "qid 1: 'relevant_windows': the window .* ends before it starts"),
        ({"relevant_windows": [[-1, 2]]}, "qid 1: 'relevant_windows': .* starts before the video"),
        ({"relevant_windows": [[0, float("nan")]]}, "qid 1: 'relevant_windows' holds nan"),
        ({"relevant_clip_ids": [-1, 0]}, "qid 1: 'relevant_clip_ids' holds -1"),
        ({"saliency_scores": [[1, 1, 1]]}, "qid 1: 2 relevant clips, but 1 saliency scores"),
        ({"vid": None}, "'vid' of a row must be an id"),
        ({"qid": None}, "'qid' of a row must be an id"),
    ],
)
def test_invalid_labels_are_named_by_query(change, message):
    collator = MomentDetrCollator(ClipFeatures([{"v": clips_of(10)}]), TextFeatures(WORDS))
    with pytest.raises(ValueError, match=message):
        collator([{**RATED, **change}])


def test_invalid_scores_and_options_are_refused():
    clips = ClipFeatures([{"v": clips_of(3)}])
    for scores in ([0.5, float("nan"), 0], [0.5, 2, 0], [[1], [1], [1]]):
        with pytest.raises(ValueError, match="vid 'v': 'clip_scores'"):
            UMTCollator(clips)([{"vid": "v", "clip_scores": scores}])
    for options in ({"max_windows": 0}, {"clip_seconds": -1}, {"span_loss_type": "l3"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            MomentDetrCollator(clips, TextFeatures(WORDS), **options)
    for rows in ([], {"vid": "v"}, [None]):
        with pytest.raises(ValueError, match="a batch is a list of at least one row"):
            UMTCollator(clips)(rows)


def test_a_clip_is_never_compared_with_itself():
    one = {**RATED, "relevant_clip_ids": [3], "saliency_scores": [[2, 2, 2]]}
    assert annotated_pairs(one, 10, np.random.default_rng(0))[0][0] == 3
    batch = MomentDetrCollator(ClipFeatures([{"v": clips_of(10)}]), TextFeatures(WORDS))([one])
    assert batch["saliency_pos_labels"].tolist() == [[-1, 3]]
    assert batch["saliency_neg_labels"][0, 0] == -1
