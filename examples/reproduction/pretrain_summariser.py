"""Pretrains a small VG-BART or VG-T5, vision included: the frozen backbone that the examples adapt.

    python examples/reproduction/pretrain_summariser.py --corpus how2_mini --output_dir examples/how2_mini_backbone
    python examples/reproduction/pretrain_summariser.py --backbone vg_t5 --corpus captions --captions captions.jsonl \
        --features features.npz --output_dir outputs/captions_t5

`how2_mini`: video-guided summarisation on seven of the eight generated domains, and denoising of plain talk that uses
the words of all eight. The eighth domain (gardening) is never seen with a video or a summary.
`captions`: text infilling (BART's pretraining) on captions of videos, with the videos' features as visual input; one
JSON object per line, {"vid": ..., "captions": [...]}, an archive of features with the same ids.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pretrained_backbone import bart_sizes, save_backbone
from run_folder import only_run_in
from script_arguments import (
    ScriptParser,
    check_at_least,
    check_heads,
    check_numbers,
    check_training,
    one_line_errors,
)
from small_tokenizers import BART_TOKENS, T5_TOKENS, byte_pair_tokenizer, word_tokenizer
from text_infilling import infill
from training_defaults import PretrainingArguments
from transformers import PreTrainedTokenizerFast, Seq2SeqTrainer, set_seed

from peft_read.data import HOW2_MINI_DOMAINS, FeatureStore, How2Collator, generate_how2_mini, how2_mini_talk
from peft_read.data.jsonl import read_jsonl
from peft_read.models import (
    VGBartConfig,
    VGBartForConditionalGeneration,
    VGT5Config,
    VGT5ForConditionalGeneration,
)

UNSEEN_DOMAIN = "gardening"
SPECIAL_TOKENS = {"vg_bart": BART_TOKENS, "vg_t5": T5_TOKENS}


@dataclass
class Arguments:
    """What to pretrain on, and how large."""

    backbone: str = field(default="vg_bart", metadata={"help": "vg_bart or vg_t5"})
    corpus: str = field(default="how2_mini", metadata={"help": "how2_mini or captions"})
    captions: str | None = field(default=None, metadata={"help": "jsonl (or .xz) of captions, one video per line"})
    features: str | None = field(default=None, metadata={"help": "feature archive with the ids of the captions"})
    num_items: int = field(default=240_000, metadata={"help": "generated clips, or caption passages"})
    vocab_size: int = field(default=4_000, metadata={"help": "of the captions' tokenizer"})
    d_model: int = 96
    ffn_dim: int = 256
    layers: int = 2
    heads: int = 4
    fusion_layer: int = 0
    feed_forward_proj: str = field(
        default="relu", metadata={"help": "of VG-T5: relu, or gated-gelu (T5 1.1, flan-T5)"}
    )
    img_trans_layers: int = 2
    softmax_dim: str = field(default="video", metadata={"help": "text (the original) or video: learns far sooner"})
    dropout: float = 0.0


@dataclass
class TrainingArguments(PretrainingArguments):
    """Trainer's arguments, with defaults for How2-mini."""

    output_dir: str = "outputs/pretrained_backbone"
    warmup_steps: float = 200
    per_device_train_batch_size: int = 32


class MemoryFeatures(dict):
    """Features by id, held in memory."""


def main(argv: Sequence[str] | None = None) -> None:
    arguments, training = parse(sys.argv[1:] if argv is None else list(argv))
    with only_run_in(Path(training.output_dir)):
        pretrain(arguments, training, *read_corpus(arguments, training.seed))


def parse(argv: list[str]) -> tuple[Arguments, TrainingArguments]:
    """The arguments; errors in them are raised here."""
    arguments, training = ScriptParser((Arguments, TrainingArguments)).parse_args_into_dataclasses(argv)
    if arguments.backbone not in SPECIAL_TOKENS:
        raise ValueError(f"--backbone {arguments.backbone!r} is neither 'vg_bart' nor 'vg_t5'")
    if arguments.corpus not in ("how2_mini", "captions"):
        raise ValueError(f"--corpus {arguments.corpus!r} is neither 'how2_mini' nor 'captions'")
    if arguments.corpus == "captions" and (arguments.captions is None or arguments.features is None):
        raise ValueError("--corpus captions needs --captions (jsonl) and --features (archive)")
    check_numbers(arguments)
    check_training(training)
    sizes = ("num_items", "vocab_size", "d_model", "ffn_dim", "layers", "heads", "img_trans_layers")
    check_at_least(arguments, {**dict.fromkeys(sizes, 1), "fusion_layer": -1, "dropout": 0})
    check_heads(arguments)
    if arguments.fusion_layer >= arguments.layers:
        raise ValueError(f"--fusion_layer {arguments.fusion_layer}: there are {arguments.layers} --layers")
    if arguments.dropout >= 1:
        raise ValueError(f"--dropout {arguments.dropout} is outside [0, 1)")
    if arguments.softmax_dim not in ("text", "video"):
        raise ValueError(f"--softmax_dim {arguments.softmax_dim!r} is neither 'text' nor 'video'")
    return arguments, training


Corpus = tuple[list[dict], "MemoryFeatures", PreTrainedTokenizerFast]


def read_corpus(arguments: Arguments, seed: int) -> Corpus:
    """The items in the order of training, the features, and a tokenizer made for them."""
    set_seed(seed)
    make = how2_mini_corpus if arguments.corpus == "how2_mini" else caption_corpus
    return make(arguments, seed=seed)


def pretrain(
    arguments: Arguments,
    training: TrainingArguments,
    items: list[dict],
    features: MemoryFeatures,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Trains the backbone and saves it."""
    width = next(iter(features.values())).shape[1]
    if arguments.backbone == "vg_bart":
        model: Any = VGBartForConditionalGeneration(bart_configuration(arguments, len(tokenizer), width))
    else:
        model = VGT5ForConditionalGeneration(t5_configuration(arguments, len(tokenizer), width))
    print(f"{len(items)} items, vocabulary of {len(tokenizer)}, {model.num_parameters():,} parameters")

    collator = How2Collator(tokenizer, features, decoder_start_token_id=model.config.decoder_start_token_id)
    trainer = Seq2SeqTrainer(model=model, args=training, train_dataset=items, data_collator=collator)
    trainer.train()
    save_backbone(trainer, tokenizer, Path(training.output_dir))


def bart_configuration(arguments: Arguments, vocab_size: int, width: int) -> VGBartConfig:
    """A small VG-BART with forget gate and visual transformer (the best published variant)."""
    return VGBartConfig(
        vocab_size=vocab_size,
        max_position_embeddings=512,
        dropout=arguments.dropout,
        attention_dropout=arguments.dropout,
        activation_dropout=0.0,
        forced_eos_token_id=2,
        **bart_sizes(
            d_model=arguments.d_model,
            encoder_layers=arguments.layers,
            decoder_layers=arguments.layers,
            heads=arguments.heads,
            ffn_dim=arguments.ffn_dim,
        ),
        **vision_guidance(arguments, width),
    )


def t5_configuration(arguments: Arguments, vocab_size: int, width: int) -> VGT5Config:
    """A small VG-T5 of the same sizes; the video comes in where VG-BART has it, and the visual transformer is used."""
    return VGT5Config(
        vocab_size=vocab_size,
        d_model=arguments.d_model,
        d_kv=arguments.d_model // arguments.heads,
        d_ff=arguments.ffn_dim,
        num_layers=arguments.layers,
        num_heads=arguments.heads,
        feed_forward_proj=arguments.feed_forward_proj,
        dropout_rate=arguments.dropout,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        fusion_place="layer",
        apply_img_trans=True,
        **vision_guidance(arguments, width),
    )


def vision_guidance(arguments: Arguments, width: int) -> dict[str, Any]:
    """What the two configurations share."""
    return {
        "fusion_layer": arguments.fusion_layer,
        "cross_attn_type": 0,
        "use_forget_gate": True,
        "use_img_trans": True,
        "visual_feature_dim": width,
        "img_trans_layers": arguments.img_trans_layers,
        "img_trans_heads": 4,
        "img_trans_ffn_dim": 2 * width,
        "img_trans_dropout": arguments.dropout,
        "softmax_dim": arguments.softmax_dim,
        "mask_fusion": True,
    }


def how2_mini_corpus(arguments: Arguments, *, seed: int) -> tuple[list[dict], MemoryFeatures, PreTrainedTokenizerFast]:
    """Summaries of seven domains, in a curriculum, and talk to denoise, in the order of training."""
    num_items = arguments.num_items
    seen = [name for name in HOW2_MINI_DOMAINS if name != UNSEEN_DOMAIN]
    # A curriculum: clips of one step are where a model finds out what frames mean, longer ones add the order.
    lessons = [((1, 1), 0.12), ((2, 3), 0.23), ((3, 6), 0.50)]
    clips = []
    for number, (steps, share) in enumerate(lessons):
        count = round(share * num_items)
        clips += generate_how2_mini(
            count, seed=seed + 10 * number, domains=seen, num_steps=steps, wandering=0.5, prefix="pretrain"
        )
    talk = how2_mini_talk(num_items - len(clips), seed=seed)
    words = Counter(word for line in talk for word in line.split())
    words.update(word for clip in clips for word in f"{clip.transcript} {clip.summary}".split())
    tokenizer = word_tokenizer(words, SPECIAL_TOKENS[arguments.backbone])

    features = MemoryFeatures({clip.video_id: clip.features for clip in clips})
    features["no_video"] = np.zeros((1, clips[0].features.shape[1]), dtype=np.float32)
    lessons_in_order = [{"video_id": c.video_id, "transcript": c.transcript, "summary": c.summary} for c in clips]
    rng = np.random.default_rng(seed + 1)
    denoising = [{"video_id": "no_video", "transcript": infill(t.split(), rng), "summary": t} for t in talk]
    # Talk is interleaved with the lessons, whose order is kept.
    places = np.sort(rng.choice(num_items, size=len(denoising), replace=False))
    interleaved, rest = dict(zip(places.tolist(), denoising, strict=True)), iter(lessons_in_order)
    items = [interleaved[index] if index in interleaved else next(rest) for index in range(num_items)]
    return items, features, tokenizer


def caption_corpus(arguments: Arguments, *, seed: int) -> tuple[list[dict], MemoryFeatures, PreTrainedTokenizerFast]:
    """Passages of consecutive captions with spans masked; the video is the features of the passage's clips."""
    assert arguments.captions is not None and arguments.features is not None
    videos = {
        record["vid"]: [tokenize(caption) for caption in record["captions"]]
        for record in read_jsonl(arguments.captions, required=("vid", "captions"))
    }
    store = FeatureStore(arguments.features)
    videos = {vid: captions for vid, captions in videos.items() if vid in store}
    if not videos:
        raise ValueError(f"no video of {arguments.captions} has features in {arguments.features}")

    texts = (caption for captions in videos.values() for caption in captions)
    tokenizer = byte_pair_tokenizer(texts, arguments.vocab_size, SPECIAL_TOKENS[arguments.backbone])
    rng = np.random.default_rng(seed)
    names = sorted(videos)
    features, items = MemoryFeatures(), []
    for index in range(arguments.num_items):
        vid = names[rng.integers(len(names))]
        captions = videos[vid]
        # Target of one or two captions, within a sparse transcript like the one of the task: every third clip.
        start = int(rng.integers(0, max(1, len(captions) - 9)))
        chosen = captions[start : start + 9 : 3]
        words = " ".join(chosen).split()
        features[f"{vid}_{index}"] = store[vid][start : start + 9]
        items.append({"video_id": f"{vid}_{index}", "transcript": infill(words, rng), "summary": " ".join(words[:62])})
    return items, features, tokenizer


def tokenize(caption: str) -> str:
    """Lower case, full stops and commas set off."""
    return " ".join(caption.lower().replace(".", " . ").replace(",", " , ").split())


if __name__ == "__main__":
    with one_line_errors("pretrain_summariser.py"):
        main()
