"""Adapts a frozen vision-guided summariser with READ + PVLA, and reports what that was worth.

    accelerate launch examples/how2_summarize.py
    accelerate launch examples/how2_summarize.py --data_dir how2 --model_name_or_path facebook/bart-base \
        --num_train_samples 2000 --output_dir outputs/how2
    accelerate launch examples/how2_summarize.py recipe.yaml --seed 1

Without `--data_dir` it generates How2-mini and adapts the small backbone beside this script to the one domain that the
backbone has never seen. With it, the data is in the How2 layout: `<split>/tran.tok.txt`, `<split>/desc.tok.txt`, and
features as `video_features/<id>.npy` or `video_features.npz`. A YAML file of arguments may come first; arguments after
it win. An interrupted run that is started again with the same arguments goes on from its last checkpoint.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from how2_report import write_report
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)
from transformers.models.bart.modeling_bart import BartEncoder

from peft_read import PVLAConfig, PVLALossMixin, READConfig
from peft_read.alignment import last_whole_checkpoint
from peft_read.baselines import train_only
from peft_read.data import FeatureStore, How2Collator, generate_how2_mini, load_how2, write_how2_mini
from peft_read.metrics import rouge_scores
from peft_read.models import VGBartForConditionalGeneration

MINI_BACKBONE = Path(__file__).with_name("how2_mini_backbone")
RUN_ARGUMENTS = ("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "seed", "optim")
METHODS = ("read", "adapter", "lora", "full", "bias", "partial", "proj", "none")


@dataclass
class ScriptArguments:
    """The data, the model and the method."""

    data_dir: str | None = field(default=None, metadata={"help": "folder in the How2 layout; default: How2-mini"})
    features: str | None = field(default=None, metadata={"help": "default: <data_dir>/video_features or .npz"})
    train_split: str = "sum_train"
    validation_split: str = "sum_val"
    test_split: str = "sum_test"
    num_train_samples: int | None = field(default=None, metadata={"help": "low-resource subset; How2-mini: 400"})
    num_validation_samples: int | None = None
    num_test_samples: int | None = None
    subset: str = field(default="random", metadata={"help": "random (with --seed) or first lines"})
    model_name_or_path: str = field(
        default=str(MINI_BACKBONE), metadata={"help": "a VG-BART, or a plain BART, which gets new visual modules"}
    )
    method: str = field(default="read", metadata={"help": f"one of {', '.join(METHODS)}"})
    r: int = field(default=16, metadata={"help": "width k of READ and Adapter, rank of LoRA"})
    cell: str = field(default="rnn", metadata={"help": "READ's recurrence: rnn, gru, lstm"})
    pvla: bool = field(default=True, metadata={"help": "the alignment loss; --no_pvla switches it off"})
    pvla_weight: float = 0.1
    pvla_mass: float = 0.5
    pvla_distance: str = "partial_ot"
    dropout: float | None = field(default=None, metadata={"help": "overrides every dropout of the backbone"})
    max_source_length: int = 511
    max_target_length: int = 63
    max_frames: int = 256
    decoder_start: str = field(
        default="model", metadata={"help": "model, or original: train VG-BART from token 0 as the original does"}
    )
    zero_video: bool = field(default=False, metadata={"help": "replace every video feature by zero"})
    compare_zero_video: bool | None = field(
        default=None, metadata={"help": "also adapt without video, for comparison; default: on for How2-mini"}
    )
    measure_before: bool = field(default=True, metadata={"help": "also measure the backbone before adaptation"})
    require_world_size: int | None = field(default=None, metadata={"help": "fail unless so many processes run"})


@dataclass
class TrainingArguments(Seq2SeqTrainingArguments):
    """Trainer's arguments, with defaults for a small frozen backbone."""

    output_dir: str = "outputs/how2_summarize"
    learning_rate: float = 1e-2
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.1
    num_train_epochs: float = 12
    per_device_train_batch_size: int = 16
    per_device_eval_batch_size: int = 32
    eval_strategy: str = "epoch"
    save_strategy: str = "epoch"
    save_total_limit: int = 1
    logging_steps: float = 10
    remove_unused_columns: bool = False
    generation_num_beams: int = 5
    generation_max_length: int = 64
    report_to: str = "none"


class SummarisationTrainer(PVLALossMixin, Seq2SeqTrainer):
    """Trainer with the alignment loss."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    return prepare(sys.argv[1:] if argv is None else list(argv)).execute()


def prepare(argv: list[str]) -> Run:
    """Reads the arguments, the data and the backbone's configuration; what is wrong with them is said here."""
    script, training = parse(argv)
    check_arguments(script, training)
    push, training.push_to_hub = training.push_to_hub, False  # once, at the end, instead of at every checkpoint
    with training.main_process_first(desc="preparing the output folder"):
        if training.process_index == 0:
            prepare_output(script, training)
            if script.data_dir is None:
                generate_data(Path(training.output_dir) / "how2_mini")
    if script.data_dir is None:
        use_how2_mini(script, training)
    splits, store, width = load_data(script, training.seed)
    check_backbone(script, width)
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    return Run(script, training, tokenizer, store, splits, width, push)


def parse(argv: list[str]) -> tuple[ScriptArguments, TrainingArguments]:
    parser = HfArgumentParser((ScriptArguments, TrainingArguments))
    if argv and argv[0].endswith((".yaml", ".yml")):
        values = yaml.safe_load(Path(argv[0]).read_text(encoding="utf-8")) or {}
        known = {argument.name for kind in (ScriptArguments, TrainingArguments) for argument in fields(kind)}
        if unknown := set(values) - known:
            raise ValueError(f"{argv[0]} has unknown arguments {sorted(unknown)}")
        parser.set_defaults(**values)
        argv = argv[1:]
    script, training = parser.parse_args_into_dataclasses(argv)
    return script, training


def check_arguments(script: ScriptArguments, training: TrainingArguments) -> None:
    """Everything that can be wrong before data is read."""
    if script.method not in METHODS:
        raise ValueError(f"--method {script.method!r} is not one of {', '.join(METHODS)}")
    if script.r <= 0:
        raise ValueError(f"--r {script.r} must be positive")
    if script.decoder_start not in ("model", "original"):
        raise ValueError(f"--decoder_start {script.decoder_start!r} is neither 'model' nor 'original'")
    if training.push_to_hub and not training.hub_model_id:
        raise ValueError("--push_to_hub needs --hub_model_id, the name of the repository")
    if script.require_world_size not in (None, training.world_size):
        raise ValueError(
            f"--require_world_size {script.require_world_size}, but {training.world_size} process(es) run; "
            f"on a CPU use torchrun --nproc_per_node {script.require_world_size}"
        )


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
    script.num_train_samples = script.num_train_samples or 400
    if script.compare_zero_video is None:
        script.compare_zero_video = not script.zero_video


def load_data(script: ScriptArguments, seed: int) -> tuple[dict[str, Any], FeatureStore, int]:
    """The three splits, the features, and their width; everything that is wrong with them is said now."""
    assert script.data_dir is not None
    folder = Path(script.data_dir)
    candidates = (
        [Path(script.features)] if script.features else [folder / "video_features", folder / "video_features.npz"]
    )
    path = next((path for path in candidates if path.exists()), None)
    if path is None:
        raise FileNotFoundError(f"no video features at {' or '.join(map(str, candidates))}; set --features")
    store = FeatureStore(path)
    sizes = {
        script.train_split: script.num_train_samples,
        script.validation_split: script.num_validation_samples,
        script.test_split: script.num_test_samples,
    }
    splits = {
        role: load_how2(folder, split, num_samples=sizes[split], seed=seed, subset=script.subset)
        for role, split in zip(("train", "validation", "test"), sizes, strict=True)
    }
    width = None
    for data in splits.values():
        width = store.check(tqdm(data["video_id"], desc="checking features", leave=False), width=width)
    assert width is not None
    return splits, store, width


def check_backbone(script: ScriptArguments, width: int) -> None:
    """Whether the script can adapt this model to features of this width."""
    config = AutoConfig.from_pretrained(script.model_name_or_path)
    if config.model_type not in ("vg_bart", "bart"):
        raise ValueError(f"{script.model_name_or_path} is a {config.model_type!r}; this script takes vg_bart and bart")
    expected = getattr(config, "visual_feature_dim", width)
    if expected != width:
        raise ValueError(f"the video features are {width} wide, but {script.model_name_or_path} takes {expected}")


def load_backbone(script: ScriptArguments, width: int) -> tuple[nn.Module, list[str]]:
    """The backbone, and the names of its modules that are new (not pretrained) and must therefore be trained."""
    config = AutoConfig.from_pretrained(script.model_name_or_path)
    if config.model_type == "vg_bart":
        model, new = VGBartForConditionalGeneration.from_pretrained(script.model_name_or_path), []
    else:
        model = VGBartForConditionalGeneration.from_plain_checkpoint(
            script.model_name_or_path,
            visual_feature_dim=width,
            use_forget_gate=True,
            use_img_trans=True,
            mask_fusion=True,
        )
        plain = {name for name, _ in BartEncoder(_tiny(config)).named_children()}
        new = [f"encoder.{name}" for name, module in model.model.encoder.named_children() if name not in plain]
        new = [name for name in new if any(True for _ in model.get_submodule(f"model.{name}").parameters())]
    if script.dropout is not None:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = script.dropout
            elif isinstance(getattr(module, "dropout", None), float):
                module.dropout = script.dropout
    return model, new


def _tiny(config: Any) -> Any:
    """A configuration whose encoder costs nothing to build."""
    return type(config)(vocab_size=8, d_model=8, encoder_layers=1, encoder_ffn_dim=8, encoder_attention_heads=1)


def apply_method(model: nn.Module, new_modules: list[str], script: ScriptArguments) -> nn.Module:
    """Wraps or freezes the backbone; new modules are trained with every method, and saved with every adapter."""
    save = new_modules or None
    if script.method == "read":
        config = READConfig(r=script.r, cell=script.cell, modules_to_save=save, task_type="SEQ_2_SEQ_LM")
        return get_peft_model(model, config)
    if script.method == "adapter":
        config = READConfig(r=script.r, cell="none", modules_to_save=save, task_type="SEQ_2_SEQ_LM")
        return get_peft_model(model, config)
    if script.method == "lora":
        targets = ["q_proj", "v_proj"]
        config = LoraConfig(r=script.r, target_modules=targets, modules_to_save=save, task_type="SEQ_2_SEQ_LM")
        return get_peft_model(model, config)
    return train_only(model, script.method, also=new_modules)


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
    ) -> None:
        self.script, self.training, self.tokenizer = script, training, tokenizer
        self.store, self.splits, self.width, self.push = store, splits, width, push

    def execute(self) -> dict[str, Any]:
        """Adapts, compares, reports; the numbers of the report."""
        started, script, training = time.time(), self.script, self.training
        result = self.adapt(zero_video=script.zero_video, push=self.push)
        if script.compare_zero_video and script.method != "none":
            result["without_video"] = self.adapt(zero_video=True, compare=False)
        result |= {"seconds": time.time() - started, "world_size": training.world_size, "arguments": asdict(script)}
        if training.process_index == 0:
            folder = Path(training.output_dir)
            (folder / "results.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            print(write_report(folder, result))
            remove_checkpoints(folder)
        return result

    def adapt(self, *, zero_video: bool, compare: bool = True, push: bool = False) -> dict[str, Any]:
        """Trains one adapter and measures it; the numbers of the report.

        `compare` also measures the backbone before adaptation, and the adapter on zeroed video.
        """
        script, training = self.script, copy.copy(self.training)
        if not compare:
            training.output_dir = str(Path(training.output_dir) / "without_video")
        set_seed(training.seed)
        model, new_modules = self.backbone()
        collator = self.collator(model.config, zero_video)
        model = apply_method(model, new_modules, script)
        pvla = script.pvla and script.method != "none"
        trainer = SummarisationTrainer(
            model=model,
            args=training,
            train_dataset=self.splits["train"],
            eval_dataset=self.splits["validation"],
            data_collator=collator,
            processing_class=self.tokenizer,
            pvla_config=self.pvla_config() if pvla else None,
        )
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
        trainer.train(resume_from_checkpoint=last_whole_checkpoint(training.output_dir))
        result["log"] = trainer.state.log_history
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
        model.generation_config = self.generation_config(model)
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

    def generation_config(self, model: nn.Module) -> GenerationConfig:
        """The original's settings: beams, no repeated 3-gram, early stopping."""
        return GenerationConfig(
            num_beams=self.training.generation_num_beams,
            max_length=self.training.generation_max_length,
            early_stopping=self.training.generation_num_beams > 1,
            no_repeat_ngram_size=3,
            decoder_start_token_id=model.config.decoder_start_token_id,
            bos_token_id=model.config.bos_token_id,
            eos_token_id=model.config.eos_token_id,
            pad_token_id=model.config.pad_token_id,
            forced_eos_token_id=model.config.eos_token_id,
        )

    def pvla_config(self) -> PVLAConfig:
        script = self.script
        return PVLAConfig(weight=script.pvla_weight, mass=script.pvla_mass, distance=script.pvla_distance)

    def measure(self, trainer: SummarisationTrainer, what: str) -> tuple[dict[str, dict[str, float]], list[str]]:
        """ROUGE of the test split, both variants, and the summaries."""
        trainer.args.predict_with_generate = True
        predictions = trainer.predict(self.splits["test"], metric_key_prefix=what).predictions
        trainer.args.predict_with_generate = False
        # Several processes fill the last batch up with items from the start.
        predictions = predictions[: len(self.splits["test"])]
        predictions[predictions < 0] = self.tokenizer.pad_token_id
        texts = [text.strip() for text in self.tokenizer.batch_decode(predictions, skip_special_tokens=True)]
        references = list(self.splits["test"]["summary"])
        variants = ("rouge_score", "easy_rouge")
        return {variant: rouge_scores(texts, references, variant=variant) for variant in variants}, texts

    def save(self, trainer: SummarisationTrainer, folder: Path, collator: How2Collator) -> dict[str, Any]:
        """Saves what was trained; an adapter is loaded into a fresh backbone and must give the same summaries."""
        trainer.save_model(str(folder))
        if self.training.process_index != 0 or not isinstance(trainer.model, PeftModel):
            return {"adapter": str(folder)}
        fresh, _ = self.backbone()
        fresh = PeftModel.from_pretrained(fresh, str(folder)).to(self.training.device)
        items = [self.splits["test"][index] for index in range(min(32, len(self.splits["test"])))]
        trained = trainer.accelerator.unwrap_model(trainer.model)
        same = self.summaries(trained, items, collator) == self.summaries(fresh, items, collator)
        size = sum(file.stat().st_size for file in folder.glob("adapter_model*"))
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


def prepare_output(script: ScriptArguments, training: TrainingArguments) -> None:
    """Checkpoints in the output folder mean an interrupted run: only the same run may go on from them."""
    folder = Path(training.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.json"
    now = {**asdict(script), **{k: v for k, v in training.to_dict().items() if k in RUN_ARGUMENTS}}
    if path.exists() and last_whole_checkpoint(folder):
        then = json.loads(path.read_text(encoding="utf-8"))
        if changed := sorted(k for k in now if now[k] != then.get(k)):
            raise ValueError(
                f"{folder} holds checkpoints of an interrupted run with other arguments: "
                f"{', '.join(f'{k} was {then.get(k)!r}, is {now[k]!r}' for k in changed)}. Start it with the same "
                "arguments to go on, or choose another --output_dir, or delete its checkpoint-* folders"
            )
    path.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")


def remove_checkpoints(folder: Path) -> None:
    """What is left is the adapter; a finished run that is started again starts anew."""
    for checkpoint in folder.rglob("checkpoint-*"):
        if checkpoint.is_dir():
            shutil.rmtree(checkpoint)


if __name__ == "__main__":
    try:
        prepared = prepare(sys.argv[1:])
    except (ValueError, OSError) as error:  # bad input: one line, before any training time is spent
        sys.exit(f"how2_summarize.py: {error}")
    prepared.execute()
