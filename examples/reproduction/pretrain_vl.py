"""Pretrains a small VL-BART on generated scenes: the frozen backbone that `vl_multitask.py` adapts.

    python examples/reproduction/pretrain_vl.py --hold_out comparing --vocab_size 2000 --num_items 200000 \
        --captions captions_val.jsonl.xz captions_test.jsonl.xz --caption_share 0.25 --output_dir outputs/stage_1
    python examples/reproduction/pretrain_vl.py --hold_out comparing --model_name_or_path outputs/stage_1 \
        --first_item 200000 --num_items 96000 --captions captions_val.jsonl.xz captions_test.jsonl.xz \
        --caption_share 0.15 --output_dir examples/vl_mini_backbone

    python examples/reproduction/pretrain_vl.py --captions captions_val.jsonl.xz --features val_captions.npz \
        --unseen highlight_test_with_gt.jsonl.xz --vocab_size 4000 --d_model 128 --ffn_dim 512 \
        --output_dir outputs/vl_video_backbone

The scenes are those of VL-mini (`peft_read.data.generate_vl_mini`), all topics or all but one. With `--captions` a
part of the examples is text infilling on captions of videos, without anything to see; one JSON object per line,
{"vid": ..., "captions": [...]}. With `--features` too, it is a backbone for videos: stretches of the captioned videos,
of which a caption is filled in, written, or chosen among five.
"""

from __future__ import annotations

import sys
from collections import ChainMap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from moment_tasks import CHOICES, VIDEO_TOKENS, choice_text, clip_tokens
from pretrained_backbone import bart_sizes, save_backbone
from run_folder import only_run_in
from scene_batches import SceneCollator
from script_arguments import (
    ScriptParser,
    check_at_least,
    check_heads,
    check_numbers,
    check_training,
    one_line_errors,
)
from small_tokenizers import BART_TOKENS, sentence_tokenizer
from text_infilling import infill
from torch.utils.data import Dataset
from training_defaults import PretrainingArguments
from transformers import PreTrainedTokenizerFast, Seq2SeqTrainer, set_seed

from peft_read.data import SCENE_FEATURE_DIM, VL_MINI_TOPICS, FeatureStore, generate_vl_mini
from peft_read.data.jsonl import read_jsonl
from peft_read.data.qvhighlights import source_of
from peft_read.models import VLBartConfig, VLBartForConditionalGeneration
from peft_read.vl_adapter import task_loss

MAX_OBJECTS = 32  # per picture; rows at the end of the token table
PICTURES = 3
SIZES = ("d_model", "encoder_layers", "decoder_layers", "heads", "ffn_dim")
STRETCH = 64  # examples in a row are all captions or all scenes: a scene need not be padded to a caption's length


@dataclass
class Arguments:
    """What to pretrain on, and how large."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "go on from this backbone, with its sizes"})
    first_item: int = field(default=0, metadata={"help": "the first example; those before it were seen already"})
    num_items: int = field(default=100_000, metadata={"help": "examples, each seen once"})
    hold_out: str | None = field(default=None, metadata={"help": f"a topic to leave out: {', '.join(VL_MINI_TOPICS)}"})
    captions: list[str] = field(default_factory=list, metadata={"help": "jsonl (or .xz) of captions to fill in"})
    features: list[str] = field(
        default_factory=list, metadata={"help": "of the captioned videos: pretrain on these instead of scenes"}
    )
    unseen: list[str] = field(
        default_factory=list, metadata={"help": "annotations of QVHighlights whose sources must not be seen"}
    )
    caption_share: float = field(default=0.3, metadata={"help": "of the examples, where there are captions"})
    loss: str = field(
        default="token_mean",
        metadata={"help": "token_mean; or sample_mean, in which a short answer counts as much as a long sentence"},
    )
    vocab_size: int = field(default=1_000, metadata={"help": "of the tokenizer"})
    d_model: int = 96
    ffn_dim: int = 256
    encoder_layers: int = 3
    decoder_layers: int = 2
    heads: int = 4


@dataclass
class TrainingArguments(PretrainingArguments):
    """Trainer's arguments, with defaults for scenes."""

    output_dir: str = "outputs/vl_backbone"
    warmup_steps: float = 300
    per_device_train_batch_size: int = 64


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
        index += self.arguments.first_item
        rng = np.random.default_rng((self.seed, index))
        stretch = np.random.default_rng((self.seed, index // STRETCH, STRETCH))
        if self.captions and stretch.random() < self.arguments.caption_share:
            caption = self.captions[int(rng.integers(len(self.captions)))]
            return {"text": f"fill: {infill(caption.split(), rng)}", "target": caption, "tokens": None}
        [drawn] = generate_vl_mini(1, seed=int(rng.integers(2**62)), topics=self.topics)
        return {"text": f"{drawn.task}: {drawn.text}", "target": drawn.target, "tokens": drawn.tokens}


class VideoLessons(Dataset):
    """Stretches of captioned videos: a caption to fill in, one to write, one to choose among five.

    Args:
        arguments: the number of examples.
        videos: captions by video.
        stores: features by video, a row per caption.
        seed: of everything.
    """

    topics = ("fill", "describe", "choose")

    def __init__(self, arguments: Arguments, videos: dict[str, list[str]], stores: Any, *, seed: int) -> None:
        self.arguments, self.videos, self.stores, self.seed = arguments, videos, stores, seed
        self.names = sorted(videos)

    def __len__(self) -> int:
        return self.arguments.num_items

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng((self.seed, self.arguments.first_item + index))
        name, *others = (self.names[i] for i in rng.choice(len(self.names), CHOICES, replace=False))
        captions, length = self.videos[name], int(rng.integers(2, 24))
        start = int(rng.integers(0, max(1, len(captions) - length)))
        clips = range(start, min(len(captions), start + length))
        caption = captions[clips[len(clips) // 2]]
        form = self.topics[int(rng.integers(len(self.topics)))]
        row = {"target": caption, "tokens": clip_tokens(self.stores[name], clips)}
        if form == "fill":
            return {**row, "text": f"fill: {infill(caption.split(), rng)}"}
        if form == "describe":
            return {**row, "text": "moment: "}
        offered = [str(rng.choice(self.videos[other])) for other in others]
        place = int(rng.integers(CHOICES))
        return {**row, "text": choice_text([*offered[:place], caption, *offered[place:]]), "target": f"a{place}"}


class LessonTrainer(Seq2SeqTrainer):
    """Trains with one kind of `task_loss`; a whole batch is one step."""

    kind_of_loss = "token_mean"

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of the batch; a `compute_loss_func` would keep the labels from the decoder."""
        outputs = model(**inputs)
        loss = task_loss(outputs.logits, inputs["labels"], self.kind_of_loss).mean
        return (loss, outputs) if return_outputs else loss


def main(argv: Sequence[str] | None = None) -> None:
    arguments, training = parse(sys.argv[1:] if argv is None else list(argv))
    with only_run_in(Path(training.output_dir)):
        pretrain(arguments, training, Path(training.output_dir))


def parse(argv: list[str]) -> tuple[Arguments, TrainingArguments]:
    """The arguments; errors in them are raised here."""
    arguments, training = ScriptParser((Arguments, TrainingArguments)).parse_args_into_dataclasses(argv)
    if arguments.hold_out not in (None, *VL_MINI_TOPICS):
        raise ValueError(f"--hold_out {arguments.hold_out!r} is not one of {', '.join(VL_MINI_TOPICS)}")
    check_numbers(arguments)
    check_training(training)
    check_at_least(
        arguments, {**dict.fromkeys(("num_items", "vocab_size", *SIZES), 1), "caption_share": 0, "first_item": 0}
    )
    if arguments.loss not in (known := ("token_mean", "sample_mean")):
        raise ValueError(f"--loss {arguments.loss!r} is not one of {', '.join(known)}")
    if arguments.features and not arguments.captions:
        raise ValueError("--features needs --captions, those of its videos")
    if arguments.unseen and not arguments.captions:
        raise ValueError("--unseen has no meaning without --captions")
    if arguments.caption_share > 1:
        raise ValueError(f"--caption_share {arguments.caption_share} is above 1")
    check_heads(arguments)
    return arguments, training


def read_captions(arguments: Arguments) -> dict[str, list[str]]:
    """Captions by video, without the sources that must not be seen."""
    records = (record for path in arguments.captions for record in read_jsonl(path, required=("vid", "captions")))
    kept_back = {source_of(row["vid"]) for path in arguments.unseen for row in read_jsonl(path, required=("vid",))}
    return {r["vid"]: list(r["captions"]) for r in records if source_of(r["vid"]) not in kept_back}


def lessons_of(arguments: Arguments, videos: dict[str, list[str]], *, seed: int) -> tuple[Dataset, int]:
    """What is learnt, and the width of the visual features."""
    if not arguments.features:
        captions = list(dict.fromkeys(caption for part in videos.values() for caption in part))
        return Lessons(arguments, captions, seed=seed), SCENE_FEATURE_DIM
    stores = ChainMap(*(FeatureStore(path) for path in arguments.features))  # type: ignore[arg-type]
    videos = {vid: captions[: len(stores[vid])] for vid, captions in videos.items() if vid in stores}
    if len(videos) < CHOICES:
        raise ValueError(f"{len(videos)} captioned videos have features; the choices need {CHOICES} at least")
    return VideoLessons(arguments, videos, stores, seed=seed), stores[next(iter(videos))].shape[1]


def pretrain(arguments: Arguments, training: TrainingArguments, folder: Path) -> None:
    """Trains the backbone and saves it."""
    set_seed(training.seed)
    videos = read_captions(arguments)
    lessons, width = lessons_of(arguments, videos, seed=training.seed)
    captions = sorted({caption for part in videos.values() for caption in part})
    if arguments.model_name_or_path is None:
        tokenizer = build_tokenizer(lessons, captions, arguments.vocab_size)
        model = VLBartForConditionalGeneration(configuration(arguments, len(tokenizer), width))
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.model_name_or_path)
        model = VLBartForConditionalGeneration.from_pretrained(arguments.model_name_or_path)
    print(f"{arguments.num_items} examples, vocabulary of {len(tokenizer)}, {model.num_parameters():,} parameters")
    trainer = LessonTrainer(
        model=model, args=training, train_dataset=lessons, data_collator=SceneCollator(tokenizer, width=width)
    )
    trainer.kind_of_loss = arguments.loss
    trainer.train()
    save_backbone(trainer, tokenizer, folder, topics=lessons.topics, captions=len(captions), videos=sorted(videos))


def build_tokenizer(lessons: Any, captions: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """Learns from what the first lessons say, and from the captions."""
    sample = map(lessons.__getitem__, range(min(len(lessons), 6_000)))
    texts = [text for row in sample for text in (row["text"], row["target"])]
    return sentence_tokenizer([*texts, *captions], size, BART_TOKENS)


def configuration(arguments: Arguments, tokens: int, width: int) -> VLBartConfig:
    """A small VL-BART for scenes of up to three pictures; without dropout, as nothing is seen twice."""
    return VLBartConfig(
        vocab_size=tokens + (MAX_OBJECTS if width == SCENE_FEATURE_DIM else VIDEO_TOKENS),
        max_position_embeddings=128 if width == SCENE_FEATURE_DIM else 192,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        visual_feature_dim=width,
        num_images=PICTURES,
        max_objects=MAX_OBJECTS if width == SCENE_FEATURE_DIM else VIDEO_TOKENS,
        **bart_sizes(**{name: getattr(arguments, name) for name in SIZES}),
    )


if __name__ == "__main__":
    with one_line_errors("pretrain_vl.py"):
        main()
