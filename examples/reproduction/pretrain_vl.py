"""Pretrains a small VL-BART on generated scenes: the frozen backbone that `vl_multitask.py` adapts.

    python examples/reproduction/pretrain_vl.py --hold_out comparing --vocab_size 2000 --num_items 200000 \
        --captions captions_val.jsonl.xz captions_test.jsonl.xz --caption_share 0.25 --output_dir outputs/stage_1
    python examples/reproduction/pretrain_vl.py --hold_out comparing --model_name_or_path outputs/stage_1 \
        --first_item 200000 --num_items 96000 --captions captions_val.jsonl.xz captions_test.jsonl.xz \
        --caption_share 0.15 --output_dir examples/vl_mini_backbone

The scenes are those of VL-mini (`peft_read.data.generate_vl_mini`), all topics or all but one. With `--captions` a
part of the examples is text infilling on captions of videos, without anything to see; one JSON object per line,
{"vid": ..., "captions": [...]}.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pretrain_summariser import SPECIAL_TOKENS, infill, wrap_tokenizer
from run_folder import ScriptParser, check_at_least, check_numbers, check_training, lock_folder, log_without_times
from scene_batches import SceneCollator
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast, Seq2SeqTrainer, Seq2SeqTrainingArguments, set_seed

from peft_read.data import SCENE_FEATURE_DIM, VL_MINI_TOPICS, generate_vl_mini
from peft_read.data.jsonl import read_jsonl
from peft_read.files import write_whole
from peft_read.models import VLBartConfig, VLBartForConditionalGeneration

MAX_OBJECTS = 32  # per picture; rows at the end of the token table
PICTURES = 3


@dataclass
class Arguments:
    """What to pretrain on, and how large."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "go on from this backbone, with its sizes"})
    first_item: int = field(default=0, metadata={"help": "the first example; those before it were seen already"})
    num_items: int = field(default=100_000, metadata={"help": "examples, each seen once"})
    hold_out: str | None = field(default=None, metadata={"help": f"a topic to leave out: {', '.join(VL_MINI_TOPICS)}"})
    captions: list[str] = field(default_factory=list, metadata={"help": "jsonl (or .xz) of captions to fill in"})
    caption_share: float = field(default=0.3, metadata={"help": "of the examples, where there are captions"})
    vocab_size: int = field(default=1_000, metadata={"help": "of the tokenizer"})
    d_model: int = 96
    ffn_dim: int = 256
    encoder_layers: int = 3
    decoder_layers: int = 2
    heads: int = 4


@dataclass
class TrainingArguments(Seq2SeqTrainingArguments):
    """Defaults for two CPU cores."""

    output_dir: str = "outputs/vl_backbone"
    learning_rate: float = 1e-3
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 300
    num_train_epochs: float = 1
    per_device_train_batch_size: int = 64
    train_sampling_strategy: str = "sequential"
    max_grad_norm: float = 1.0
    weight_decay: float = 0.01
    logging_steps: float = 100
    save_strategy: str = "no"
    remove_unused_columns: bool = False
    dataloader_pin_memory: bool = torch.cuda.is_available()  # torch warns where there is nothing to pin for
    report_to: str = "none"


class Lessons(Dataset):
    """Examples drawn when they are asked for; the same index gives the same example.

    Args:
        arguments: the topics, and the share of captions.
        captions: to fill in.
        seed: of everything.
    """

    def __init__(self, arguments: Arguments, captions: Sequence[str], *, seed: int) -> None:
        self.arguments, self.captions, self.seed = arguments, captions, seed
        self.topics = [topic for topic in VL_MINI_TOPICS if topic != arguments.hold_out]

    def __len__(self) -> int:
        return self.arguments.num_items

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng((self.seed, self.arguments.first_item + index))
        if self.captions and rng.random() < self.arguments.caption_share:
            caption = self.captions[int(rng.integers(len(self.captions)))]
            return {"text": f"fill: {infill(caption.split(), rng)}", "target": caption, "tokens": None}
        [drawn] = generate_vl_mini(1, seed=int(rng.integers(2**62)), topics=self.topics)
        return {"text": f"{drawn.task}: {drawn.text}", "target": drawn.target, "tokens": drawn.tokens}


def main(argv: Sequence[str] | None = None) -> None:
    arguments, training = parse(sys.argv[1:] if argv is None else list(argv))
    folder = Path(training.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(folder)
    try:
        pretrain(arguments, training, read_captions(arguments.captions), folder)
    finally:
        lock.release()


def parse(argv: list[str]) -> tuple[Arguments, TrainingArguments]:
    """The arguments; everything that can be wrong with them is said now."""
    arguments, training = ScriptParser((Arguments, TrainingArguments)).parse_args_into_dataclasses(argv)
    if arguments.hold_out not in (None, *VL_MINI_TOPICS):
        raise ValueError(f"--hold_out {arguments.hold_out!r} is not one of {', '.join(VL_MINI_TOPICS)}")
    check_numbers(arguments)
    check_training(training)
    sizes = ("num_items", "vocab_size", "d_model", "ffn_dim", "encoder_layers", "decoder_layers", "heads")
    check_at_least(arguments, {**dict.fromkeys(sizes, 1), "caption_share": 0, "first_item": 0})
    if arguments.caption_share > 1:
        raise ValueError(f"--caption_share {arguments.caption_share} is above 1")
    if arguments.d_model % arguments.heads:
        raise ValueError(f"--d_model {arguments.d_model} is no multiple of --heads {arguments.heads}")
    return arguments, training


def read_captions(paths: Sequence[str]) -> list[str]:
    """Every different caption once, in the order of the files."""
    records = (record for path in paths for record in read_jsonl(path, required=("vid", "captions")))
    return list(dict.fromkeys(caption for record in records for caption in record["captions"]))


def pretrain(arguments: Arguments, training: TrainingArguments, captions: list[str], folder: Path) -> None:
    """Trains the backbone and saves it."""
    set_seed(training.seed)
    lessons = Lessons(arguments, captions, seed=training.seed)
    if arguments.model_name_or_path is None:
        tokenizer = build_tokenizer(lessons, captions, arguments.vocab_size)
        model = VLBartForConditionalGeneration(configuration(arguments, len(tokenizer)))
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.model_name_or_path)
        model = VLBartForConditionalGeneration.from_pretrained(arguments.model_name_or_path)
    print(f"{len(lessons)} examples, vocabulary of {len(tokenizer)}, {model.num_parameters():,} parameters")
    trainer = Seq2SeqTrainer(model=model, args=training, train_dataset=lessons, data_collator=SceneCollator(tokenizer))
    trainer.train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record = {
        "topics": lessons.topics,
        "captions": len(captions),
        "steps": trainer.state.global_step,
        "log": log_without_times(trainer.state.log_history)[-3:],
    }
    with write_whole(folder / "pretraining.json") as file:
        file.write(json.dumps(record, indent=2) + "\n")


def build_tokenizer(lessons: Lessons, captions: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """Byte pairs of what the lessons say, in lower case; every letter and digit is known."""
    sample = map(lessons.__getitem__, range(min(len(lessons), 6_000)))
    texts = [text for row in sample for text in (row["text"], row["target"])]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.decoder = decoders.Metaspace()
    letters = [chr(code) for code in range(33, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL_TOKENS["vg_bart"], initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator([*texts, *captions], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return wrap_tokenizer(tokenizer, SPECIAL_TOKENS["vg_bart"])


def configuration(arguments: Arguments, tokens: int) -> VLBartConfig:
    """A small VL-BART for scenes of up to three pictures; without dropout, as nothing is seen twice."""
    return VLBartConfig(
        vocab_size=tokens + MAX_OBJECTS,
        d_model=arguments.d_model,
        encoder_layers=arguments.encoder_layers,
        decoder_layers=arguments.decoder_layers,
        encoder_attention_heads=arguments.heads,
        decoder_attention_heads=arguments.heads,
        encoder_ffn_dim=arguments.ffn_dim,
        decoder_ffn_dim=arguments.ffn_dim,
        max_position_embeddings=128,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        visual_feature_dim=SCENE_FEATURE_DIM,
        num_images=PICTURES,
        max_objects=MAX_OBJECTS,
    )


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # bad input: one line
        sys.exit(f"pretrain_vl.py: {' '.join(str(error).split())}")
