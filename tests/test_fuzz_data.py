"""Malformed annotations, texts, features, records and rows: the right value, or one line of ours with the place."""

import contextlib
import copy
import gzip
import io
import json
import lzma
import math
import traceback
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import peft_read
from peft_read.data import (
    ClipFeatures,
    FeatureStore,
    MomentDetrCollator,
    TextFeatures,
    UMTCollator,
    annotated_pairs,
    load_how2,
    load_qvhighlights,
    load_tvsum,
    load_youtube_highlights,
    ranked_pairs,
    window_pairs,
    write_feature_archive,
)
from peft_read.metrics import (
    content_f1,
    evaluate_qvhighlights,
    rouge_scores,
    tvsum_map,
    youtube_highlights_map,
)
from peft_read.spans import temporal_nms

PACKAGE = str(Path(peft_read.__file__).parent)
FEW = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

QUERY = {
    "qid": 1, "query": "a dog", "vid": "v", "duration": 10, "relevant_windows": [[0, 4]], "relevant_clip_ids": [0, 1],
    "saliency_scores": [[1, 2, 3], [2, 2, 2]],
}  # fmt: skip
TVSUM = {"vid": "t", "query": "cars", "domain": "BK", "label": [[1, 5, 3], [2, 4, 4]], "n_frames": 100}
YOUTUBE = {"vid": "y", "domain": "dog", "fps": 25.0, "frames": "200", "clip": [[0, 100], [50, 150]], "match": [-1, 1]}

junk = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(
        [
            *(
                math.nan,
                math.inf,
                -math.inf,
                -1,
                0,
                1.5,
                10**30,
                2**63,
                1e308,
                "",
                " ",
                "x",
                "\0",
                "\ud800",
                "é",
                "-1",
            ),
            *([], {}, [[]], [None], [[1]], [[4, 0]], [[0, math.nan]], [[-2, 4]], [[0, 4, 1]], [["a", "b"]], [0, 0]),
            *([[9, 9, 9], [1, 1, 1]], [[1, 2, 3]], [[0, 1e9]], [True, False], {"a": 1}, [[[1]]], [-1], [0.5], 7, [7]),
        ]
    ),
    st.lists(st.floats(), max_size=3),
    st.lists(st.lists(st.integers(-2, 9), max_size=3), max_size=3),
)


def outcome(run, *names):
    """What the call gives; None after an error of ours on one line that holds one of the names."""
    try:
        return run()
    except (ValueError, KeyError, OSError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        assert frames[-1].filename.startswith(PACKAGE), f"raised by {frames[-1]}: {error!r}"
        text = str(error)
        assert "\n" not in text, text
        assert any(name in text for name in names), text
        return None


def mutated(draw, record):
    record = copy.deepcopy(record)
    for field in draw(st.lists(st.sampled_from(sorted(record)), min_size=1, max_size=2, unique=True)):
        if draw(st.booleans()):
            record[field] = draw(junk)
        else:
            del record[field]
    return record


records = st.composite(mutated)


def finite(value):
    """No NaN or infinity anywhere in lists and dicts."""
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(finite, value))
    return not isinstance(value, float) or math.isfinite(value)


@FEW
@given(record=records(QUERY), again=st.booleans(), labels=st.booleans())
def test_qvhighlights_records(tmp_path, record, again, labels):
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in [{**QUERY, "qid": 5}, record, *[record] * again]))
    data = outcome(lambda: load_qvhighlights(path, require_labels=labels), "q.jsonl, line ")
    if data is None:
        return
    row = data[1]
    assert not again
    assert finite(row)
    assert row["duration"] > 0
    assert all(0 <= start < end <= max(row["duration"], 2) for start, end in row["relevant_windows"] or ())
    assert all(0 <= value <= 1 for value in row["clip_scores"] or ())
    assert labels is False or row["clip_scores"]


@FEW
@given(record=records(TVSUM), as_json=st.booleans())
def test_tvsum_records(tmp_path, record, as_json):
    path = tmp_path / ("t.json" if as_json else "t.jsonl")
    key = record.get("vid") if isinstance(record.get("vid"), str) else "t"
    text = json.dumps({key: record, "other": TVSUM}) if as_json else "\n".join(map(json.dumps, (record, TVSUM)))
    path.write_text(text)
    data = outcome(lambda: load_tvsum(path), path.name)
    if data is not None:
        assert finite(data[:])
        assert all(0 <= value <= 1 for row in data for value in row["clip_scores"])


@FEW
@given(record=records(YOUTUBE), as_json=st.booleans())
def test_youtube_records(tmp_path, record, as_json):
    path = tmp_path / ("y.json" if as_json else "y.jsonl")
    path.write_text(json.dumps({"y": record}) if as_json else json.dumps(record))
    data = outcome(lambda: load_youtube_highlights(path), path.name)
    if data is not None:
        assert finite(data[:])
        assert len(data[0]["match"]) == len(data[0]["clip_seconds"])


def damaged(draw, content):
    """Bytes of a file, cut off, overwritten or with something in between."""
    position = draw(st.integers(0, len(content)))
    piece = draw(st.sampled_from([b"", b"\0", b"\xff", b"\xef\xbb\xbf", b"\n", b"{", b"]", b'"', b",", b" ", b"NaN"]))
    return content[:position] + piece + content[position + draw(st.sampled_from([0, 1, 5, len(content)])) :]


READERS = {
    "q.jsonl": (load_qvhighlights, json.dumps(QUERY)),
    "t.json": (load_tvsum, json.dumps({"t": TVSUM})),
    "y.json": (load_youtube_highlights, json.dumps({"y": YOUTUBE}, indent=1)),
}


@pytest.mark.parametrize("name", READERS)
@FEW
@given(draw=st.data(), packing=st.sampled_from(["", ".gz", ".xz"]))
def test_damaged_annotation_files(tmp_path, name, draw, packing):
    reader, text = READERS[name]
    packed = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[packing](text.encode())
    path = tmp_path / (name + packing)
    path.write_bytes(damaged(draw.draw, packed))
    data = outcome(lambda: reader(path), name)
    assert data is None or finite(data[:])


@FEW
@given(draw=st.data())
def test_damaged_how2_files(tmp_path, draw):
    folder = tmp_path / "split"
    folder.mkdir(exist_ok=True)
    text = "a some words\nb others é\n".encode()
    (folder / "tran.tok.txt").write_bytes(damaged(draw.draw, text))
    (folder / "desc.tok.txt").write_bytes(text)
    data = outcome(lambda: load_how2(tmp_path, "split"), "tran.tok.txt", "desc.tok.txt")
    assert data is None or (data["video_id"][:] == ["a", "b"] and all(map(str.strip, data["transcript"])))


def npz_bytes(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def npy_bytes(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


ARCHIVE = {"ids": np.array(["a", "b"]), "offsets": np.array([0, 1, 3]), "features": np.ones((3, 2), np.float32)}
arrays = st.sampled_from(
    [
        *(np.array(["a", "a"]), np.array([0, 1]), np.array([0, 1, 2]), np.array([1, 2, 3]), np.array([0, 3, 1])),
        *(np.array([0, 1, 4]), np.array([0.0, 1.0, 3.0]), np.ones((2, 2)), np.ones(3), np.ones((3, 2), np.int8)),
        *(np.ones((3, 2), complex), np.full((3, 2), np.nan), np.array([["a"]]), np.array(5), np.zeros((3, 0))),
        *(np.array([True, False]), np.array(["a", "b", "c"]), np.array([[0, 1, 3]])),
    ]
)


@FEW
@given(name=st.sampled_from(["ids", "offsets", "features", "scale"]), array=arrays, drop=st.booleans())
def test_archives_whose_arrays_do_not_fit(tmp_path, name, array, drop):
    changed = {**ARCHIVE, name: array}
    if drop:
        del changed[name]
    path = tmp_path / "archive.npz"
    path.write_bytes(npz_bytes(**changed))
    width = outcome(lambda: FeatureStore(path).check(["a", "b"]), "archive.npz")
    if width is not None:
        store = FeatureStore(path)
        assert [len(store[key]) for key in ("a", "b")] == np.diff(changed["offsets"]).tolist()
        assert all(np.isfinite(store[key]).all() for key in ("a", "b"))


@FEW
@given(draw=st.data(), packed=st.booleans())
def test_damaged_feature_files(tmp_path, draw, packed):
    good = np.arange(6, dtype=np.float32).reshape(3, 2)
    folder = tmp_path / str(packed)
    folder.mkdir(exist_ok=True)
    content = npz_bytes(features=good) if packed else npy_bytes(good)
    (folder / ("a.npz" if packed else "a.npy")).write_bytes(damaged(draw.draw, content))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's own, of headers that it can repair
        width = outcome(lambda: FeatureStore(folder).check(["a", "b"]), str(folder))
    assert width is None, "b is missing"


PREDICTION = {"qid": 1, "pred_relevant_windows": [[0, 4, 0.9], [2, 6, 0.1]], "pred_saliency_scores": [0.1, 0.2, 0.3]}


@FEW
@given(prediction=records(PREDICTION), truth=records(QUERY), which=st.sampled_from(["both", "prediction", "truth"]))
def test_qvhighlights_metric(prediction, truth, which):
    prediction = PREDICTION if which == "truth" else prediction
    truth = QUERY if which == "prediction" else truth
    names = ("query ", "record 0", "qid", "predictions", "no query")
    result = outcome(lambda: evaluate_qvhighlights([prediction], [truth]), *names)
    if result is not None:
        figures = [value for name, value in result["brief"].items() if "full" in name or "HL" in name]
        assert figures
        assert finite(figures)


@FEW
@given(scores=junk, labels=junk)
def test_highlight_metrics(scores, labels):
    for metric, good in ((tvsum_map, [[5], [1]]), (youtube_highlights_map, [1, -1])):
        for pair in (([scores], [good]), ([[0.1, 0.2]], [labels]), (scores, labels)):
            result = outcome(lambda metric=metric, pair=pair: metric(*pair), "video", "lists")
            assert result is None or 0 <= result <= 1


@FEW
@given(
    row=records({**QUERY, "clip_scores": [0.5, 1.0, 0.0, 0.0, 0.0]}), kind=st.sampled_from(["list", "torch", "numpy"])
)
def test_collators(row, kind):
    convert = {"list": lambda v: v, "torch": torch.tensor, "numpy": np.array}[kind]
    for field in ("relevant_windows", "clip_scores", "saliency_scores"):
        with contextlib.suppress(Exception):  # what is not a table stays as it is
            row[field] = convert(row[field])
    clips = ClipFeatures([{"v": np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)}], similarity=0)
    text = TextFeatures({"1": np.ones((2, 3), np.float32)})
    for pairs in (annotated_pairs, window_pairs, ranked_pairs):
        collator = MomentDetrCollator(clips, text, pairs=pairs)
        batch = outcome(lambda collator=collator: collator([row]), "qid", "vid", "no features")
        if batch is not None:
            assert all(value.isfinite().all() for value in batch.values())
            spans = batch.get("span_labels", torch.zeros(1, 0, 2))
            assert ((spans >= 0) & (spans <= 1)).all()
            assert batch.get("saliency_pos_labels", torch.zeros(1)).max() < 5
    batch = outcome(lambda: UMTCollator(clips, text=text)([row]), "qid", "vid", "no features", "'v'")
    assert batch is None or all(value.isfinite().all() for value in batch.values())


@FEW
@given(texts=st.one_of(junk, st.lists(st.text(max_size=8), min_size=1, max_size=3)))
def test_rouge(texts):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for variant in ("easy_rouge", "rouge_score"):
            result = outcome(lambda variant=variant: rouge_scores(texts, texts, variant), "prediction", "reference")
            assert result is None or all(0 <= value <= 100 + 1e-9 for value in result.values())


@FEW
@given(row=st.text("0123456789: \t.x", max_size=12))
def test_content_f1_rows(row):
    text = f"title\na dog runs\nthe dog walks\nheader\n{row}\n\n"
    result = outcome(lambda: content_f1(text), "item ")
    assert result is None or 0 <= result <= 9


@FEW
@given(windows=st.lists(st.lists(st.floats(), min_size=2, max_size=4), max_size=4), threshold=st.floats())
def test_suppression(windows, threshold):
    kept = outcome(lambda: temporal_nms(windows, threshold), "temporal_nms")
    assert kept is None or finite(kept)


@FEW
@given(features=st.dictionaries(st.one_of(st.text(max_size=3), st.integers(-1, 3), st.none()), arrays, max_size=2))
def test_what_is_written_is_read(tmp_path, features):
    path = tmp_path / "written.npz"
    path.unlink(missing_ok=True)
    if outcome(lambda: write_feature_archive(path, features), "written.npz", "archive") is None:
        assert not path.exists()
    else:
        store = FeatureStore(path)
        assert {key: len(store[key]) for key in store} == {str(key): len(rows) for key, rows in features.items()}
