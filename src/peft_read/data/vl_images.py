"""VQAv2, GQA, NLVR2 and COCO captions in their published formats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..values import count, id_of, shown
from .jsonl import Record
from .vl_examples import (
    TASK_PROMPTS,
    ExampleReader,
    best_of,
    example,
    label_of,
    read_array,
    read_json,
    read_records,
    records_of,
)

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["load_coco_captions", "load_gqa", "load_nlvr2", "load_vqa"]

COCO_SPLITS = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}
TRUTH = {"true": "true", "false": "false", "1": "true", "0": "false"}
AGREEING = 3  # an answer is right if so many annotators gave it
SHARE = 0.3  # of the score for each of them, as VQA's labels are published


def load_vqa(
    questions: str | Path,
    annotations: str | Path | None = None,
    *,
    prompt: str = TASK_PROMPTS["vqa"],
    normalize: Callable[[str], str] | None = None,
) -> Dataset:
    """Reads VQAv2 in its published format, or in the form of the Karpathy split that LXMERT and VL-T5 share.

    Sources: Goyal et al., CVPR 2017; Tan and Bansal, EMNLP 2019.

    Args:
        questions: a JSON array of objects with `question_id`, `img_id`, `sent`, `label` {answer: score} and perhaps
            `answer_type`; or the official file of questions, `{"data_subtype", "questions": [...]}`.
        annotations: the official file of annotations, `{"annotations": [...]}`, to the official questions; None: no
            labels. Ten answers become scores: 0.3 for each annotator who gave it, at most 1.
        prompt: before the question.
        normalize: applied to the official answers before they are counted, such as
            `peft_read.metrics.normalize_vqa_answer`; None: as they are.

    Returns:
        A dataset with the columns of `example`: `answers` and `scores` of the label, `target` the first of the best
        (`VLCollator` draws by score in training), `group` the type of answer.

    Raises:
        FileNotFoundError: no such file.
        ValueError: by file and entry, a field that is missing, duplicate or invalid.
    """
    reader = ExampleReader()
    given = read_json(questions)
    if isinstance(given, list):
        if annotations is not None or normalize is not None:
            raise ValueError(
                f"{questions} holds its labels: annotations and normalize belong to the official questions"
            )
        entries = records_of(given, questions)
    else:
        entries = _official_vqa(given, questions, annotations, normalize)
    return reader.dataset(_labelled("vqa", entries, reader, prompt))


def load_gqa(questions: str | Path, *, prompt: str = TASK_PROMPTS["gqa"]) -> Dataset:
    """Reads GQA in its published format, or in the form that LXMERT and VL-T5 share.

    Source: Hudson and Manning, CVPR 2019.

    Args:
        questions: a JSON array of objects with `question_id`, `img_id`, `sent` and `label` {answer: score}; or the
            official `{question id: {"question", "imageId", "answer"}}`.
        prompt: before the question; misspelt as in the original.

    Returns:
        A dataset with the columns of `example`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: as `load_vqa`.
    """
    reader = ExampleReader()
    records = []
    for record in read_records(questions, key="question_id"):
        if "question" in record:
            fields: dict[str, Any] = {name: record.get(name) for name in ("question_id",)}
            fields |= {"sent": record["question"], "img_id": record.get("imageId")}
            if "answer" in record:
                fields["label"] = {record.text("answer"): 1.0}
            record = Record(fields, record.place)
        records.append(record)
    return reader.dataset(_labelled("gqa", records, reader, prompt))


def load_nlvr2(annotations: str | Path, *, prompt: str = TASK_PROMPTS["nlvr"]) -> Dataset:
    """Reads NLVR2 in its published format, or in the form that LXMERT and VL-T5 share.

    Source: Suhr et al., ACL 2019.

    Args:
        annotations: a JSON array of objects with `identifier`, `img0`, `img1`, `sent`, `uid`, `label` 0 or 1; or the
            official file, an object per line with `identifier`, `sentence`, `label` "True" or "False", whose images
            are `<identifier without its last part>-img0` and `-img1`.
        prompt: before the statement.

    Returns:
        A dataset with the columns of `example`: two `visuals`, `target` "true" or "false", `group` the identifier.

    Raises:
        FileNotFoundError: no such file.
        ValueError: as `load_vqa`.
    """
    reader = ExampleReader("example")
    return reader.dataset(_nlvr2(annotations, reader, prompt))


def load_coco_captions(
    annotations: str | Path, split: str, *, each: str = "auto", prompt: str = TASK_PROMPTS["caption"]
) -> Dataset:
    """COCO's captions with the splits of Karpathy and Fei-Fei (CVPR 2015).

    Args:
        annotations: `dataset_coco.json`.
        split: "train" (with the rest of the validation images), "val" or "test".
        each: one row per "caption" (with a target), or per "image" (with references only); "auto": captions in
            "train", images elsewhere, as in the original.
        prompt: the whole text of the input.

    Returns:
        A dataset with the columns of `example`: `answers` the references, `visuals` the file name without
        its extension.

    Raises:
        FileNotFoundError: no such file.
        ValueError: as `load_vqa`, or another split.
    """
    if split not in COCO_SPLITS:
        raise ValueError(f"split must be one of {', '.join(map(repr, COCO_SPLITS))}, not {split!r}")
    each = ("caption" if split == "train" else "image") if each == "auto" else each
    if each not in ("caption", "image"):
        raise ValueError(f"each must be 'caption', 'image' or 'auto', not {each!r}")
    reader = ExampleReader("image")
    return reader.dataset(_coco(annotations, split, each, reader, prompt))


def caption_rows(
    task: str, key: str, captions: list[str], *, each: str, prompt: str, visuals: list[str], **more: Any
) -> Iterator[dict[str, Any]]:
    """A row for each caption, or one for the image."""
    if each == "image":
        yield example(task, key, sentence="", text=prompt, answers=captions, visuals=visuals, **more)
        return
    for position, caption in enumerate(captions):
        yield example(
            task,
            f"{key}#{position}",
            sentence="",
            text=prompt,
            target=caption,
            answers=captions,
            visuals=visuals,
            **more,
        )


def captions_of(record: Record, field: str, texts: Any) -> list[str]:
    """Captions, stripped of surrounding white space.

    Raises:
        ValueError: not a list of strings, a blank one, or an empty list.
    """
    if not isinstance(texts, list) or not texts:
        raise ValueError(f"{record.where(field)} must be a list of captions, not {shown(texts)}")
    return [Record({field: text}, record.place).text(field).strip() for text in texts]


def _labelled(task: str, records: list[Record], reader: ExampleReader, prompt: str) -> Iterator[dict[str, Any]]:
    for record in records:
        key = reader.key(record, "question_id")
        sentence = record.text("sent" if "sent" in record or "question" not in record else "question")
        group = record.text("answer_type") if record.get("answer_type") is not None else None
        row: dict[str, Any] = {"sentence": sentence, "text": f"{prompt}{sentence}", "group": group}
        row["visuals"] = [id_of(record.get("img_id"), record.where("img_id"))]
        if "label" not in record:
            yield example(task, key, **row)
            continue
        answers, scores = label_of(record)
        target, score = best_of(answers, scores)
        yield example(task, key, target=target, score=score, answers=answers, scores=scores, **row)


def _official_vqa(
    given: Any,
    questions: str | Path,
    annotations: str | Path | None,
    normalize: Callable[[str], str] | None,
) -> list[Record]:
    labels: dict[str, Record] = {}
    reader = ExampleReader("annotation of question")
    for record in read_array(annotations, "annotations") if annotations is not None else []:
        labels[reader.key(record, "question_id")] = record
    subset = given.get("data_subtype") if isinstance(given, dict) else None
    if not isinstance(subset, str) or not subset.strip():
        raise ValueError(f"{questions}: 'data_subtype' must name the images, such as 'train2014', not {shown(subset)}")
    subset = "test2015" if subset.startswith("test") else subset  # the images of both test splits
    records = []
    for record in records_of(given, questions, "questions"):
        key = id_of(record.get("question_id"), record.where("question_id"))
        number = count(record.get("image_id"), record.where("image_id"), low=0)
        fields = {"question_id": key, "sent": record.get("question"), "img_id": f"COCO_{subset}_{number:012d}"}
        if annotations is not None:
            if key not in labels:
                raise ValueError(f"{record.place}: question {key!r} has no annotation in {annotations}")
            fields |= _counted(labels.pop(key), normalize)
        records.append(Record(fields, record.place))
    if labels:
        key, record = next(iter(labels.items()))
        raise ValueError(f"{record.place}: {len(labels)} annotations have no question in {questions}, such as {key!r}")
    return records


def _counted(record: Record, normalize: Callable[[str], str] | None) -> dict[str, Any]:
    """The label and the type of answer of an official annotation."""
    given = record.get("answers")
    if not isinstance(given, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("answer"), str) for entry in given
    ):
        raise ValueError(f"{record.where('answers')} must be a list of objects with 'answer', not {shown(given)}")
    answers = [entry["answer"] if normalize is None else normalize(entry["answer"]) for entry in given]
    times = Counter(answer for answer in answers if answer.strip())
    label = {answer: 1.0 if times[answer] > AGREEING else round(SHARE * times[answer], 1) for answer in times}
    return {"label": label, "answer_type": record.get("answer_type")}


def _nlvr2(annotations: str | Path, reader: ExampleReader, prompt: str) -> Iterator[dict[str, Any]]:
    for record in read_records(annotations):
        identifier = record.text("identifier")
        parts = identifier.split("-")
        if len(parts) != 4:
            raise ValueError(
                f"{record.where('identifier')} must have four parts, such as 'dev-0-0-1', not {identifier!r}"
            )
        key = reader.key(record, "uid" if "uid" in record else "identifier")
        images = [
            record.text(name) if name in record else f"{'-'.join(parts[:3])}-{name}" for name in ("img0", "img1")
        ]
        sentence = record.text("sent" if "sent" in record else "sentence")
        row: dict[str, Any] = {
            "sentence": sentence,
            "text": f"{prompt}{sentence}",
            "visuals": images,
            "group": identifier,
        }
        target = truth_of(record, "label") if record.get("label") is not None else None
        yield example("nlvr", key, target=target, answers=[target] if target else [], **row)


def truth_of(record: Record, field: str) -> str:
    """A truth value as the text "true" or "false".

    Raises:
        ValueError: not one of the accepted spellings.
    """
    value = record.get(field)
    if isinstance(value, bool | int | str) and str(value).lower() in TRUTH:
        return TRUTH[str(value).lower()]
    raise ValueError(f"{record.where(field)} must be true or false, 0 or 1, not {shown(value)}")


def _coco(
    annotations: str | Path, split: str, each: str, reader: ExampleReader, prompt: str
) -> Iterator[dict[str, Any]]:
    known = {name for names in COCO_SPLITS.values() for name in names}
    for record in read_array(annotations, "images"):
        if record.get("split") not in known:
            raise ValueError(
                f"{record.where('split')} must be one of {sorted(known)}, not {shown(record.get('split'))}"
            )
        if record["split"] not in COCO_SPLITS[split]:
            continue
        image = reader.new(record.text("filename").rsplit(".", 1)[0], record.place)
        given = record.get("sentences")
        if not isinstance(given, list) or not all(isinstance(sentence, dict) for sentence in given):
            raise ValueError(f"{record.where('sentences')} must be a list of objects with 'raw', not {shown(given)}")
        captions = captions_of(record, "sentences", [sentence.get("raw") for sentence in given])
        group = id_of(record["cocoid"], record.where("cocoid")) if "cocoid" in record else None
        yield from caption_rows("caption", image, captions, each=each, prompt=prompt, visuals=[image], group=group)
