"""Pretrains a grounding backbone on weak labels: captions as queries, runs of similar clips as their moments.

    python examples/reproduction/pretrain_grounding.py --train_file highlight_val_release.jsonl \
        --num_train_samples 700 --captions captions_val.jsonl --features val_captions.npz \
        --text_encoder sentence-transformers/all-MiniLM-L6-v2 --projection pca.npz \
        --num_train_epochs 5 --output_dir outputs/grounding_backbone

No human label is used, and no video outside the training side: with `--num_train_samples` the same queries are drawn
as in ground_moments.py (give both the same `--subset_seed`), and only their videos are taken. `pretraining.json` names
them, so that ground_moments.py can refuse a backbone that has seen its validation or test videos.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from grounding_data import DataArguments, GroundingData, check_data_arguments, open_store, read_folds
from run_folder import KeepCheckpoints, RunFolder, run_arguments, run_script, write_json
from script_arguments import ScriptParser, check_training
from training_defaults import GroundingArguments
from transformers import Trainer, set_seed

from peft_read.alignment import last_whole_checkpoint
from peft_read.data import pseudo_queries, window_pairs
from peft_read.data.jsonl import iterate_jsonl
from peft_read.values import count, number, shown


@dataclass
class ScriptArguments(DataArguments):
    """The videos, their captions, and how weak labels are made of them."""

    captions: str | None = field(default=None, metadata={"help": "jsonl of {vid, captions: one per clip}"})
    per_video: int = field(default=8, metadata={"help": "queries per video, at most"})
    threshold: float = field(default=0.3, metadata={"help": "similarity of a moment's clips: 0 average, 1 identical"})
    max_gap: int = field(default=1, metadata={"help": "clips between two runs that are passed over"})
    min_clips: int = 2


@dataclass
class TrainingArguments(GroundingArguments):
    """Trainer's arguments, with defaults for weak labels."""

    output_dir: str = "outputs/grounding_backbone"
    learning_rate: float = 4e-4
    num_train_epochs: float = 5
    logging_steps: float = 50


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    return prepare(sys.argv[1:] if argv is None else list(argv)).execute()


def prepare(argv: list[str]) -> Pretraining:
    """Reads the arguments and the data; errors in them are raised here."""
    parser = ScriptParser((ScriptArguments, TrainingArguments))
    script, training = parser.parse_args_into_dataclasses(argv)
    if script.captions is None:
        raise ValueError("--captions is needed: jsonl of {vid, captions}")
    if script.dataset != "qvhighlights":
        raise ValueError(f"--dataset {script.dataset!r}: weak labels are made of QVHighlights' videos only")
    count(script.per_video, "--per_video")
    count(script.min_clips, "--min_clips")
    count(script.max_gap, "--max_gap", low=0)
    number(script.threshold, "--threshold")
    check_data_arguments(script)
    check_training(training)
    return Pretraining(script, training)


class Pretraining:
    """One run on weak labels."""

    def __init__(self, script: ScriptArguments, training: TrainingArguments) -> None:
        self.script, self.training = script, training
        self.rows = weak_labels(script, training.seed)
        # The features and texts of the weak labels only: validation and test are not even read.
        self.data = GroundingData(script, extra_rows=list(self.rows), folds=False)
        self.run = None
        if training.process_index == 0:
            self.run = RunFolder(Path(training.output_dir), run_arguments(script, training))

    def execute(self) -> dict[str, Any]:
        training, rows, folder = self.training, self.rows, Path(self.training.output_dir)
        started = time.time()
        set_seed(training.seed)
        model = self.data.build_model()
        trainer = Trainer(
            model=model,
            args=training,
            train_dataset=rows,
            data_collator=self.data.collator(model.config, pairs=window_pairs, seed=training.seed),
            callbacks=[KeepCheckpoints(self.run)],
        )
        try:
            trainer.train(resume_from_checkpoint=last_whole_checkpoint(training.output_dir))
            trainer.save_model(str(folder))
            windows = [end - start for row in rows for start, end in row["relevant_windows"]]
            record = {
                "videos": sorted(set(rows["vid"])),
                "queries": len(rows),
                "mean_window_seconds": float(np.mean(windows)),
                "parameters": sum(p.numel() for p in model.parameters()),
                "epochs": trainer.state.epoch,
                "seconds": time.time() - started,
                "arguments": asdict(self.script),
                "log": trainer.state.log_history,
            }
            if self.run is not None:
                write_json(folder / "pretraining.json", record)
                shown_part = {k: v for k, v in record.items() if k not in ("videos", "arguments", "log")}
                print(json.dumps(shown_part, indent=2))
                self.run.remove_checkpoints()
            return record
        finally:
            if self.run is not None:
                self.run.release()


def weak_labels(script: ScriptArguments, seed: int) -> Any:
    """Captions of the training side's videos as queries."""
    alone = copy.copy(script)
    alone.test_file = None
    [fold] = read_folds(alone)
    captions: dict[str, list[str]] = {}
    for record in iterate_jsonl(script.captions, required=("vid", "captions")):
        vid = record.text("vid")
        if vid in captions:
            raise ValueError(f"{record.place}: the video {vid!r} was already given")
        if not isinstance(record["captions"], list):
            raise ValueError(f"{record.where('captions')} must be a list of strings, not {shown(record['captions'])}")
        captions[vid] = record["captions"]
    return pseudo_queries(
        captions,
        open_store(script.features[0]),
        videos=sorted(set(fold.train["vid"])),
        per_video=script.per_video,
        threshold=script.threshold,
        max_gap=script.max_gap,
        min_clips=script.min_clips,
        seed=seed,
        clip_seconds=script.clip_seconds,
    )


if __name__ == "__main__":
    run_script("pretrain_grounding.py", prepare)
