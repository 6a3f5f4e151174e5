"""The How2 summarisation layout: transcripts, summaries and video features, as a `datasets.Dataset` and a collator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .features import FeatureStore

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["How2Collator", "load_how2"]

TRANSCRIPTS, SUMMARIES = "tran.tok.txt", "desc.tok.txt"


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
        subset: "random" (the paper's "randomly draw"), or "first" (the first lines, as the released code does).
        require_summary: False where only transcripts exist.

    Returns:
        A dataset with the columns `video_id`, `transcript`, `summary`.

    Raises:
        FileNotFoundError: a missing file.
        ValueError: an empty file, a line without an id or a text (file and line are named), ids of the two files that
            differ, a subset larger than the split.
    """
    from datasets import Dataset

    folder = Path(data_dir) / split
    if not folder.is_dir():
        found = sorted(entry.name for entry in Path(data_dir).glob("*") if (entry / TRANSCRIPTS).exists())
        raise FileNotFoundError(f"{folder} does not exist; splits in {data_dir}: {found or 'none'}")
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
    if not 0 < num_samples <= len(ids):
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
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip() or line[0].isspace():
                raise ValueError(f"{path}, line {number}: no video id; a line is '<video id> <text>'")
            video_id, _, text = line.strip().partition(" ")
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
        zero_video: replace every feature by zero: the ablation that shows what the video is worth.

    Returns:
        A batch of `input_ids`, `attention_mask` (B, S); `video_features` (B, F, width), `video_mask` (B, F);
        `decoder_input_ids`, `labels` (B, T), labels padded with -100.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        features: FeatureStore,
        *,
        decoder_start_token_id: int,
        max_source_length: int = 511,
        max_target_length: int = 63,
        max_frames: int = 256,
        zero_video: bool = False,
    ) -> None:
        self.tokenizer, self.features = tokenizer, features
        self.decoder_start_token_id = decoder_start_token_id
        self.max_source_length, self.max_target_length = max_source_length, max_target_length
        self.max_frames, self.zero_video = max_frames, zero_video

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collates the items."""
        pad = self.tokenizer.pad_token_id
        sources = [self.encode(item["transcript"], self.max_source_length) for item in items]
        targets = [self.encode(item["summary"], self.max_target_length) for item in items]
        videos = [torch.from_numpy(self.features[item["video_id"]][: self.max_frames]) for item in items]
        return {
            "input_ids": _pad(sources, pad),
            "attention_mask": _pad([[1] * len(source) for source in sources], 0),
            "video_features": torch.nn.utils.rnn.pad_sequence(videos, batch_first=True) * (not self.zero_video),
            "video_mask": _pad([[1] * len(video) for video in videos], 0),
            "decoder_input_ids": _pad([[self.decoder_start_token_id, *target] for target in targets], pad),
            "labels": _pad([[*target, self.tokenizer.eos_token_id] for target in targets], -100),
        }

    def encode(self, text: str, max_length: int) -> list[int]:
        """Token ids without special tokens, at most `max_length`."""
        return self.tokenizer(text, add_special_tokens=False, truncation=True, max_length=max_length)["input_ids"]


def _pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.long)
