"""Readers of the vision-and-language benchmarks, their batches and submissions."""

import json
import lzma
import warnings

import numpy as np
import pytest
import torch

from peft_read.data import (
    MultitaskDataset,
    VLCollator,
    load_coco_captions,
    load_coco_people,
    load_gqa,
    load_how2qa,
    load_kilogram_captions,
    load_kilogram_parts,
    load_nlvr,
    load_nlvr2,
    load_tvc,
    load_tvqa,
    load_vqa,
    load_yc2c,
    resize_frames,
    write_predictions,
)
from peft_read.data.vl_collator import TARGET_LENGTHS, TEXT_LENGTHS
from peft_read.metrics import normalize_vqa_answer

VQA = {
    "question_id": 1,
    "img_id": "COCO_train2014_000000000001",
    "sent": "What is this photo taken looking through?",
    "label": {"net": 1.0, "mesh": 0.3},
    "answer_type": "other",
}
GQA = {"question_id": "07333408", "img_id": "11", "sent": "What is on the white wall?", "label": {"pipe": 1.0}}
NLVR2 = {
    "identifier": "train-10171-0-0",
    "img0": "train-10171-0-img0",
    "img1": "train-10171-0-img1",
    "label": 0,
    "sent": "An image shows one leather pencil case.",
    "uid": "nlvr2_train_0",
}
COCO = {
    "filename": "COCO_val2014_000000000002.jpg", "cocoid": 2, "split": "restval",
    "sentences": [{"raw": "A dog runs."}, {"raw": " The dog is fast. "}],
}  # fmt: skip
SUBTITLES = {
    "v1": "Hello there. We cook rice.",
    "v2": "Hello there. We cook rice.",
    "v3": "Hello there. We cook rice.",
}
TVQA = {
    "qid": 5,
    "vid_name": "v1",
    "q": "What does he do ? ",
    "ts": "1.2-3.4",
    "show_name": "Castle",
    "a0": "He sits.",
    "a1": "He runs",
    "a2": "Nothing. ",
    "a3": "He cooks rice.",
    "a4": "He sleeps",
    "answer_idx": 3,
}
TVC = {
    "clip_id": 7, "vid_name": "v1", "duration": 9.0, "ts": [1.0, 2.5],
    "descs": [
        {"desc_id": 70, "desc": "A man cooks.", "type": "v"},
        {"desc_id": 71, "desc": "He says hello.", "type": "t"},
    ],
}  # fmt: skip
YC2C = {"clip_id": 8, "vid_name": "v3", "duration": 9.0, "descs": [{"desc_id": 80, "desc": "wash the rice"}]}
OBJECT = {"x_loc": 80, "y_loc": 70, "size": 20, "type": "square", "color": "Black"}
NLVR = {
    "sentence": "There is a square.",
    "label": "true",
    "identifier": "12-0",
    "structured_rep": [[OBJECT], [], [OBJECT]],
}
TRIANGLE = [[0, 0], [1, 0], [0, 1]]
SHAPE = {"tangram": "t", "viewbox": [0, 0, 2, 2], "pieces": {str(i): TRIANGLE for i in range(1, 8)}}
PART = {"tangram": "t", "whole": "a boat", "part": {"1": "sail", "2": "UNKNOWN"}, "set": "dense"}
PERSON = {"box_cxcywh": [0.5, 0.5, 0.2, 0.4], "keypoints": [[0.5, 0.5, 2]] * 17}
PEOPLE = {"image_id": 3, "width": 20, "height": 10, "captions": ["A man.", "One man "], "people": [PERSON]}


def array(path, *records):
    path.write_text(json.dumps(list(records)))
    return path


def lines(path, *records):
    path.write_text("\n".join(map(json.dumps, records)))
    return path


class WordTokenizer:
    """White-space words, <s> = 0, pad = 1, </s> = 2; remembers what it was given."""

    pad_token_id = 1

    def __init__(self):
        self.given, self.words = [], {}

    def __call__(self, text, **options):
        self.given.append({"text": text, "kwargs": options})
        ids = [self.words.setdefault(word, 3 + len(self.words)) for word in text.split()]
        return {"input_ids": [0, *ids[: options.get("max_length", 10**6) - 2], 2]}


def readers(folder):
    """The made-up records whose formats are stored, through every reader."""
    second = {
        **VQA,
        "question_id": 2,
        "label": {},
        "img_id": "COCO_val2014_000000000002",
        "sent": "Is it raining on the very long road that goes up and down the hill behind the old red house today?",
    }
    other = {
        **NLVR2,
        "uid": "nlvr2_train_1",
        "identifier": "train-10171-0-1",
        "label": 1,
        "sent": "There are two dogs.",
    }
    how2qa = {name: value for name, value in TVQA.items() if name not in ("a4", "show_name")}
    validation = {**COCO, "split": "val", "sentences": [{"raw": "A cat."}, {"raw": "One cat sits."}]}
    return {
        "vqa": load_vqa(array(folder / "vqa.json", VQA, second)),
        "gqa": load_gqa(array(folder / "gqa.json", GQA)),
        "nlvr": load_nlvr2(array(folder / "nlvr.json", NLVR2, other)),
        "caption_train": load_coco_captions(coco(folder, COCO), "train"),
        "caption_val": load_coco_captions(coco(folder, validation), "val"),
        "tvqa": load_tvqa(lines(folder / "tvqa.jsonl", TVQA), SUBTITLES),
        "how2qa": load_how2qa(lines(folder / "how2qa.jsonl", {**how2qa, "vid_name": "v2"}), SUBTITLES),
        "tvc": load_tvc(lines(folder / "tvc.jsonl", TVC), SUBTITLES),
        "yc2c": load_yc2c(lines(folder / "yc2c.jsonl", YC2C), SUBTITLES),
    }


def coco(folder, *records):
    path = folder / "coco.json"
    path.write_text(json.dumps({"images": list(records)}))
    return path


def test_texts_targets_and_batches_are_those_of_the_original(reference_data, tmp_path):
    stored = json.loads(reference_data("golden/vl_adapter/data/task_formats.json").read_text())
    for name, data in readers(tmp_path).items():
        records, collated = stored["text_formats"][name]["records"], stored["collate"][name]
        assert len(data) == len(records)
        for row, record in zip(data, records, strict=True):
            item, tokenizer = record["item"], WordTokenizer()
            frames = np.zeros((9, 4), np.float32)
            collator = VLCollator(tokenizer, dict.fromkeys(row["visuals"], frames))
            batch = collator([row])
            # GQA's answer is encoded twice there, once for the evaluation
            assert tokenizer.given == record["encoded"][: len(tokenizer.given)]
            assert len(tokenizer.given) == min(2, len(record["encoded"]))
            assert batch["input_ids"].shape == (1, item["input_length"])
            if "target_length" in item:
                assert batch["labels"].shape == (1, item["target_length"])
            else:
                assert "labels" not in batch
            assert row["sentence"] == (item.get("sent", "") if not name.startswith("caption") else "")
            for column, field in (("target", "answer"), ("score", "score"), ("answers", "all_answers")):
                if field in item:
                    assert row[column] == item[field], (name, field)
            if "targets" in item:
                assert row["answers"] == item["targets"]
            if "question_id" in item:
                assert row["id"] == str(item["question_id"])
            if "ts" in item:
                assert [row["start"], row["end"]] == item["ts"]
            visible = item["vis_feats"]
            tokens = visible[0] * visible[1] if len(visible) == 3 else visible[0]
            assert batch["visual_features"].shape == (1, tokens, visible[-1])
            assert batch["visual_boxes"].shape == (1, tokens, 4)
        shapes = collated["shapes"]
        features = {key: np.zeros((9, 4), np.float32) for row in data for key in row["visuals"]}
        batch = VLCollator(WordTokenizer(), features)(list(data))
        assert batch["input_ids"].tolist()[0][-1] == collated["input_ids"][0][-1]
        assert list(batch["input_ids"].shape) == shapes["input_ids"]
        pads = torch.tensor(collated["input_ids"]) == 1
        assert torch.equal(batch["attention_mask"] == 0, pads)
        if collated["target_ids"] is not None:
            assert torch.equal(batch["labels"] == -100, torch.tensor(collated["target_ids"]) == -100)
        assert batch["task"] == shapes["task"]
        if "scores" in shapes:
            assert list(batch["scores"].shape) == shapes["scores"]


def test_the_original_lengths_are_the_defaults():
    assert TEXT_LENGTHS == {"vqa": 20, "gqa": 20, "caption": 40, "tvqa": 600, "how2qa": 600, "tvc": 600, "yc2c": 600}
    assert TARGET_LENGTHS == {"vqa": 10, "caption": 40, "tvqa": 20, "how2qa": 20, "tvc": 20, "yc2c": 20}


def test_official_files_of_vqa_gqa_and_nlvr2(tmp_path):
    asked = {"question_id": 9, "image_id": 42, "question": "How many?"}
    questions, answers = tmp_path / "q.json", tmp_path / "a.json"
    questions.write_text(json.dumps({"data_subtype": "val2014", "questions": [asked]}))
    said = [{"answer": text} for text in ["two"] * 3 + ["2"] + ["three"] * 2 + ["4"] * 4]
    annotation = {"question_id": 9, "answer_type": "number", "answers": said}
    answers.write_text(json.dumps({"annotations": [annotation]}))
    row = load_vqa(questions, answers)[0]
    assert dict(zip(row["answers"], row["scores"], strict=True)) == {"two": 0.9, "2": 0.3, "three": 0.6, "4": 1.0}
    assert (row["target"], row["group"], row["visuals"]) == ("4", "number", ["COCO_val2014_000000000042"])
    assert load_vqa(questions, answers, normalize=normalize_vqa_answer)[0]["answers"] == ["2", "3", "4"]
    assert load_vqa(questions)[0]["target"] is None
    (tmp_path / "g.json").write_text(json.dumps({"07": {"question": "Who?", "imageId": "11", "answer": "he"}}))
    row = load_gqa(tmp_path / "g.json")[0]
    assert (row["id"], row["text"], row["target"], row["visuals"]) == ("07", "gpa: Who?", "he", ["11"])
    pair = {"identifier": "dev-3-1-0", "sentence": "Two dogs.", "label": "True"}
    row = load_nlvr2(lines(tmp_path / "n.json", pair))[0]
    assert (row["target"], row["group"], row["visuals"]) == ("true", "dev-3-1-0", ["dev-3-1-img0", "dev-3-1-img1"])


def test_how2qa_as_its_authors_publish_it(tmp_path):
    path = tmp_path / "how2QA_val_release.csv.xz"
    path.write_bytes(lzma.compress(b'v,[7.2:18.0],10,12,16,"how many, then?",1\nv,[1:2],a,b,c,d,e\n'))
    data = load_how2qa(path, None)
    assert [row["id"] for row in data] == ["v_1", "v_2"]
    assert [row["start"] for row in data] == [7.2, 1.0]
    for row, right in zip(data, ("1", "e"), strict=True):
        assert f"{row['target']}: {right}." in row["text"]
        assert "[Subs]" not in row["text"]
    assert len({load_how2qa(path, None, seed=seed)[0]["target"] for seed in range(20)}) == 4


def test_scenes_tangrams_and_people(tmp_path):
    row = load_nlvr(lines(tmp_path / "n.jsonl", NLVR, {**NLVR, "identifier": "12-1", "label": "false"}))[1]
    assert (row["target"], row["group"], row["text"]) == ("false", "12", "nlvr: There is a square.")
    assert [len(box) for box in row["boxes"]] == [1, 0, 1]
    assert row["boxes"][0][0] == {**OBJECT, "x_loc": 80.0, "y_loc": 70.0, "size": 20.0}
    flat = {**SHAPE, "pieces": {**SHAPE["pieces"], "7": [[0], [0], [1], [0], [0], [1]]}}
    shapes = lines(tmp_path / "s.jsonl", flat)
    second = {**PART, "whole": "a hat", "part": {"1": "tip", "2": "brim"}}
    third = {"tangram": "t", "whole": "a fish", "part_names": ["fin"], "set": "dev_texts"}
    files = lines(tmp_path / "k.jsonl", PART, second, third), shapes
    captions = load_kilogram_captions(*files)
    assert [row["target"] for row in captions] == ["a boat", "a hat", "a fish"] == captions[0]["answers"]
    assert captions[0]["pieces"]["7"] == [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]] == captions[0]["pieces"]["1"]
    assert load_kilogram_captions(*files, each="shape")[0]["target"] is None
    parts = load_kilogram_parts(*files)
    assert [(row["id"], row["target"]) for row in parts] == [("t/1#0", "sail"), ("t/1#1", "tip"), ("t/2#1", "brim")]
    assert [row["answers"] for row in load_kilogram_parts(*files, each="shape")] == [["sail", "tip"], ["brim"]]
    people = lines(tmp_path / "p.jsonl", PEOPLE, {**PEOPLE, "image_id": 4, "people": None})
    data = load_coco_people(people)
    assert [(row["id"], row["target"]) for row in data] == [("3#0", "A man."), ("3#1", "One man")]
    assert data[0]["people"][0]["box_cxcywh"] == PERSON["box_cxcywh"]
    assert [len(row["people"]) for row in load_coco_people(people, each="image", require_people=False)] == [1, 0]


def test_the_published_sets(reference_data):
    """Counts of the files' own descriptions."""
    folder = reference_data("data/vl")
    assert len(load_nlvr(folder / "nlvr" / "test.jsonl")) == 990
    kilogram = folder / "kilogram" / "annotations.jsonl", folder / "kilogram" / "shapes.jsonl"
    data = load_kilogram_captions(*kilogram, each="shape")
    assert len(data) == 435
    assert sum(len(answers) for answers in data["answers"]) == 5453
    data = load_coco_people(folder / "coco_people" / "val2017.jsonl", each="image")
    assert len(data) == 2346
    assert sum(len(people) for people in data["people"]) == 6352
    assert len(load_how2qa(folder / "how2qa" / "how2QA_val_release.csv", None)) == 2852


def test_frames_are_padded_or_pooled_to_a_fixed_length():
    frames = torch.arange(10.0).view(5, 2)
    assert resize_frames(frames, 7).tolist() == [*frames.tolist(), [0, 0], [0, 0]]
    assert torch.equal(resize_frames(frames, 5), frames)
    assert resize_frames(frames, 2).tolist() == [[4, 5], [8, 9]]  # frames 0 to 2, and 2 to 4


def test_images_are_concatenated_and_videos_have_64_tokens(tmp_path):
    data = readers(tmp_path)
    features = {"train-10171-0-img0": np.full((2, 3), 1.0), "train-10171-0-img1": np.full((3, 3), 2.0)}
    boxes = {"train-10171-0-img0": np.full((2, 4), 0.1), "train-10171-0-img1": np.full((3, 4), 0.2)}
    batch = VLCollator(WordTokenizer(), features, boxes=boxes)(list(data["nlvr"]))
    assert batch["visual_features"][0, :, 0].tolist() == [1, 1, 2, 2, 2]
    assert batch["image_ids"].tolist() == [[0, 0, 1, 1, 1]] * 2
    torch.testing.assert_close(batch["visual_boxes"][1, :, 0], torch.tensor([0.1, 0.1, 0.2, 0.2, 0.2]))
    batch = VLCollator(WordTokenizer(), {"v1": np.ones((5, 3))})([data["tvqa"][0]])
    assert batch["visual_features"].sum() == 15
    assert batch["visual_mask"].tolist() == [[1] * 64]
    assert VLCollator(WordTokenizer(), {"v1": np.ones((5, 3))}, video_tokens=None)([data["tvqa"][0]])[
        "visual_features"
    ].shape == (1, 5, 3)


def test_tokens_from_a_function_are_padded_and_masked():
    rows = [{"task": "scene", "id": str(n), "text": "say", "target": "x", "n": n} for n in (1, 3)]
    collator = VLCollator(
        WordTokenizer(), lambda row: (np.ones((row["n"], 2)), np.zeros((row["n"], 4)), [1] * row["n"])
    )
    batch = collator(rows)
    assert batch["visual_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch["image_ids"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch["scores"].tolist() == [1.0, 1.0]
    by_task = VLCollator(WordTokenizer(), {"scene": lambda row: (np.ones((2, 2)),)})
    assert by_task(rows)["visual_boxes"].shape == (2, 2, 4)


def test_answers_are_drawn_by_their_scores(tmp_path):
    data = MultitaskDataset({"vqa": load_vqa(array(tmp_path / "v.json", {**VQA, "label": {"net": 0.9, "mesh": 0.3}}))})
    collator = VLCollator(WordTokenizer(), {VQA["img_id"]: np.ones((1, 2))})
    drawn = []
    for epoch in range(400):
        data.set_epoch(epoch)
        drawn.append(round(float(collator([data[0]])["scores"]), 1))
    assert set(drawn) == {0.9, 0.3}
    assert 0.68 < drawn.count(0.9) / 400 < 0.82  # three quarters, in four standard deviations
    assert collator([{**data[0], "draw": None}])["scores"].tolist() == pytest.approx([0.9])


def test_what_the_lengths_cut_is_reported_before_training(tmp_path):
    data = list(readers(tmp_path)["vqa"])
    collator = VLCollator(WordTokenizer(), {row["visuals"][0]: np.ones((1, 2)) for row in data})
    with pytest.warns(UserWarning, match="1 texts of task 'vqa' are longer than their limit"):
        collator.check(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        VLCollator(WordTokenizer(), collator.visuals, text_lengths={"vqa": None}).check(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visuals": []}, "vqa '1': 'visuals' must name its images"),
        ({"text": None}, "vqa '1': 'text' must be a string"),
        ({"tokens": (np.ones((2, 2)), np.ones((2, 3)))}, r"vqa '1': the boxes must be numbers \(V, 4\)"),
        ({"tokens": (np.ones((2, 2)), np.ones((1, 4)))}, "2 visual tokens, 1 boxes"),
        (
            {"tokens": (np.ones((2, 2)), np.full((2, 4), 17.0))},
            r"a box reaches outside the image \(17 to 17\).*divide",
        ),
        ({"tokens": (np.full((2, 2), np.nan),)}, r"hold NaN or infinite values \(token 0\)"),
        ({"tokens": (np.ones((0, 2)),)}, r"must be numbers \(V, width\), not of the shape \(0, 2\)"),
        ({"tokens": (np.ones((2, 2)), None, [0, -1])}, "image ids must be whole numbers"),
        ({"task": "gqa"}, "a batch holds one task, and these rows are of 'gqa', 'vqa'"),
        ({"target": None}, "1 of the 2 rows of a batch have no target: vqa '1'"),
        ({"score": 2.0}, "'score' must be a number from 0 to 1"),
    ],
)
def test_rows_that_make_no_batch_are_refused(tmp_path, change, message):
    row = {**load_vqa(array(tmp_path / "v.json", VQA))[0], "scores": []}
    stored = {VQA["img_id"]: np.ones((1, 2))}
    visuals = (lambda row: row.get("tokens") or (np.ones((1, 2)),)) if "tokens" in change else stored
    with pytest.raises(ValueError, match=message):
        VLCollator(WordTokenizer(), visuals)([row, {**row, **change}])
    with pytest.raises(KeyError, match="no features of 'x'"):
        VLCollator(WordTokenizer(), stored)([{**row, "visuals": ["x"]}])


PLACE = r"bad\.json.*, (line|entry) 2.*"


@pytest.mark.parametrize(
    ("load", "good", "change", "message"),
    [
        (load_vqa, VQA, {"question_id": 1}, "the question '1' was already given"),
        (load_vqa, VQA, {"question_id": None}, "'question_id' must be an id"),
        (load_vqa, VQA, {"sent": " "}, "'sent' must be a non-empty string"),
        (load_vqa, VQA, {"label": {"net": 7}}, "'label': the score of 'net' must be a number from 0 to 1"),
        (load_vqa, VQA, {"label": ["net"]}, "'label' must be an object"),
        (load_vqa, VQA, {"label": {"": 1}}, "'label' holds a blank answer"),
        (load_vqa, VQA, {"img_id": []}, "'img_id' must be an id"),
        (load_nlvr2, NLVR2, {"label": 2}, "'label' must be true or false, 0 or 1, not 2"),
        (load_nlvr2, NLVR2, {"identifier": "a-b"}, "'identifier' must have four parts"),
    ],
)
def test_entries_of_arrays_are_named(tmp_path, load, good, change, message):
    other = {"question_id": 2, "uid": "u"} if load is load_vqa else {"uid": "u"}
    with pytest.raises(ValueError, match=PLACE + message):
        load(array(tmp_path / "bad.json", good, {**good, **other, **change}))


def load_shapes(path):
    return load_kilogram_captions(lines(path.with_name("k.jsonl"), PART), path)


def load_parts(path):
    return load_kilogram_parts(path, lines(path.with_name("s.jsonl"), SHAPE))


@pytest.mark.parametrize(
    ("load", "good", "change", "message"),
    [
        (
            lambda p: load_tvqa(p, SUBTITLES),
            TVQA,
            {"answer_idx": 5},
            "'answer_idx' must be a number from 0 to 4, not 5",
        ),
        (lambda p: load_tvqa(p, SUBTITLES), TVQA, {"vid_name": "v9"}, "there are no subtitles of the video 'v9'"),
        (lambda p: load_tvqa(p, SUBTITLES), TVQA, {"a4": None}, "'a4' must be a non-empty string"),
        (lambda p: load_tvqa(p, SUBTITLES), TVQA, {"ts": "3-1"}, "'ts' must be 'start-end' in seconds, not '3-1'"),
        (lambda p: load_tvc(p, SUBTITLES), TVC, {"ts": [2, 1]}, r"'ts' must be \[start, end\]"),
        (lambda p: load_tvc(p, SUBTITLES), TVC, {"descs": []}, "'descs' must be a list of objects"),
        (lambda p: load_tvc(p, SUBTITLES), TVC, {"clip_id": 9}, "the caption '70' was already given"),
        (load_nlvr, NLVR, {"structured_rep": [[]]}, "'structured_rep' must be 3 lists"),
        (
            load_nlvr,
            NLVR,
            {"structured_rep": [[{**OBJECT, "x_loc": 90}], [], []]},
            "'x_loc' must be a number from 0 to 80",
        ),
        (
            load_nlvr,
            NLVR,
            {"structured_rep": [[{**OBJECT, "type": "star"}], [], []]},
            "'type' must be one of triangle",
        ),
        (load_nlvr, NLVR, {"label": "yes"}, "'label' must be true or false"),
        (load_shapes, SHAPE, {"pieces": {"1": TRIANGLE}}, "'pieces' must be the pieces 1 to 7"),
        (load_shapes, SHAPE, {"viewbox": [0, 0, 0, 2]}, "'viewbox' must be"),
        (load_shapes, SHAPE, {"pieces": {**SHAPE["pieces"], "3": [[0, 0]]}}, "piece 3 must be at least three corners"),
        (load_parts, PART, {"part": {"9": "x"}}, "'part' must be names of the pieces 1 to 7"),
        (load_parts, PART, {"tangram": "u"}, "'u' has no shape in"),
        (load_coco_people, PEOPLE, {"people": [{**PERSON, "keypoints": []}]}, "person 0: 'keypoints' must be 17 rows"),
        (
            load_coco_people,
            PEOPLE,
            {"people": [{**PERSON, "box_cxcywh": [0.9, 0.5, 0.4, 0.1]}]},
            "'box_cxcywh' ends outside the image",
        ),
        (load_coco_people, PEOPLE, {"captions": ["a", " "]}, "'captions' must be a non-empty string"),
    ],
)
def test_lines_are_named(tmp_path, load, good, change, message):
    other = {name: 99 for name in ("qid", "clip_id", "image_id") if name in good}
    other |= {"identifier": "13-0"} if good is NLVR else {}
    other |= {"tangram": "t2"} if good is SHAPE else {}
    with pytest.raises(ValueError, match=PLACE + message):
        load(lines(tmp_path / "bad.jsonl", good, {**good, **other, **change}))


def test_files_of_another_kind_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'images' was expected"):
        load_coco_captions(array(tmp_path / "c.json", COCO), "train")
    with pytest.raises(ValueError, match="split must be one of 'train', 'val', 'test'"):
        load_coco_captions(coco(tmp_path, COCO), "restval")
    with pytest.raises(ValueError, match="must be a list of JSON objects"):
        load_vqa(array(tmp_path / "e.json"))
    with pytest.raises(ValueError, match="entry 1: a JSON object was expected, not 3"):
        load_vqa(array(tmp_path / "n.json", 3))
    with pytest.raises(ValueError, match="'data_subtype' must name the images"):
        load_vqa(lines(tmp_path / "o.json", {"questions": []}))
    with pytest.raises(ValueError, match=r"h\.csv, line 1: 3 columns, not 7"):
        (tmp_path / "h.csv").write_text("a,b,c\n")
        load_how2qa(tmp_path / "h.csv", None)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_gqa(tmp_path / "none.json")
    with pytest.raises(ValueError, match="names no piece by its number"):
        named = {"tangram": "t", "whole": "x", "part_names": ["y"]}
        load_kilogram_parts(lines(tmp_path / "k.jsonl", named), lines(tmp_path / "s.jsonl", SHAPE))


def test_submissions_are_in_each_benchmark_s_form(tmp_path):
    data, path = readers(tmp_path), tmp_path / "out"

    def written(task, rows, *predictions):
        return write_predictions(path, task, rows, predictions).read_text()

    assert json.loads(written("vqa", data["vqa"], "net", " yes ")) == [
        {"question_id": 1, "answer": "net"},
        {"question_id": 2, "answer": "yes"},
    ]
    assert json.loads(written("gqa", data["gqa"], "pipe")) == [{"questionId": "07333408", "prediction": "pipe"}]
    assert written("nlvr", data["nlvr"], "true", "no") == "train-10171-0-0,True\ntrain-10171-0-1,False\n"
    assert json.loads(written("caption", data["caption_val"], "A cat.")) == [{"image_id": 2, "caption": "A cat."}]
    assert json.loads(written("tvqa", data["tvqa"], "a3")) == {"5": 3}
    assert json.loads(written("how2qa", data["how2qa"], "rice")) == {"5": 0}
    clip = {key: value for key, value in TVC.items() if key != "descs"}
    unlabelled = load_tvc(lines(tmp_path / "t.jsonl", clip), SUBTITLES)
    expected = {"vid_name": "v1", "clip_id": "7", "ts": [1.0, 2.5], "descs": [{"desc": "he cooks"}]}
    assert [json.loads(line) for line in written("tvc", unlabelled, "he cooks").splitlines()] == [expected]
    expected = {"vid_name": "v3", "clip_id": "8", "descs": [{"desc": "rice"}]}
    assert json.loads(written("yc2c", data["yc2c"], "rice")) == expected


def test_invalid_submissions_leave_the_file_unchanged(tmp_path):
    data, path = readers(tmp_path), tmp_path / "out"
    path.write_text("before")
    for task, rows, predictions, message in [
        ("vcr", data["vqa"], ["a", "b"], "task must be one of"),
        ("vqa", data["vqa"], ["a"], "2 rows and 1 predictions"),
        ("vqa", data["vqa"], ["a", None], "the prediction of '2' must be a string"),
        ("vqa", [{"id": "x"}], ["a"], "the id 'x' must be a whole number"),
        ("gqa", [data["gqa"][0]] * 2, ["a", "b"], "1 ids appear twice, such as 07333408"),
        ("tvc", data["tvc"], ["a", "b"], "1 ids appear twice, such as 7"),
    ]:
        with pytest.raises(ValueError, match=message):
            write_predictions(path, task, rows, predictions)
    assert path.read_text() == "before"
