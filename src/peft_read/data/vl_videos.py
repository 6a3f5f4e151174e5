"""TVQA, How2QA, TVC and YouCook2 captions in the format of the VALUE benchmark, and How2QA's own."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..values import count, id_of, number, shown, table
from .jsonl import Record, find_annotations, iterate_jsonl, read_lines
from .vl_examples import TASK_PROMPTS, ExampleReader, example

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["load_how2qa", "load_tvc", "load_tvqa", "load_yc2c", "read_subtitles"]

HOW2QA_COLUMNS = 7  # video, [start:end], three wrong answers, question, right answer
TIMES = re.compile(r"\[(\d+(?:\.\d+)?):(\d+(?:\.\d+)?)\]")
MOMENT = re.compile(r"(\d+(?:\.\d+)?)\s*-\s*(\d+(?:\.\d+)?)")
UNKNOWN_MOMENT = "nan-nan"  # of a few questions of TVQA

Subtitles = str | Path | Mapping[str, str] | None


def read_subtitles(path: str | Path) -> dict[str, str]:
    """The words of each video, from lines `{"vid_name", "sub": [{"text", ...}]}`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: by file and line, another shape, or a video that appears twice.
    """
    reader = ExampleReader("video")
    words = {}
    for record in iterate_jsonl(path, required=("vid_name", "sub")):
        lines = record["sub"]
        if not isinstance(lines, list) or not all(
            isinstance(line, dict) and isinstance(line.get("text"), str) for line in lines
        ):
            raise ValueError(f"{record.where('sub')} must be a list of objects with 'text', not {shown(lines)}")
        words[reader.key(record, "vid_name")] = " ".join(line["text"].strip() for line in lines)
    return words


def load_tvqa(annotations: str | Path, subtitles: Subtitles, *, prompt: str = TASK_PROMPTS["tvqa"]) -> Dataset:
    """TVQA (Lei et al., EMNLP 2018): five answers to a question about a moment of an episode.

    Args:
        annotations: an object per line with `qid`, `vid_name`, `q`, `a0` ... `a4`, `ts` "start-end", `show_name`, and
            optionally `answer_idx`.
        subtitles: the file of `read_subtitles`, or words by video; None: the text has no subtitles.
        prompt: the end of the text.

    Returns:
        A dataset with the columns of `example`: `target` "a0" to "a4", `answers` the same, `group` the show.

    Raises:
        FileNotFoundError: no such file.
        ValueError: by file and line, a field that is missing, duplicate or invalid; a video without
            subtitles.
    """
    return ExampleReader.dataset(_choices("tvqa", iterate_jsonl(annotations), 5, subtitles, prompt, "show_name"))


def load_how2qa(
    annotations: str | Path, subtitles: Subtitles, *, prompt: str = TASK_PROMPTS["how2qa"], seed: int = 0
) -> Dataset:
    """How2QA (Li et al., EMNLP 2020): four answers to a question about a moment of an instructional video.

    Args:
        annotations: VALUE's file, as `load_tvqa` with `a0` ... `a3` and without a show; or the authors' own `.csv`
            (also `.xz`, `.gz`) without a header: video, [start:end], three wrong answers, question, right answer.
        subtitles: see `load_tvqa`.
        prompt: the end of the text.
        seed: of the place of the right answer, which stands last in every line of the `.csv`.

    Returns:
        A dataset with the columns of `example`; ids of the `.csv` are `<video>_<line>`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: as `load_tvqa`.
    """
    path = find_annotations(annotations)
    records = _how2qa_csv(path, count(seed, "seed", low=0)) if ".csv" in path.suffixes else iterate_jsonl(path)
    return ExampleReader.dataset(_choices("how2qa", records, 4, subtitles, prompt, None))


def load_tvc(annotations: str | Path, subtitles: Subtitles, *, prompt: str = TASK_PROMPTS["tvc"]) -> Dataset:
    """TVC (Lei et al., ECCV 2020): captions of moments of episodes.

    Args:
        annotations: an object per line with `clip_id`, `vid_name`, `ts` [start, end], and `descs`
            [{"desc_id", "desc", "type"}] if given.
        subtitles: see `load_tvqa`.
        prompt: the end of the text.

    Returns:
        A dataset with the columns of `example`, a row per caption, or per clip without captions; `answers` all
        captions of the clip, `group` the clip.

    Raises:
        FileNotFoundError: no such file.
        ValueError: as `load_tvqa`.
    """
    return ExampleReader.dataset(_captions("tvc", annotations, subtitles, prompt))


def load_yc2c(annotations: str | Path, subtitles: Subtitles, *, prompt: str = TASK_PROMPTS["yc2c"]) -> Dataset:
    """YouCook2 captions (Zhou et al., AAAI 2018) as VALUE has them; as `load_tvc`, without a moment."""
    return ExampleReader.dataset(_captions("yc2c", annotations, subtitles, prompt))


def _choices(
    task: str, records: Iterator[Record], choices: int, subtitles: Subtitles, prompt: str, group: str | None
) -> Iterator[dict[str, Any]]:
    reader, words = ExampleReader(), _words(subtitles)
    for record in records:
        key, video = reader.key(record, "qid"), record.text("vid_name")
        names = [f"a{position}" for position in range(choices)]
        offered = " ".join(f"{name}: {record.text(name).strip('. ')}." for name in names)
        moment = record.text("ts")
        start, end = _moment(record)
        sentence = " ".join(
            [
                *_subtitles_of(words, video, record),
                f"[Q] {record.text('q').strip()}",
                f"[TS] ({moment})",
                f"[Choices] {offered}",
            ]
        )
        target = None
        if record.get("answer_idx") is not None:
            right = count(record["answer_idx"], record.where("answer_idx"), low=0)
            if right >= choices:
                raise ValueError(f"{record.where('answer_idx')} must be a number from 0 to {choices - 1}, not {right}")
            target = names[right]
        yield example(
            task, key, sentence=sentence, text=f"{sentence} {prompt}", target=target,
            answers=[target] if target else [], visuals=[video], group=record.text(group) if group else task,
            start=start, end=end,
        )  # fmt: skip


def _captions(task: str, annotations: str | Path, subtitles: Subtitles, prompt: str) -> Iterator[dict[str, Any]]:
    reader, clips, words = ExampleReader("caption"), ExampleReader("clip"), _words(subtitles)
    for record in iterate_jsonl(annotations, required=("clip_id", "vid_name", *(("ts",) if task == "tvc" else ()))):
        clip, video = clips.key(record, "clip_id"), record.text("vid_name")
        times: dict[str, Any] = {}
        parts = _subtitles_of(words, video, record)
        if task == "tvc":
            start, end = table(record["ts"], record.where("ts"), low=0).tolist() if _pair(record) else (0.0, 0.0)
            if end <= start:
                raise ValueError(f"{record.where('ts')} must be [start, end] in seconds, not {shown(record['ts'])}")
            times, parts = {"start": start, "end": end}, [*parts, f"[TS] ({record['ts']})"]
        sentence = " ".join(parts)
        row: dict[str, Any] = {
            "sentence": sentence,
            "text": f"{sentence} {prompt}" if sentence else prompt,
            "visuals": [video],
            "group": clip,
        }
        if "descs" not in record:
            yield example(task, clip, **row, **times)
            continue
        given = record["descs"]
        if not isinstance(given, list) or not given or not all(isinstance(entry, dict) for entry in given):
            raise ValueError(f"{record.where('descs')} must be a list of objects with 'desc', not {shown(given)}")
        described = [Record(entry, f"{record.place}: 'descs'") for entry in given]
        captions = [entry.text("desc") for entry in described]
        for entry, caption in zip(described, captions, strict=True):
            yield example(task, reader.key(entry, "desc_id"), target=caption, answers=captions, **row, **times)


def _pair(record: Record) -> bool:
    return isinstance(record["ts"], list) and len(record["ts"]) == 2


def _moment(record: Record) -> tuple[float | None, float | None]:
    text = record.text("ts").strip()
    if text == UNKNOWN_MOMENT:
        return None, None
    match = MOMENT.fullmatch(text)
    if not match or float(match[2]) < float(match[1]):
        raise ValueError(f"{record.where('ts')} must be 'start-end' in seconds, not {shown(record['ts'])}")
    return float(match[1]), float(match[2])


def _words(subtitles: Subtitles) -> Mapping[str, str] | None:
    return read_subtitles(subtitles) if isinstance(subtitles, str | Path) else subtitles


def _subtitles_of(words: Mapping[str, str] | None, video: str, record: Record) -> list[str]:
    if words is None:
        return []
    if video not in words:
        raise ValueError(
            f"{record.place}: there are no subtitles of the video {video!r}; give it an empty text, or subtitles=None"
        )
    return [f"[Subs] {words[video]}"]


def _how2qa_csv(path: Path, seed: int) -> Iterator[Record]:
    """The lines in VALUE's form, the right answer at a place drawn for each."""
    reader = csv.reader(f"{line}\n" for _, line in read_lines(path))
    has_records = False
    for position, cells in enumerate(reader, start=1):
        place = f"{path}, line {reader.line_num}"
        if len(cells) != HOW2QA_COLUMNS:
            raise ValueError(
                f"{place}: {len(cells)} columns, not {HOW2QA_COLUMNS} (video, times, 3 answers, question, answer)"
            )
        video, times = id_of(cells[0], f"{place}: the video"), TIMES.fullmatch(cells[1].strip())
        if not times:
            raise ValueError(f"{place}: the times must be [start:end] in seconds, not {shown(cells[1])}")
        number(float(times[2]), f"{place}: the end", above=float(times[1]))
        right = int(np.random.default_rng((seed, position)).integers(4))
        answers = [*cells[2:5]]
        answers.insert(right, cells[6])
        fields = {"qid": f"{video}_{position}", "vid_name": video, "q": cells[5], "ts": f"{times[1]}-{times[2]}"}
        has_records = True
        yield Record({**fields, **{f"a{i}": a for i, a in enumerate(answers)}, "answer_idx": right}, place)
    if not has_records:
        raise ValueError(f"{path} is empty")
