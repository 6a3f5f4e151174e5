"""The grounding scripts with bad input, ids that are no file names, caches of another encoder."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from test_grounding_examples import TINY, ground_moments, grounding_data, pretrain_grounding, qvhighlights, write_jsonl

from peft_read.data import (
    ClipFeatures,
    FeatureStore,
    SentenceEncoder,
    TextFeatures,
    ranked_pairs,
    write_feature_archive,
)

import grounding_measures  # isort: skip
from test_grounding_examples import world  # noqa: F401 isort: skip


def said(script, arguments, monkeypatch):
    """What the script says when it ends: one line, no traceback."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        script.run_script(f"{script.__name__}.py", script.prepare)
    assert isinstance(end.value.code, str)
    assert end.value.code.startswith(f"{script.__name__}.py: ")
    assert "\n" not in end.value.code
    return end.value.code


def records_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_every_kind_of_bad_input_is_one_line(world, tmp_path, monkeypatch):  # noqa: F811
    def ends(*arguments, says):
        given = qvhighlights(world, *arguments, "--output_dir", tmp_path / "out")
        assert says in said(ground_moments, given, monkeypatch)
        assert not (tmp_path / "out" / "trained").exists()

    for name in ("num_train_samples", "num_validation_samples", "num_test_samples", "max_clips", "max_tokens", "r"):
        for value in (0, -1):
            ends(f"--{name}", value, says=f"--{name} {value} must be at least 1")
    ends("--num_train_samples", "many", says="invalid int value")
    ends("--unknown", 1, says="--unknown")
    ends("--learning_rate", "nan", says="--learning_rate nan is not a finite number")
    ends("--per_device_train_batch_size", 0, says="--per_device_train_batch_size 0 must be at least 1")
    ends("--num_train_epochs", 0, says="trains nothing")
    ends("--clip_seconds", 0, says="--clip_seconds 0.0 must be positive")
    ends("--clip_seconds", 1, says="another rate than their annotations")
    ends("--pvla_weight", "inf", says="--pvla_weight inf is not a finite number")
    ends("--pvla_blocks", "first", says="--pvla_blocks 'first'")
    ends("--nms_threshold", 3, says="--nms_threshold 3.0 must be at most 1")
    ends("--target_modules", "(", says="is not a regular expression")
    ends("--target_modules", "nothing", says="`target_modules`='nothing' is a string, so a regular expression")
    ends("--cell", "transformer", says="transformer")
    ends("--model_options", "{", says="--model_options '{' is not valid JSON")
    ends("--model_options", '{"d_modle": 3}', says="must be a JSON object with fields of")
    ends("--model_options", '{"d_model": 15}', says="d_model (15)")
    ends("--model_options", "[1]", says="must be a JSON object")
    ends("--domain", "BK", says="--domain has no meaning with --dataset qvhighlights")
    ends("--test_video", "t0", says="--test_video has no meaning")
    ends("--validation_file", world["test"], says="leave out --validation_file")
    ends("--text_features", tmp_path, says="pass one of them")
    ends("--audio_features", world["features"], says="Moment-DETR has one stream")
    ends("--video", "v", says="--video and --predict_features have no meaning without --predict")
    ends("--features", f"{world['features']},", says="names an empty place")
    ends("--features", f"{world['features']},{world['features']}", says="unclear which to read")
    ends("--features", tmp_path / "none.npz", says="neither a folder of features nor a feature archive")
    ends("--model_name_or_path", world["folder"] / "encoder", says="no Moment-DETR and no UMT")
    ends("--projection", tmp_path / "pca.npz", says="pca.npz does not exist")
    ends("--train_file", tmp_path / "none.jsonl", says="none.jsonl does not exist")
    rows = records_of(world["all"])
    for change, words in [
        ({"relevant_windows": [[20, 10]]}, "bad.jsonl, line 18: 'relevant_windows'"),
        ({"saliency_scores": [[9] * 3] * 5}, "bad.jsonl, line 18: 'saliency_scores' holds 9"),
        ({"qid": None}, "bad.jsonl, line 18: 'qid'"),
        ({"vid": "source8_7.0_40.0"}, "1 ids have no features: source8_7.0_40.0"),
    ]:
        bad = write_jsonl(tmp_path / "bad.jsonl", [*rows[:-1], {**rows[-1], **change}])
        ends("--num_train_samples", 14, "--num_validation_samples", 4, "--train_file", bad, says=words)
    for arguments, words in [
        (["--predict", "red dog"], "--predict needs --video"),
        (["--predict", "red dog", "--video", "v", "--output_dir", tmp_path / "no"], "folder of a finished run"),
    ]:
        assert words in said(ground_moments, arguments, monkeypatch)
    (tmp_path / "results.json").write_text("{")
    arguments = ["--predict", "red dog", "--video", "v", "--output_dir", tmp_path]
    assert "results.json is not a result of this script" in said(ground_moments, arguments, monkeypatch)


def test_bad_input_of_the_pretraining_is_one_line(world, tmp_path, monkeypatch):  # noqa: F811
    def ends(*arguments, says, captions=None):
        given = qvhighlights(world, "--captions", captions or world["captions"], *arguments)
        assert says in said(pretrain_grounding, [*given, "--output_dir", tmp_path / "out"], monkeypatch)

    ends("--per_video", 0, says="--per_video must be a whole number from 1 on")
    ends("--min_clips", 99, says="no pseudo-query could be made")
    ends("--threshold", "nan", says="--threshold must be a finite number")
    rows = records_of(world["captions"])
    twice = write_jsonl(tmp_path / "twice.jsonl", [*rows, rows[0]])
    ends(says="twice.jsonl, line 25: the video 'source0_0.0_40.0' was already given", captions=twice)
    short = write_jsonl(tmp_path / "short.jsonl", [{**row, "captions": row["captions"][:3]} for row in rows])
    ends(says="20 clips of features and 3 captions", captions=short)
    words = write_jsonl(tmp_path / "words.jsonl", [{**row, "captions": "red"} for row in rows])
    ends(says="words.jsonl, line 1: 'captions' must be a list of strings", captions=words)


def test_ids_that_lead_out_of_the_output_folder_stay_in_it(world, tmp_path):  # noqa: F811
    ids = ["../outside", str(tmp_path / "absolute"), "a\\b", "C:c", "ü" * 300]
    generator = np.random.default_rng(0)
    records = [
        {"vid": vid, "query": "red", "domain": "BK", "label": generator.integers(1, 6, size=(9, 20)).tolist(),
         "n_frames": 270} for vid in ids
    ]  # fmt: skip
    frames = write_feature_archive(tmp_path / "f.npz", {vid: generator.normal(size=(18, 16)) for vid in ids})
    output = tmp_path / "deep" / "output"
    arguments = ["--dataset", "tvsum", "--domain", "BK", "--train_file", write_jsonl(tmp_path / "t.jsonl", records)]
    arguments += ["--features", str(frames), *world["encoder"], *TINY, "--method", "bias", "--max_steps", "1"]
    result = ground_moments.main([*arguments, "--pictures", "0", "--output_dir", str(output)])
    assert sorted(result["folds"]) == sorted(ids)
    assert {path.name for path in tmp_path.iterdir()} == {"deep", "t.jsonl", "f.npz"}
    assert {path.name for path in output.parent.iterdir()} == {"output"}
    folders = [path for path in output.iterdir() if path.is_dir()]
    assert len(folders) == len(ids)
    assert all((folder / "submission_test.jsonl").is_file() for folder in folders)


def test_a_text_cache_belongs_to_everything_that_made_it(world, tmp_path, caplog):  # noqa: F811
    np.savez(tmp_path / "pca.npz", mean=np.zeros(16), components=np.eye(16)[:4])
    np.savez(tmp_path / "other.npz", mean=np.ones(16), components=np.eye(16)[:4])
    texts = ["red dog", "blue car green cat"]

    def encoded(**changes):
        options = {"text_encoder": world["encoder"][1], "text_cache": str(tmp_path / "text.npz"), **changes}
        return grounding_data.encode(texts, grounding_data.DataArguments(**options))

    variants = [{}, {"projection": str(tmp_path / "pca.npz")}, {"projection": str(tmp_path / "other.npz")}]
    variants += [{"max_tokens": 2}]
    fresh = [encoded(**variant, text_cache=None) for variant in variants]
    for variant, expected in zip(variants * 2, fresh * 2, strict=True):
        for _ in range(2):  # made, and taken from the cache
            actual = encoded(**variant)
            assert all(np.array_equal(actual[text], expected[text]) for text in texts)
    assert "made by another encoder, projection or length" in caplog.text
    assert "1 of 2 texts have more than max_tokens=2 tokens and were cut" in caplog.text
    before = FeatureStore(world["features"])
    with pytest.raises(ValueError, match="is a file of another kind"):
        encoded(text_cache=world["features"])
    assert list(FeatureStore(world["features"])) == list(before)


def test_the_cache_spares_the_encoder_and_grows(world, tmp_path, monkeypatch):  # noqa: F811
    asked = []
    tokens = SentenceEncoder.tokens
    monkeypatch.setattr(
        SentenceEncoder, "tokens", lambda self, texts: asked.append(list(texts)) or tokens(self, texts)
    )
    arguments = grounding_data.DataArguments(
        text_encoder=world["encoder"][1], text_cache=str(tmp_path / "cache" / "text.npz")
    )
    for texts in (["red"], ["red", "blue dog"], ["blue dog"]):
        assert list(grounding_data.encode(texts, arguments)) == texts
    assert asked == [["red"], ["blue dog"], []]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["text.npz"]


def test_invalid_texts_and_projections_are_named(world, tmp_path):  # noqa: F811
    encoder = SentenceEncoder(world["encoder"][1])
    for texts, message in [("red", "a list of strings"), ([None], "non-empty strings"), ([" "], "non-empty strings")]:
        with pytest.raises(ValueError, match=message):
            encoder.tokens(texts)
    for arrays, message in [
        ({"mean": np.zeros(3), "components": np.eye(16)}, r"'mean' is float64 \(3,\)"),
        ({"mean": np.zeros(16), "components": np.full((4, 16), np.nan)}, "NaN or infinite"),
        ({"mean": np.zeros(8), "components": np.ones((4, 8))}, "projects 8 numbers, the encoder gives 16"),
    ]:
        np.savez(tmp_path / "p.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            SentenceEncoder(world["encoder"][1], projection=tmp_path / "p.npz")
    with pytest.raises(ValueError, match="max_tokens must be a whole number"):
        SentenceEncoder(world["encoder"][1], max_tokens=0)


def test_moments_without_ratings_are_trained_and_measured(world, tmp_path):  # noqa: F811
    rows = records_of(world["test"])
    moments = [{k: v for k, v in row.items() if k not in ("saliency_scores", "relevant_clip_ids")} for row in rows]
    test = write_jsonl(tmp_path / "moments.jsonl", moments)
    arguments = ["--method", "bias", "--max_steps", "1", "--eval_strategy", "no", "--save_strategy", "no"]
    arguments += ["--test_file", test, "--pictures", "0", "--output_dir", str(tmp_path / "out")]
    result = ground_moments.main(qvhighlights(world, *arguments))
    assert 0 <= result["test"]["MR-full-mAP"] <= 100
    assert not any(name.startswith("HL") for name in result["test"])


def test_pairs_depend_on_the_batch_alone_in_worker_processes_too(monkeypatch):
    vectors = {name: np.random.default_rng(i).normal(size=(9, 4)).astype(np.float32) for i, name in enumerate("ab")}
    clips, text = ClipFeatures([vectors], similarity=None), TextFeatures(vectors, key="vid")
    rows = [{"vid": name, "query": name, "clip_scores": np.linspace(0, 1, 9).tolist()} for name in "ab"]

    def pairs():
        collator = grounding_data.SeededByBatch(clips, text, pairs=ranked_pairs, seed=3)
        return [collator(rows)[f"saliency_{side}_labels"].tolist() for side in ("pos", "neg")]

    expected = pairs()
    for seed in (1, 2):
        worker = SimpleNamespace(seed=seed)
        monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda worker=worker: worker)
        assert pairs() == expected


@pytest.mark.parametrize("dataset", ["tvsum", "youtube_highlights"])
def test_clips_after_the_last_label_are_not_measured(dataset):
    key = "label" if dataset == "tvsum" else "match"
    labels = [[[5], [1], [2]]] if dataset == "tvsum" else [[1, -1, 0]]
    rows = Dataset.from_dict({"vid": ["a"], key: labels})
    longer, equal = ([{"pred_saliency_scores": [0.9, 0.1, 0.3, 0.8][:n]}] for n in (4, 3))
    found = grounding_measures.figures(dataset, longer, rows, 2.0)
    assert found == grounding_measures.figures(dataset, equal, rows, 2.0)
