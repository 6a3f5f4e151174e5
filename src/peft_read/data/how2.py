"""The How2 summarisation layout: transcripts, summaries and video features, as a `datasets.Dataset` and a collator."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..values import array_of, count, id_of, listed, shown
from .features import Features, read_features, row_count
from .jsonl import read_lines

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["How2Collator", "load_how2"]

TRANSCRIPTS, SUMMARIES = "tran.tok.txt", "desc.tok.txt"
BLANK = re.compile(r"[ \t]+")  # between id and text; other white space belongs to the text


def load_how2(
    data_dir: str | Path,
    split: str,
    *,
    num_samples: int | None = None,
    seed: int = 0,
    subset: str = "random",
    require_summary: bool = True,
) -> Dataset:
    """Reads one split: `<data_dir>/<split>/tran.tok.txt` and `desc.tok.txt`, lines of `<video id> <text ...>`.

    Args:
        data_dir: folder of the splits.
        split: such as `sum_train`, `sum_cv`, `sum_devtest` in How2.
        num_samples: size of a low-resource subset; None = all.
        seed: of the random subset.
        subset: "random" (the paper: "randomly draw"), or "first" (the first lines, as in the released code).
        require_summary: False where only transcripts exist.

    Returns:
        A dataset with the columns `video_id`, `transcript`, `summary`.

    Raises:
        FileNotFoundError: a missing file.
        ValueError: an empty file; by file and line: another encoding than UTF-8, a line without an id or a text, an id
            that appears twice; ids of the two files that differ, a subset larger than the split.
    """
    from datasets import Dataset

    if not isinstance(split, str) or not split.strip():
        raise ValueError(f"split must be the name of a folder in {data_dir}, not {split!r}")
    folder = Path(data_dir) / split
    if not folder.is_dir():
        splits = sorted(entry.name for entry in Path(data_dir).glob("*") if (entry / TRANSCRIPTS).exists())
        raise FileNotFoundError(f"{folder} does not exist; splits in {data_dir}: {splits or 'none'}")
    transcripts = _read_lines(folder / TRANSCRIPTS)
    summaries = _read_lines(folder / SUMMARIES) if require_summary else dict.fromkeys(transcripts, "")
    if difference := transcripts.keys() ^ summaries.keys():
        raise ValueError(
            f"{folder}: {len(difference)} ids are in only one of {TRANSCRIPTS} and {SUMMARIES}: "
            f"{', '.join(sorted(difference)[:5])}"
        )
    ids = list(transcripts)
    if num_samples is not None:
        ids = _subset(ids, num_samples, seed=seed, subset=subset, folder=folder)
    return Dataset.from_dict(
        {"video_id": ids, "transcript": [transcripts[i] for i in ids], "summary": [summaries[i] for i in ids]}
    )


def _subset(ids: list[str], num_samples: int, *, seed: int, subset: str, folder: Path) -> list[str]:
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or not 0 < num_samples <= len(ids):
        raise ValueError(f"num_samples={num_samples} is outside 1 .. {len(ids)}, the items of {folder}")
    if subset == "first":
        return ids[:num_samples]
    if subset == "random":
        chosen = np.random.default_rng(seed).choice(len(ids), size=num_samples, replace=False)
        return [ids[index] for index in sorted(chosen)]
    raise ValueError(f"subset={subset!r} is neither 'random' nor 'first'")


def _read_lines(path: Path) -> dict[str, str]:
    """Video id to text, in file order."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    texts: dict[str, str] = {}
    for number, line in read_lines(path):
        if not line.strip() or line[0].isspace():
            raise ValueError(f"{path}, line {number}: no video id; a line is '<video id> <text>'")
        video_id, text = [*BLANK.split(line.strip(), maxsplit=1), ""][:2]
        if not text.strip():
            raise ValueError(f"{path}, line {number}: the text of {video_id!r} is empty")
        if video_id in texts:
            raise ValueError(f"{path}, line {number}: {video_id!r} was already given")
        texts[video_id] = text.strip()
    if not texts:
        raise ValueError(f"{path} is empty")
    return texts


class How2Collator:
    """Batches items of `load_how2`: tokens, labels, and the videos' features padded to the longest.

    As in the original preparation, the source carries no special tokens and the target ends with eos. The decoder
    starts from `decoder_start_token_id`; the original trains VG-BART from token 0 and generates from token 2, a
    mismatch that its published numbers contain and that `decoder_start_token_id=0` reproduces.

    Args:
        tokenizer: with `pad_token_id` and `eos_token_id`.
        features: the store of video features.
        decoder_start_token_id: first decoder input; of the model's configuration.
        max_source_length, max_target_length: in tokens, the target without its eos (511 and 63 in the original).
        max_frames: frames kept, from the start (256 in the original).
        zero_video: replace every feature by zero: the ablation without the information in the video.

    Returns:
        A batch of `input_ids`, `attention_mask` (B, S); `video_features` (B, F, width), `video_mask` (B, F);
        `decoder_input_ids`, `labels` (B, T), labels padded with -100.

    Raises:
        ValueError: a length that is not positive, a tokenizer without a pad or end token, an item (by video id)
            without a transcript, a summary, words or frames.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        features: Features,
        *,
        decoder_start_token_id: int,
        max_source_length: int = 511,
        max_target_length: int = 63,
        max_frames: int = 256,
        zero_video: bool = False,
    ) -> None:
        self.tokenizer, self.features = tokenizer, features
        self.decoder_start_token_id = count(decoder_start_token_id, "decoder_start_token_id", low=0)
        self.max_source_length = count(max_source_length, "max_source_length")
        self.max_target_length = count(max_target_length, "max_target_length")
        self.max_frames, self.zero_video = count(max_frames, "max_frames"), zero_video
        for name in ("pad_token_id", "eos_token_id"):
            if getattr(tokenizer, name, None) is None:
                raise ValueError(f"the tokenizer has no {name}: batches cannot be padded, targets cannot end")

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collates the items."""
        if not len(items):
            raise ValueError("a batch needs at least one item")
        pad = self.tokenizer.pad_token_id
        sources = [self._source(item) for item in items]
        targets = [self.encode(_text(item, "summary"), self.max_target_length) for item in items]
        videos = [self._video(item) for item in items]
        if len({video.shape[1] for video in videos}) > 1:
            widths = listed(
                [f"{item['video_id']} ({video.shape[1]})" for item, video in zip(items, videos, strict=True)]
            )
            raise ValueError(f"the videos of a batch have features of different widths: {widths}")
        features = torch.nn.utils.rnn.pad_sequence(videos, batch_first=True)
        return {
            "input_ids": _pad(sources, pad),
            "attention_mask": _pad([[1] * len(source) for source in sources], 0),
            "video_features": torch.zeros_like(features) if self.zero_video else features,
            "video_mask": _pad([[1] * len(video) for video in videos], 0),
            "decoder_input_ids": _pad([[self.decoder_start_token_id, *target] for target in targets], pad),
            "labels": _pad([[*target, self.tokenizer.eos_token_id] for target in targets], -100),
        }

    def check(self, items: Iterable[Mapping[str, Any]]) -> None:
        """Warns of transcripts, summaries and videos that are longer than the limits, and by how much."""
        cut: dict[str, list[int]] = {}
        for item in items:
            lengths = (
                ("transcript", len(self._ids(_text(item, "transcript"))), self.max_source_length),
                ("summary", len(self._ids(_text(item, "summary"))), self.max_target_length),
                ("video", row_count(self.features, id_of(item["video_id"], "video_id")) or 0, self.max_frames),
            )
            for name, length, limit in lengths:
                cut.setdefault(name, []).append(max(0, length - limit))
        for name, described in (
            ("transcript", f"max_source_length={self.max_source_length} tokens"),
            ("summary", f"max_target_length={self.max_target_length} tokens"),
            ("video", f"max_frames={self.max_frames} frames"),
        ):
            lost = cut.get(name, [])
            if any(lost):
                warnings.warn(
                    f"{sum(map(bool, lost))} of {len(lost)} {name} entries are longer than {described} and lose "
                    f"{sum(lost)} of them, at most {max(lost)}",
                    stacklevel=2,
                )

    def encode(self, text: str, max_length: int) -> list[int]:
        """Token ids without special tokens, at most `max_length`."""
        return self.tokenizer(text, add_special_tokens=False, truncation=True, max_length=max_length)["input_ids"]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _source(self, item: Mapping[str, Any]) -> list[int]:
        tokens = self.encode(_text(item, "transcript"), self.max_source_length)
        if not tokens:
            raise ValueError(f"the transcript of {item.get('video_id')!r} has no token: {shown(item['transcript'])}")
        return tokens

    def _video(self, item: Mapping[str, Any]) -> Tensor:
        video_id = id_of(item.get("video_id"), "'video_id' of an item")
        frames = read_features(self.features, video_id)[: self.max_frames]
        if not len(frames):
            raise ValueError(f"the features of {video_id!r} have no frame")
        return torch.from_numpy(np.ascontiguousarray(array_of(frames), dtype=np.float32))


def _text(item: Mapping[str, Any], field: str) -> str:
    if not isinstance(item.get(field), str):
        raise ValueError(f"{field!r} of {item.get('video_id')!r} must be a string, not {shown(item.get(field))}")
    return item[field]


def _pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.long)
