"""The run of `how2_summarize.py`: arguments, data, training with and without the video, measures and what is saved."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from alignment_arguments import AlignmentArguments, alignment, check_alignment
from averaging import AveragingArguments, average_checkpoints, check_averaging
from fast_dropout import DropoutArguments, FastDropout
from how2_report import write_report
from methods import check_method
from peft import PeftModel
from progress import show_progress
from reported_run import claim_folder, execute_and_report
from run_folder import KeepCheckpoints, RunFolder, log_without_times, write_json, written_whole
from script_arguments import ScriptParser, check_at_least, check_numbers, check_training, check_world_size
from summarisation_models import (
    BACKBONES,
    ModelArguments,
    adapted,
    check_backbone,
    check_weights,
    generation_config,
    load_backbone,
    load_prompts,
    save_prompts,
)
from summarisation_training import SummarisationTrainer
from torch import nn
from tqdm.auto import tqdm
from training_defaults import AdaptationArguments
from transformers import AutoTokenizer, PreTrainedTokenizerBase, set_seed

from peft_read.alignment import last_whole_checkpoint
from peft_read.data import FeatureStore, How2Collator, generate_how2_mini, load_how2, write_how2_mini
from peft_read.metrics import rouge_scores

VARIANTS = ("rouge_score", "easy_rouge")


@dataclass
class ScriptArguments(ModelArguments, AlignmentArguments, AveragingArguments, DropoutArguments):
    """The data and the training, beside the model and the method."""

    data_dir: str | None = field(default=None, metadata={"help": "folder in the How2 layout; default: How2-mini"})
    features: str | None = field(default=None, metadata={"help": "default: <data_dir>/video_features or .npz"})
    train_split: str = "sum_train"
    validation_split: str = "sum_val"
    test_split: str = "sum_test"
    num_train_samples: int | None = field(default=None, metadata={"help": "low-resource subset; How2-mini: 400"})
    num_validation_samples: int | None = None
    num_test_samples: int | None = None
    subset: str = field(default="random", metadata={"help": "random (with --seed) or first lines"})
    pvla: bool = field(default=True, metadata={"help": "the alignment loss; --no_pvla switches it off"})
    max_source_length: int = 511
    max_target_length: int = 63
    max_frames: int = 256
    decoder_start: str = field(
        default="model", metadata={"help": "model, or original: train from token 0 as the original does"}
    )
    visual_lr_factor: float = field(
        default=1.0, metadata={"help": "times the learning rate, for the fusion's modules"}
    )
    lr_step_epochs: int | None = field(default=None, metadata={"help": "multiply the rates every so many epochs"})
    lr_step_factor: float = field(default=0.95, metadata={"help": "... by this"})
    zero_video: bool = field(default=False, metadata={"help": "replace every video feature by zero"})
    compare_zero_video: bool | None = field(
        default=None, metadata={"help": "also adapt without video, for comparison; default: on for How2-mini"}
    )
    measure_before: bool = field(default=True, metadata={"help": "also measure the backbone before adaptation"})
    require_world_size: int | None = field(default=None, metadata={"help": "fail unless so many processes run"})


@dataclass
class TrainingArguments(AdaptationArguments):
    """Trainer's arguments, with defaults for How2-mini."""

    output_dir: str = "outputs/how2_summarize"
    learning_rate: float = 1e-2
    num_train_epochs: float = 12
    per_device_train_batch_size: int = 16
    per_device_eval_batch_size: int = 32
    generation_num_beams: int = 5
    generation_max_length: int = 64


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    return prepare(sys.argv[1:] if argv is None else list(argv)).execute()


def prepare(argv: list[str]) -> Run:
    """Reads the arguments, the data and the backbone's configuration; errors in them are raised here."""
    script, training = parse(argv)
    check_arguments(script, training)
    push, training.push_to_hub = training.push_to_hub, False  # once, at the end, instead of at every checkpoint
    folder = claim_folder(script, training, ("", "without_video"))
    try:
        if script.data_dir is None:
            with training.main_process_first(desc="generating the data"):
                if folder is not None:
                    generate_data(folder.folder / "how2_mini")
            use_how2_mini(script, training)
        splits, store, width = load_data(script, training.seed)
        check_backbone(script, width)
        check_weights(script.model_name_or_path)
        tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
        return Run(script, training, tokenizer, store, splits, width, push, folder)
    except BaseException:
        if folder is not None:
            folder.release()
        raise


def parse(argv: list[str]) -> tuple[ScriptArguments, TrainingArguments]:
    parser = ScriptParser((ScriptArguments, TrainingArguments))
    if argv and argv[0].endswith((".yaml", ".yml")):
        argv = [*as_options(argv[0]), *argv[1:]]
    script, training = parser.parse_args_into_dataclasses(argv)
    return script, training


def as_options(path: str) -> list[str]:
    """The values of a YAML file as options of the command line, so that both are read and checked alike."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold `argument: value` lines, not {type(values).__name__}")
    known = {argument.name for kind in (ScriptArguments, TrainingArguments) for argument in fields(kind)}
    if unknown := sorted(str(name) for name in set(values) - known):
        raise ValueError(f"{path} has unknown arguments {unknown}")
    options: list[str] = []
    for name, value in values.items():
        if value is None:
            raise ValueError(f"{path}: {name} has no value")
        parts = value if isinstance(value, list) else [value]
        texts = [json.dumps(part) if isinstance(part, dict | bool) else str(part) for part in parts]
        options += [f"--{name}", *texts] if isinstance(value, list) else [f"--{name}={texts[0]}"]
    try:  # an error in the file names the file
        ScriptParser((ScriptArguments, TrainingArguments)).parse_args(options)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return options


def check_arguments(script: ScriptArguments, training: TrainingArguments) -> None:
    """Everything that can be wrong before data is read."""
    check_method(script)
    if script.backbone not in (None, *BACKBONES):
        raise ValueError(f"--backbone {script.backbone!r} is not one of {', '.join(BACKBONES)}")
    for name in ("visual_lr_factor", "lr_step_epochs", "lr_step_factor"):
        value = getattr(script, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name} {value} must be positive")
    check_numbers(script)
    check_training(training)
    samples = ("num_train_samples", "num_validation_samples", "num_test_samples")
    check_at_least(script, dict.fromkeys((*samples, "max_source_length", "max_target_length", "max_frames"), 1))
    check_at_least(training, {"generation_num_beams": 1, "generation_max_length": 1})
    if script.subset not in ("random", "first"):
        raise ValueError(f"--subset {script.subset!r} is neither 'random' nor 'first'")
    if script.dropout is not None and not 0 <= script.dropout < 1:
        raise ValueError(f"--dropout {script.dropout} is outside [0, 1)")
    check_alignment(script)
    check_averaging(script, training)
    if script.method == "prompt" and script.pvla:
        raise ValueError("--method prompt with the alignment would align the prompts as frames; add --no_pvla")
    if script.lr_step_epochs is not None and training.lr_scheduler_type != "constant":
        raise ValueError("--lr_step_epochs makes steps in a constant rate: it needs --lr_scheduler_type constant")
    if "rouge" in str(training.metric_for_best_model) and not training.predict_with_generate:
        raise ValueError(f"--metric_for_best_model {training.metric_for_best_model} needs --predict_with_generate")
    if script.decoder_start not in ("model", "original"):
        raise ValueError(f"--decoder_start {script.decoder_start!r} is neither 'model' nor 'original'")
    if training.push_to_hub and not training.hub_model_id:
        raise ValueError("--push_to_hub needs --hub_model_id, the name of the repository")
    check_world_size(script.require_world_size, training)


def generate_data(folder: Path) -> None:
    """How2-mini's unseen domain, in the How2 layout."""
    write_how2_mini(
        folder,
        {
            "sum_train": generate_how2_mini(2_000, seed=1, prefix="train"),
            "sum_val": generate_how2_mini(100, seed=2, prefix="val"),
            "sum_test": generate_how2_mini(200, seed=3, prefix="test"),
        },
    )


def use_how2_mini(script: ScriptArguments, training: TrainingArguments) -> None:
    """Points the arguments at the generated data."""
    script.data_dir = str(Path(training.output_dir) / "how2_mini")
    script.num_train_samples = 400 if script.num_train_samples is None else script.num_train_samples
    if script.compare_zero_video is None:
        script.compare_zero_video = not script.zero_video


def load_data(script: ScriptArguments, seed: int) -> tuple[dict[str, Any], FeatureStore, int]:
    """The three splits, the features, and their width; errors in them are raised here."""
    assert script.data_dir is not None
    folder = Path(script.data_dir)
    candidates = (
        [Path(script.features)] if script.features else [folder / "video_features", folder / "video_features.npz"]
    )
    path = next((path for path in candidates if path.exists()), None)
    if path is None:
        raise FileNotFoundError(f"no video features at {' or '.join(map(str, candidates))}; set --features")
    store = FeatureStore(path)
    roles = (
        ("train", script.train_split, script.num_train_samples),
        ("validation", script.validation_split, script.num_validation_samples),
        ("test", script.test_split, script.num_test_samples),
    )
    splits = {
        role: load_how2(folder, split, num_samples=size, seed=seed, subset=script.subset)
        for role, split, size in roles
    }
    width = None
    for data in splits.values():
        width = store.check(tqdm(data["video_id"], desc="checking features", leave=False, disable=None), width=width)
    assert width is not None
    return splits, store, width


class Run:
    """One set of arguments and data, adapted with or without the video."""

    def __init__(
        self,
        script: ScriptArguments,
        training: TrainingArguments,
        tokenizer: PreTrainedTokenizerBase,
        store: FeatureStore,
        splits: dict[str, Any],
        width: int,
        push: bool,
        folder: RunFolder | None,
    ) -> None:
        self.script, self.training, self.tokenizer = script, training, tokenizer
        self.store, self.splits, self.width, self.push = store, splits, width, push
        self.folder = folder  # of the main process

    def execute(self) -> dict[str, Any]:
        """Adapts, compares, reports; the numbers of the report."""
        return execute_and_report(
            self.folder, self.script, self.training, train=self.adapt_and_compare, write_report=write_report
        )

    def adapt_and_compare(self) -> dict[str, Any]:
        """Adapts as the arguments say, and once more without the video where they ask for it."""
        result = self.adapt(zero_video=self.script.zero_video, push=self.push)
        if self.script.compare_zero_video and self.script.method != "none":
            result["without_video"] = self.adapt(zero_video=True, compare=False)
        return result

    def adapt(self, *, zero_video: bool, compare: bool = True, push: bool = False) -> dict[str, Any]:
        """Trains one adapter and measures it; the numbers of the report.

        `compare` also measures the backbone before adaptation, and the adapter on zeroed video.
        """
        script, training = self.script, copy.copy(self.training)
        part = "" if compare else "without_video"
        training.output_dir = str(Path(training.output_dir) / part)
        set_seed(training.seed)
        model, new_modules = self.backbone()
        collator = self.collator(model.config, zero_video)
        if compare and training.process_index == 0:
            for data in self.splits.values():
                collator.check(data)
        model = adapted(model, new_modules, script)
        pvla = script.pvla and script.method != "none"
        trainer = SummarisationTrainer(
            model=model,
            args=training,
            train_dataset=self.splits["train"],
            eval_dataset=self.splits["validation"],
            data_collator=collator,
            processing_class=self.tokenizer,
            pvla_config=alignment(script, model) if pvla else None,
            compute_metrics=self.validation_rouge if training.predict_with_generate else None,
            visual_lr_factor=script.visual_lr_factor,
            lr_step_epochs=script.lr_step_epochs,
            lr_step_factor=script.lr_step_factor,
        )
        trainer.add_callback(KeepCheckpoints(self.folder, part))
        show_progress(trainer)
        result: dict[str, Any] = {
            "method": script.method + (" + PVLA" if pvla else ""),
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "parameters": sum(p.numel() for p in model.parameters()),
            "new_modules": new_modules,
            "sizes": {role: len(data) for role, data in self.splits.items()},
        }
        before: list[str] = []
        if (compare and script.measure_before) or script.method == "none":
            result["rouge_before"], before = self.measure(trainer, "before")
        if script.method == "none":
            return result | {
                "rouge_after": result["rouge_before"],
                "examples": self.examples(before, before),
                "log": [],
            }
        if self.folder is not None:
            print("adapting" if compare else "adapting once more, without the video, for comparison", flush=True)
        with FastDropout(script.fast_dropout):
            trainer.train(resume_from_checkpoint=last_whole_checkpoint(training.output_dir))
        result["log"] = log_without_times(trainer.state.log_history)
        if script.average_checkpoints:
            trained, count = trainer.accelerator.unwrap_model(trainer.model), script.average_checkpoints
            result["averaged_steps"] = average_checkpoints(trained, training.output_dir, count)
        result["rouge_after"], after = self.measure(trainer, "after")
        result["examples"] = self.examples(before, after)
        result |= self.save(trainer, Path(training.output_dir) / "adapter", collator)
        if compare and script.compare_zero_video:
            trainer.data_collator = self.collator(model.config, zero_video=True)
            result["rouge_zeroed_at_test"], _ = self.measure(trainer, "zeroed")
        if push and training.process_index == 0:
            trainer.accelerator.unwrap_model(trainer.model).push_to_hub(training.hub_model_id)
        return result

    def backbone(self) -> tuple[nn.Module, list[str]]:
        """A fresh copy of the backbone, and the names of its new modules."""
        model, new_modules = load_backbone(self.script, self.width)
        training = self.training
        model.generation_config = generation_config(
            model, num_beams=training.generation_num_beams, max_length=training.generation_max_length
        )
        return model, new_modules

    def collator(self, config: Any, zero_video: bool) -> How2Collator:
        script = self.script
        return How2Collator(
            self.tokenizer,
            self.store,
            decoder_start_token_id=0 if script.decoder_start == "original" else config.decoder_start_token_id,
            max_source_length=script.max_source_length,
            max_target_length=script.max_target_length,
            max_frames=script.max_frames,
            zero_video=zero_video,
        )

    def measure(self, trainer: SummarisationTrainer, what: str) -> tuple[dict[str, dict[str, float]], list[str]]:
        """ROUGE of the test split, both variants, and the summaries."""
        args, compute = trainer.args, trainer.compute_metrics
        generates, args.predict_with_generate, trainer.compute_metrics = args.predict_with_generate, True, None
        predictions = trainer.predict(self.splits["test"], metric_key_prefix=what).predictions
        args.predict_with_generate, trainer.compute_metrics = generates, compute
        texts = self.decode(predictions, len(self.splits["test"]))
        references = list(self.splits["test"]["summary"])
        if (what == "after" or self.script.method == "none") and self.folder is not None:
            self.write_each(Path(args.output_dir), texts, references)
        return {variant: rouge_scores(texts, references, variant=variant) for variant in VARIANTS}, texts

    def write_each(self, folder: Path, texts: list[str], references: list[str]) -> None:
        """ROUGE of every item alone, by the conventions of rouge-score."""
        pairs = zip(texts, references, strict=True)
        scores = [rouge_scores([text], [reference], variant=VARIANTS[0]) for text, reference in pairs]
        columns = {name: [round(item[name], 2) for item in scores] for name in scores[0]}
        ids = list(self.splits["test"]["video_id"])
        assert self.script.data_dir is not None
        known = Path(self.script.data_dir) / "sources.json"  # of items that are parts of one video
        source_of = json.loads(known.read_text(encoding="utf-8")) if known.exists() else {item: item for item in ids}
        each = {"ids": ids, "sources": [source_of[item] for item in ids], "figures": columns}
        write_json(folder / "each_test.json", each, indent=None)

    def validation_rouge(self, evaluation: Any) -> dict[str, float]:
        """ROUGE of the validation split, by which the best checkpoint can be chosen."""
        references = list(self.splits["validation"]["summary"])
        return rouge_scores(self.decode(evaluation.predictions, len(references)), references, variant="rouge_score")

    def decode(self, predictions: Any, count: int) -> list[str]:
        predictions = predictions[:count]  # several processes fill the last batch up with items from the start
        predictions[predictions < 0] = self.tokenizer.pad_token_id
        return [text.strip() for text in self.tokenizer.batch_decode(predictions, skip_special_tokens=True)]

    def save(self, trainer: SummarisationTrainer, folder: Path, collator: How2Collator) -> dict[str, Any]:
        """Saves what was trained; an adapter is loaded into a fresh backbone and must give the same summaries."""
        script, model = self.script, trainer.accelerator.unwrap_model(trainer.model)
        if script.method != "prompt":
            with written_whole(folder) if self.folder is not None else nullcontext(folder) as part:
                trainer.save_model(str(part))  # on all processes; the main one writes
        if self.training.process_index != 0 or not (script.method == "prompt" or isinstance(model, PeftModel)):
            return {"adapter": str(folder)}
        fresh, _ = self.backbone()
        if script.method == "prompt":
            with written_whole(folder) as part:
                save_prompts(model, part)
            fresh = load_prompts(fresh, folder)
        else:
            fresh = PeftModel.from_pretrained(fresh, str(folder))
        items = [self.splits["test"][index] for index in range(min(32, len(self.splits["test"])))]
        same = self.summaries(model, items, collator) == self.summaries(
            fresh.to(self.training.device), items, collator
        )
        weights = [*folder.glob("adapter_model*"), *folder.glob("prompts.safetensors")]
        size = sum(file.stat().st_size for file in weights)
        return {"adapter": str(folder), "adapter_bytes": size, "reloaded_is_identical": same, "reloaded": len(items)}

    @torch.no_grad()
    def summaries(self, model: nn.Module, items: list[dict[str, Any]], collator: How2Collator) -> list[str]:
        model.eval()
        texts: list[str] = []
        for start in range(0, len(items), 16):
            batch = {k: v.to(self.training.device) for k, v in collator(items[start : start + 16]).items()}
            inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "video_features", "video_mask")}
            texts += self.tokenizer.batch_decode(model.generate(**inputs), skip_special_tokens=True)
        return texts

    def examples(self, before: list[str], after: list[str], count: int = 5) -> list[dict[str, str]]:
        """A handful of summaries beside their references."""
        references = list(self.splits["test"]["summary"])[:count]
        rows = zip(references, before or ["(not measured)"] * count, after, strict=False)
        return [{"reference": reference, "before": old, "after": new} for reference, old, new in rows]
