"""Adapts a grounding model to QVHighlights, TVSum or YouTube Highlights with any method of the paper, and reports it.

    python examples/reproduction/ground_moments.py --train_file highlight_val_release.jsonl --num_train_samples 700 \
        --test_file highlight_test_with_gt.jsonl --features val_captions.npz,test_captions.npz \
        --text_encoder sentence-transformers/all-MiniLM-L6-v2 --projection pca.npz \
        --model_name_or_path outputs/grounding_backbone --method read --pvla --output_dir outputs/read_pvla
    python examples/reproduction/ground_moments.py --dataset tvsum --domain BK --train_file tvsum50.jsonl ...
    python examples/reproduction/ground_moments.py --output_dir outputs/read_pvla --predict "a dog runs" --video <id>

docs/data.md says where the data is published. Without `--model_name_or_path` the backbone starts from random weights.
QVHighlights: the best checkpoint by validation mAP, predictions in the official submission format, a picture. TVSum:
leave-one-video-out in one domain. YouTube Highlights: the test split of one domain. The last two: the last epoch.
`--average_checkpoints N` takes the mean of the weights at the last N checkpoints instead, on every dataset.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from alignment_arguments import AlignmentArguments, alignment, check_alignment
from averaging import AveragingArguments, average_checkpoints, check_averaging
from datasets import Dataset
from fast_dropout import DropoutArguments, FastDropout
from grounding_data import DataArguments, Fold, GroundingData, check_data_arguments
from grounding_measures import figures, figures_of_each
from grounding_report import describe, draw
from methods import PEFT_METHODS, MethodArguments, apply_method, check_method
from peft import PeftModel
from progress import show_progress
from run_folder import (
    KeepCheckpoints,
    RunFolder,
    run_arguments,
    run_script,
    where_whole,
    write_json,
    written_whole,
)
from safetensors.torch import load_file
from script_arguments import ScriptParser, check_at_least, check_numbers, check_training
from torch import nn
from training_defaults import GroundingArguments
from transformers import AutoModel, Trainer, set_seed

from peft_read import PVLALossMixin
from peft_read.alignment import last_whole_checkpoint
from peft_read.baselines import HEADS, add_prompts
from peft_read.files import safe_name
from peft_read.models import grounding_records, write_submission

LORA_TARGETS = {"moment_detr": r"transformer\..*\.linear[12]", "umt": r".*(att\d?|query_gen\.encoder)\.[qv]"}
# The last linear layers of attention and feed-forward blocks.
BLOCK_ENDS = {
    "moment_detr": {"attention": r"transformer\..*attn\.out_proj", "feed_forward": r"transformer\..*\.linear2"},
    "umt": {"attention": r".*(att\d?|query_gen\.encoder)\.m", "feed_forward": r".*ffn\.mapping\.3"},
}
SELECTION = "MR-full-mAP"
RUN_ARGUMENTS = ("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "seed")


@dataclass
class ScriptArguments(MethodArguments, AlignmentArguments, AveragingArguments, DropoutArguments, DataArguments):
    """The data, the model and the method."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "a pretrained backbone"})
    train_heads: bool = field(
        default=True, metadata={"help": "train the output layers with every method; --no_train_heads"}
    )
    pvla: bool = field(default=False, metadata={"help": "the alignment loss"})
    measure_before: bool = field(default=True, metadata={"help": "also measure the backbone before adaptation"})
    nms_threshold: float | None = field(default=None, metadata={"help": "drop windows that overlap a better one"})
    pictures: int = field(default=6, metadata={"help": "queries in the picture"})
    predict: str | None = field(default=None, metadata={"help": "a query to answer with the result of --output_dir"})
    video: str | None = field(default=None, metadata={"help": "id of the video to answer it in"})
    predict_features: list[str] = field(default_factory=list, metadata={"help": "of that video; default: as trained"})


@dataclass
class TrainingArguments(GroundingArguments):
    """Trainer's arguments, with defaults for a small frozen grounding model."""

    output_dir: str = "outputs/ground_moments"
    learning_rate: float = 2e-3
    num_train_epochs: float = 20
    per_device_eval_batch_size: int = 32
    eval_strategy: str = "epoch"
    logging_steps: float = 10


class GroundingTrainer(PVLALossMixin, Trainer):
    """Trainer with the alignment loss."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    return prepare(sys.argv[1:] if argv is None else list(argv)).execute()


def prepare(argv: list[str]) -> Grounding | Answer:
    """Reads the arguments, the data and the backbone; errors in them are raised here."""
    parser = ScriptParser((ScriptArguments, TrainingArguments))
    script, training = parser.parse_args_into_dataclasses(argv)
    if script.predict is not None:
        return Answer(script, Path(training.output_dir))
    check_arguments(script)
    check_training(training)
    check_averaging(script, training)
    data = GroundingData(script)
    # Once before anything is written: a method that does not fit the backbone ends here.
    model = adapted(load_backbone(script, data), script)
    if script.pvla:
        alignment(script, model)
    return Grounding(script, training, data)


class Grounding:
    """One run: the folds of a dataset, adapted and measured one after another."""

    def __init__(self, script: ScriptArguments, training: TrainingArguments, data: GroundingData) -> None:
        self.script, self.training, self.data = script, training, data
        self.folder = Path(training.output_dir)
        # Several folds have a folder each, named after data; a fold that is done is not trained again.
        single = len(data.folds) == 1
        self.parts = {fold.name: "" if single else safe_name(fold.name) for fold in data.folds}
        self.arguments = run_arguments(script, training)
        self.run = None
        if training.process_index == 0:
            self.run = RunFolder(self.folder, self.arguments, tuple(self.parts.values()))

    def execute(self) -> dict[str, Any]:
        started, results = time.time(), {}
        try:
            for fold in self.data.folds:
                results[fold.name] = self.fold(fold)
            result = combine(self.script.dataset, results)
            result |= {
                "seconds": time.time() - started,
                "arguments": asdict(self.script),
                "training": {name: getattr(self.training, name) for name in RUN_ARGUMENTS},
            }
            if self.run is not None:
                write_json(self.folder / "results.json", result)
                shown = {key: value for key, value in result.items() if key not in ("log", "arguments", "folds")}
                print(json.dumps(shown, indent=2))
                self.run.remove_checkpoints()
                for part in filter(None, self.parts.values()):
                    (self.folder / part / "fold.json").unlink(missing_ok=True)
            return result
        finally:
            if self.run is not None:
                self.run.release()

    def fold(self, fold: Fold) -> dict[str, Any]:
        """The result of one fold, of an earlier start with the same arguments where there is one."""
        part = self.parts[fold.name]
        done = self.folder / part / "fold.json"
        if part and done.is_file():
            then = json.loads(done.read_text(encoding="utf-8"))
            if then.get("arguments") == self.arguments:
                return then["result"]
        result = Run(self.script, self.training, self.data, fold, self.folder / part).adapt(
            KeepCheckpoints(self.run, part)
        )
        if part and self.run is not None:
            write_json(done, {"arguments": self.arguments, "result": result})
        return result


def check_arguments(script: ScriptArguments) -> None:
    """Everything that can be wrong before data is read."""
    check_method(script)
    if script.pvla and script.method in ("prompt", "none"):
        raise ValueError(
            f"--pvla with --method {script.method}: "
            + ("nothing is trained" if script.method == "none" else "the prompts would be aligned as clips and words")
        )
    check_numbers(script)
    check_alignment(script)
    check_at_least(script, {"pictures": 0, "nms_threshold": 0})
    if script.nms_threshold is not None and script.nms_threshold > 1:
        raise ValueError(f"--nms_threshold {script.nms_threshold} must be at most 1")
    if script.video is not None or script.predict_features:
        raise ValueError("--video and --predict_features have no meaning without --predict")
    check_data_arguments(script)


def combine(dataset: str, results: dict[str, Any]) -> dict[str, Any]:
    """One result of all folds; of TVSum the mean over the domain's held-out videos."""
    if len(results) == 1:
        return next(iter(results.values()))
    first = next(iter(results.values()))
    means = {
        when: {key: float(np.mean([fold[when][key] for fold in results.values()])) for key in first[when]}
        for when in ("before", "test")
    }
    return {**{key: first[key] for key in ("method", "trainable", "parameters")}, **means, "folds": results}


def adapted(model: nn.Module, script: ScriptArguments) -> nn.Module:
    """The backbone with the method of the arguments, its output layers trained with it unless told not to."""
    model_type = model.config.model_type
    ends = BLOCK_ENDS[model_type]
    heads = [name for name in HEADS[model_type] if any(full.endswith(name) for full, _ in model.named_modules())]
    return apply_method(
        model,
        script,
        also=heads if script.train_heads else [],
        lora_targets=LORA_TARGETS[model_type],
        bottleneck_targets=ends | {"both": "|".join(ends.values())},
        lora_alpha=script.r,
    )


class Run:
    """One fold, adapted and measured."""

    def __init__(
        self, script: ScriptArguments, training: TrainingArguments, data: GroundingData, fold: Fold, folder: Path
    ) -> None:
        self.script, self.data, self.fold, self.folder = script, data, fold, folder
        selects = fold.validation is not None and script.method != "none" and script.dataset == "qvhighlights"
        selects = selects and not script.average_checkpoints
        changes = {
            "output_dir": str(folder),
            "load_best_model_at_end": selects,
            "metric_for_best_model": SELECTION if selects else None,
            "greater_is_better": True if selects else None,
            "eval_strategy": training.eval_strategy if selects else "no",
            "label_names": ["video_mask"],  # what makes the Trainer compute a loss when it evaluates
        }
        values = {item.name: getattr(training, item.name) for item in fields(training) if item.init}
        self.training = TrainingArguments(**{**values, **changes})

    def adapt(self, keep: KeepCheckpoints) -> dict[str, Any]:
        """Trains, selects and measures; the numbers of the report."""
        script, training, fold = self.script, self.training, self.fold
        set_seed(training.seed)
        backbone = load_backbone(script, self.data)
        collator = self.data.collator(backbone.config, seed=training.seed)
        self.config, self._collator = backbone.config, self.data.collator(backbone.config)  # not for training
        model = adapted(backbone, script)
        trainer = GroundingTrainer(
            model=model,
            args=training,
            train_dataset=fold.train,
            eval_dataset=fold.validation,
            data_collator=collator,
            compute_metrics=self.validation_metrics if training.load_best_model_at_end else None,
            pvla_config=alignment(script, model) if script.pvla else None,
            callbacks=[keep],
        )
        show_progress(trainer)
        result: dict[str, Any] = {
            "method": script.method + (" + PVLA" if script.pvla else ""),
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "parameters": sum(p.numel() for p in model.parameters()),
            "sizes": {
                role: None if part is None else len(part)
                for role, part in (("train", fold.train), ("validation", fold.validation), ("test", fold.test))
            },
        }
        result["before"], _ = self.measure(trainer, fold.test if script.measure_before else None)
        started = time.time()
        if script.method != "none":
            with FastDropout(script.fast_dropout):
                trainer.train(resume_from_checkpoint=last_whole_checkpoint(training.output_dir))
            result["log"] = trainer.state.log_history
            if script.average_checkpoints:
                trained = trainer.accelerator.unwrap_model(trainer.model)
                count = script.average_checkpoints
                result["averaged_steps"] = average_checkpoints(trained, training.output_dir, count)
        result["training_seconds"] = time.time() - started
        result["validation"], _ = self.measure(trainer, fold.validation, "validation")
        result["test"], records = self.measure(trainer, fold.test, "test")
        result |= self.save(trainer, records)
        return result

    def validation_metrics(self, evaluation: Any) -> dict[str, float]:
        return self.metrics(self.records(evaluation.predictions, self.fold.validation), self.fold.validation)

    def records(self, outputs: Any, rows: Dataset) -> list[dict[str, Any]]:
        seconds, threshold = self.data.clips.clip_seconds, self.script.nms_threshold
        return grounding_records(outputs, list(rows), self.config, clip_seconds=seconds, nms_threshold=threshold)

    def metrics(self, records: list[dict[str, Any]], rows: Dataset) -> dict[str, float]:
        return figures(self.script.dataset, records, rows, self.data.clips.clip_seconds)

    def measure(
        self, trainer: Trainer, rows: Dataset | None, name: str | None = None
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Figures and records of one split; a name writes both, each query's figures and the official submission."""
        if rows is None:
            return {}, []
        compute, names = trainer.compute_metrics, trainer.label_names
        trainer.compute_metrics, trainer.label_names = None, []  # outputs only: a test split may lack labels
        ignored = [*self.config.keys_to_ignore_at_inference, "loss"]
        outputs = trainer.predict(rows, ignore_keys=ignored).predictions
        trainer.compute_metrics, trainer.label_names = compute, names
        records = self.records(outputs, rows)
        if name is not None and self.training.process_index == 0:
            write_submission(self.folder / f"submission_{name}.jsonl", records)
            if each := figures_of_each(self.script.dataset, records, rows, self.data.clips.clip_seconds):
                write_json(self.folder / f"each_{name}.json", each, indent=None)
        return self.metrics(records, rows), records

    def save(self, trainer: Trainer, records: list[dict[str, Any]]) -> dict[str, Any]:
        """Saves what was trained, loads it again, and draws a few queries."""
        if self.script.method == "none":
            return {}
        if self.training.process_index != 0:
            trainer.save_model(str(self.folder / "trained"))  # on all processes; the main one writes
            return {}
        with ExitStack() as together:  # both are whole before either takes its place
            if self.script.model_name_or_path is None:
                # The random backbone below the adapter; without it the adapter is worth nothing.
                set_seed(self.training.seed)
                backbone = together.enter_context(written_whole(self.folder / "backbone"))
                load_backbone(self.script, self.data).save_pretrained(backbone)
            trainer.save_model(str(together.enter_context(written_whole(self.folder / "trained"))))
        rows = self.fold.test if self.fold.test is not None else self.fold.validation
        if rows is None:
            return {}
        sample = [rows[index] for index in range(min(32, len(rows)))]
        trained = trainer.accelerator.unwrap_model(trainer.model)
        fresh = load_trained(self.script, self.folder)
        same = [
            np.allclose(a, b, atol=1e-5)
            for a, b in zip(*(self.outputs(model, sample) for model in (trained, fresh)), strict=True)
        ]
        if records and self.script.pictures:
            count = min(self.script.pictures, len(records))
            draw(self.folder / "moments.png", [rows[index] for index in range(count)], records[:count])
        size = sum(file.stat().st_size for file in (self.folder / "trained").glob("*.safetensors"))
        return {"reloaded_is_identical": all(same), "bytes": size}

    @torch.no_grad()
    def outputs(self, model: nn.Module, rows: list[dict[str, Any]]) -> list[np.ndarray]:
        batch = self._collator(rows)
        device = next(model.parameters()).device
        inputs = {name: batch[name].to(device) for name in batch if name.endswith(("_features", "_mask"))}
        outputs = model.eval()(**{name: value for name, value in inputs.items() if name != "boundary_mask"})
        names = ("pred_logits", "pred_spans", "saliency_scores", "boundaries")
        return [outputs[name].float().cpu().numpy() for name in names if outputs.get(name) is not None]


def load_backbone(script: ScriptArguments, data: GroundingData) -> nn.Module:
    if script.model_name_or_path is not None:
        return data.load_model(script.model_name_or_path)
    return data.build_model()


def load_trained(script: ScriptArguments, folder: Path) -> nn.Module:
    """The adapted model of an earlier run.

    Raises:
        ValueError: the run has saved no model.
    """
    backbone, trained = script.model_name_or_path or where_whole(folder / "backbone"), where_whole(folder / "trained")
    if script.method == "none":  # whatever an earlier run has left in the folder
        if script.model_name_or_path is None:
            raise ValueError(f"{folder} is of --method none on a random backbone, of which nothing is saved")
        return AutoModel.from_pretrained(backbone).eval()
    if script.method in PEFT_METHODS or script.method == "prompt":
        base = AutoModel.from_pretrained(backbone)
        if script.method in PEFT_METHODS:
            return PeftModel.from_pretrained(base, str(trained)).eval()
        model = add_prompts(base, length=script.prompt_length)
        model.load_state_dict(load_file(trained / "model.safetensors"))
        return model.eval()
    return AutoModel.from_pretrained(trained).eval()


class Answer:
    """One query in one video, answered with the result of an earlier run.

    Args:
        script: with `predict`, `video` and perhaps `predict_features`.
        folder: of the finished run.
    """

    def __init__(self, script: ScriptArguments, folder: Path) -> None:
        if script.video is None or not script.video.strip() or not str(script.predict).strip():
            raise ValueError("--predict needs --video, the id of a video with features, and a query that is not blank")
        path = folder / "results.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: --output_dir must name the folder of a finished run")
        try:
            self.then = ScriptArguments(**json.loads(path.read_text(encoding="utf-8"))["arguments"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a result of this script: {error!r}") from error
        if self.then.text_features is not None:
            raise ValueError("--predict needs an encoder for the query; the run had --text_features")
        self.then.text_cache = None
        self.then.features = script.predict_features or self.then.features
        self.folder = folder
        self.row = {"qid": 0, "query": script.predict, "vid": script.video}
        self.data = GroundingData(self.then, extra_rows=[self.row], folds=False)
        self.model = load_trained(self.then, folder)

    @torch.no_grad()
    def execute(self) -> dict[str, Any]:
        config = (self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model).config
        batch = self.data.collator(config)([self.row])
        seconds = self.data.clips.clip_seconds
        row = {**self.row, "duration": seconds * int(batch["video_mask"].sum())}
        prediction = self.model(**batch)
        names = ("pred_logits", "pred_spans", "saliency_scores", "boundaries", "video_mask")
        outputs = [prediction[name].numpy() for name in names if prediction.get(name) is not None]
        threshold = self.then.nms_threshold
        [record] = grounding_records(outputs, [row], config, clip_seconds=seconds, nms_threshold=threshold)
        print(describe(record, seconds))
        draw(self.folder / "prediction.png", [row], [record])
        return record


if __name__ == "__main__":
    run_script("ground_moments.py", prepare)
