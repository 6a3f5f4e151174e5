"""The run of `vl_multitask.py`: arguments, data, multi-task training, measures of every task and what is saved."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from multitask_data import SUITES, Suite, load_suite, unit_of
from multitask_models import (
    ModelArguments,
    adapted,
    check_model_arguments,
    load_backbone,
    load_beside,
    load_trained,
    save_beside,
    save_trained,
)
from multitask_report import write_report
from peft import PeftModel
from progress import show_progress
from reported_run import claim_folder, execute_and_report
from run_folder import KeepCheckpoints, RunFolder, log_without_times, written_whole
from script_arguments import ScriptParser, check_at_least, check_numbers, check_training, check_world_size
from torch import nn
from training_defaults import AdaptationArguments
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, Seq2SeqTrainer, set_seed

from peft_read import PVLAConfig, PVLALossMixin, set_task
from peft_read.alignment import last_whole_checkpoint
from peft_read.data import MultitaskDataset, VLCollator
from peft_read.vl_adapter import MultitaskMixin

INPUTS = ("input_ids", "attention_mask", "visual_features", "visual_boxes", "visual_mask", "image_ids")


@dataclass
class ScriptArguments(ModelArguments):
    """The tasks and the training, beside the model and the method."""

    suite: str | None = field(
        default=None, metadata={"help": f"one of {', '.join(SUITES)}; default: scenes with --data_dir, else vl_mini"}
    )
    data_dir: str | None = field(default=None, metadata={"help": "folder of the data, a folder in it per task or set"})
    tasks: list[str] = field(default_factory=list, metadata={"help": "some of the suite's; default: all"})
    num_train_samples: int | None = field(default=None, metadata={"help": "of each task"})
    num_validation_samples: int | None = field(default=None, metadata={"help": "of each task"})
    num_test_samples: int | None = field(default=None, metadata={"help": "of each task"})
    sampling: str = field(default="round_robin", metadata={"help": "round_robin or balanced"})
    pvla_weight: float = 0.1
    pvla_mass: float = 0.5
    measure_before: bool = field(default=True, metadata={"help": "also measure the backbone before adaptation"})
    require_world_size: int | None = field(default=None, metadata={"help": "fail unless so many processes run"})


@dataclass
class TrainingArguments(AdaptationArguments):
    """Trainer's arguments, with defaults for VL-mini."""

    output_dir: str = "outputs/vl_multitask"
    learning_rate: float = 3e-3
    num_train_epochs: float = 6
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 64
    weight_decay: float = 0.01
    max_grad_norm: float = 5.0
    generation_num_beams: int = 1


class MultitaskTrainer(PVLALossMixin, MultitaskMixin, Seq2SeqTrainer):
    """Trainer of several tasks with the alignment loss.

    The checkpoints of transformers' Trainer hold the adapters of a PEFT model and nothing else; here they hold what is
    trained beside them too.
    """

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, PeftModel):
            save_beside(model, Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_beside(self.accelerator.unwrap_model(self.model), Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        load_beside(self.accelerator.unwrap_model(self.model), Path(self.state.best_model_checkpoint))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    return prepare(sys.argv[1:] if argv is None else list(argv)).execute()


def prepare(argv: list[str]) -> Run:
    """Reads the arguments and the data; errors in them are raised here."""
    script, training = ScriptParser((ScriptArguments, TrainingArguments)).parse_args_into_dataclasses(argv)
    script.suite = script.suite or ("vl_mini" if script.data_dir is None else "scenes")
    check_arguments(script, training)
    chosen = script.tasks or list(SUITES[script.suite])
    sizes = {split: getattr(script, f"num_{split}_samples") for split in ("train", "validation", "test")}
    suite = load_suite(script.suite, chosen, script.data_dir, sizes, seed=training.seed)
    load_backbone(script, chosen)  # raises where backbone and arguments do not fit
    return Run(script, training, suite, claim_folder(script, training))


def check_arguments(script: ScriptArguments, training: TrainingArguments) -> None:
    """Everything that can be wrong before data is read."""
    check_model_arguments(script)
    if script.suite not in SUITES:
        raise ValueError(f"--suite {script.suite!r} is not one of {', '.join(SUITES)}")
    if script.suite != "vl_mini" and script.data_dir is None:
        raise ValueError(f"--suite {script.suite} needs --data_dir, the folder of the data")
    if script.suite == "vl_mini" and script.data_dir is not None:
        raise ValueError("--suite vl_mini is generated: leave out --data_dir")
    if unknown := set(script.tasks) - set(SUITES[script.suite]):
        raise ValueError(f"--tasks {sorted(unknown)}: the tasks of {script.suite} are {list(SUITES[script.suite])}")
    check_numbers(script)
    check_training(training)
    samples = ("num_train_samples", "num_validation_samples", "num_test_samples")
    sizes = ("r", "lora_alpha", "phm_dim", "reduction_factor", "prompt_length", "prompt_width")
    check_at_least(script, dict.fromkeys((*samples, *sizes), 1))
    check_at_least(training, {"generation_num_beams": 1})
    PVLAConfig(weight=script.pvla_weight, mass=script.pvla_mass)
    check_world_size(script.require_world_size, training)


def averages(scores: dict[str, list[float]]) -> dict[str, float]:
    """The figure of every task."""
    return {task: fmean(each) for task, each in scores.items()}


class Run:
    """One set of arguments and data."""

    def __init__(
        self, script: ScriptArguments, training: TrainingArguments, suite: Suite, folder: RunFolder | None
    ) -> None:
        self.script, self.training, self.splits, self.folder = script, training, suite.splits, folder
        self.tasks = list(suite.splits["train"])
        self.kinds = SUITES[str(script.suite)]
        self.tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
        # The published benchmarks have lengths of their own.
        longest = AutoConfig.from_pretrained(script.model_name_or_path).to_dict().get("max_position_embeddings", 512)
        lengths = None if script.suite in ("image", "video") else dict.fromkeys(self.tasks, longest)
        self.collator = VLCollator(self.tokenizer, suite.visuals, boxes=suite.boxes, text_lengths=lengths)

    def execute(self) -> dict[str, Any]:
        """Adapts, measures, reports; the numbers of the report."""
        return execute_and_report(self.folder, self.script, self.training, train=self.adapt, write_report=write_report)

    def adapt(self) -> dict[str, Any]:
        """Trains and measures; the numbers of the report."""
        script, training = self.script, self.training
        set_seed(training.seed)
        model = adapted(self.backbone(), script, self.tasks)
        trainer = MultitaskTrainer(
            model=model,
            args=training,
            train_dataset=MultitaskDataset(self.splits["train"], seed=training.seed),
            eval_dataset=MultitaskDataset(self.splits["validation"]),
            data_collator=self.collator,
            processing_class=self.tokenizer,
            pvla_config=self.alignment() if script.method == "read_pvla" else None,
            task_sampling=script.sampling,
            task_losses={task: self.kinds[task].loss for task in self.tasks},
            callbacks=[KeepCheckpoints(self.folder)],
        )
        show_progress(trainer)
        result: dict[str, Any] = {
            "suite": script.suite,
            "method": self.name(),
            "metrics": {task: self.kinds[task].metric for task in self.tasks},
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "parameters": sum(p.numel() for p in model.parameters()),
            "sizes": {
                split: {task: len(rows) for task, rows in tasks.items()} for split, tasks in self.splits.items()
            },
        }
        if script.measure_before and script.method != "none":
            before, _ = self.measure(self.backbone())
            result["before"] = averages(before)
        if script.method != "none":
            trainer.train(resume_from_checkpoint=last_whole_checkpoint(training.output_dir))
        result["log"] = log_without_times(trainer.state.log_history)
        trained = trainer.accelerator.unwrap_model(trainer.model)
        scores, answers = self.measure(trained)
        result["after"] = averages(scores)
        # Of each example, so that comparisons can be paired.
        result["scores"] = {task: [round(score, 4) for score in each] for task, each in scores.items()}
        result["units"] = {task: [unit_of(row) for row in self.test_rows(task)] for task in self.tasks}
        result["examples"] = {task: self.examples(task, answers[task]) for task in self.tasks}
        if script.method != "none" and self.folder is not None:
            result |= self.save(trained, Path(training.output_dir) / "trained", answers)
        return result

    def name(self) -> str:
        """Of the method in the report."""
        script = self.script
        method = {"read_pvla": "read + PVLA"}.get(script.method, script.method)
        return method + (f", {script.share}" if script.share != "single" else "") + ", prompts" * script.prompts

    def backbone(self) -> nn.Module:
        """A fresh copy of the backbone."""
        model = load_backbone(self.script, self.tasks).to(self.training.device)
        config = model.config
        model.generation_config = GenerationConfig(
            num_beams=self.training.generation_num_beams,
            decoder_start_token_id=config.decoder_start_token_id,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        )
        return model

    def alignment(self) -> PVLAConfig:
        return PVLAConfig(weight=self.script.pvla_weight, mass=self.script.pvla_mass)

    def measure(self, model: nn.Module) -> tuple[dict[str, list[float]], dict[str, list[str]]]:
        """The scores and the answers of every task on the test split."""
        rows = {task: self.test_rows(task) for task in self.tasks}
        answers = {task: self.answers(model, task, rows[task]) for task in self.tasks}
        return {task: self.kinds[task].scores(answers[task], rows[task]) for task in self.tasks}, answers

    def test_rows(self, task: str, count: int | None = None) -> list[dict[str, Any]]:
        """Rows of the test split of one task, the first so many."""
        rows = self.splits["test"][task]
        return [{**rows[index], "task": task} for index in range(min(len(rows), count or len(rows)))]

    @torch.no_grad()
    def answers(self, model: nn.Module, task: str, rows: list[dict[str, Any]]) -> list[str]:
        """What the model writes for every row of one task."""
        model.eval()
        texts: list[str] = []
        step = self.training.per_device_eval_batch_size
        with set_task(model, task):
            for start in range(0, len(rows), step):
                batch = self.collator(rows[start : start + step])
                inputs = {k: batch[k].to(self.training.device) for k in INPUTS}
                tokens = model.generate(**inputs, max_new_tokens=self.kinds[task].max_length)
                texts += self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def save(self, model: nn.Module, folder: Path, answers: dict[str, list[str]]) -> dict[str, Any]:
        """Saves what was trained, loads it into a fresh backbone, and compares the answers."""
        with written_whole(folder) as part:
            save_trained(model, part)
        fresh = load_trained(self.backbone(), self.script, self.tasks, folder)
        rows = {task: self.test_rows(task, 32) for task in self.tasks}
        same = all(self.answers(fresh, task, rows[task]) == answers[task][: len(rows[task])] for task in self.tasks)
        size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        return {"saved": str(folder), "saved_bytes": size, "reloaded_is_identical": same}

    def examples(self, task: str, answers: list[str], count: int = 4) -> list[dict[str, str]]:
        """A handful of answers beside their references."""
        return [
            {"text": row["text"], "reference": row["target"] or row["answers"][0], "prediction": answer}
            for row, answer in zip(self.test_rows(task, count), answers, strict=False)
        ]
