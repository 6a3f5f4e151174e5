"""Pretrains a small VG-BART, vision included: the frozen backbone that the examples adapt.

    python examples/pretrain_vg_bart.py --corpus how2_mini --output_dir examples/how2_mini_backbone
    python examples/pretrain_vg_bart.py --corpus captions --captions captions.jsonl --features features.npz \
        --output_dir outputs/captions_backbone

`how2_mini`: video-guided summarisation on seven of the eight generated domains, and denoising of plain talk that uses
the words of all eight. The eighth domain (gardening) is never seen with a video or a summary.
`captions`: text infilling (BART's pretraining) on captions of videos, with the videos' features as visual input; one
JSON object a line, {"vid": ..., "captions": [...]}, an archive of features with the same ids.
"""

from __future__ import annotations

import json
import lzma
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    HfArgumentParser,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)

from peft_read.data import HOW2_MINI_DOMAINS, FeatureStore, How2Collator, generate_how2_mini, how2_mini_talk
from peft_read.models import VGBartConfig, VGBartForConditionalGeneration

UNSEEN_DOMAIN = "gardening"
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]  # ids 0 to 4, as in BART but for <mask>
MASK_RATIO, MEAN_SPAN = 0.3, 3.0  # BART's text infilling


@dataclass
class Arguments:
    """What to pretrain on, and how large."""

    corpus: str = field(default="how2_mini", metadata={"help": "how2_mini or captions"})
    captions: str | None = field(default=None, metadata={"help": "jsonl (or .xz) of captions, one video a line"})
    features: str | None = field(default=None, metadata={"help": "feature archive with the ids of the captions"})
    num_items: int = field(default=240_000, metadata={"help": "generated clips, or caption passages"})
    vocab_size: int = field(default=4_000, metadata={"help": "of the captions' tokenizer"})
    d_model: int = 96
    ffn_dim: int = 256
    layers: int = 2
    heads: int = 4
    fusion_layer: int = 0
    img_trans_layers: int = 2
    softmax_dim: str = field(default="video", metadata={"help": "text (the original) or video: learns far sooner"})
    dropout: float = 0.0


@dataclass
class TrainingArguments(Seq2SeqTrainingArguments):
    """Defaults for two CPU cores."""

    output_dir: str = "outputs/pretrained_backbone"
    learning_rate: float = 1e-3
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 200
    num_train_epochs: float = 1
    per_device_train_batch_size: int = 32
    train_sampling_strategy: str = "sequential"
    max_grad_norm: float = 1.0
    weight_decay: float = 0.01
    logging_steps: float = 100
    save_strategy: str = "no"
    remove_unused_columns: bool = False


class MemoryFeatures(dict):
    """Features by id, held in memory."""


def main() -> None:
    arguments, training = HfArgumentParser((Arguments, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(training.seed)
    if arguments.corpus == "how2_mini":
        items, features, tokenizer = how2_mini_corpus(arguments.num_items, seed=training.seed)
    elif arguments.corpus == "captions":
        items, features, tokenizer = caption_corpus(arguments, seed=training.seed)
    else:
        raise ValueError(f"--corpus {arguments.corpus!r} is neither 'how2_mini' nor 'captions'")
    width = next(iter(features.values())).shape[1]
    model = VGBartForConditionalGeneration(configuration(arguments, len(tokenizer), width))
    print(f"{len(items)} items, vocabulary of {len(tokenizer)}, {model.num_parameters():,} parameters")

    collator = How2Collator(tokenizer, features, decoder_start_token_id=2)
    trainer = Seq2SeqTrainer(model=model, args=training, train_dataset=items, data_collator=collator)
    trainer.train()
    model.save_pretrained(training.output_dir)
    tokenizer.save_pretrained(training.output_dir)
    (Path(training.output_dir) / "pretraining.json").write_text(
        json.dumps({"log": trainer.state.log_history[-2:], "steps": trainer.state.global_step}, indent=2) + "\n"
    )


def configuration(arguments: Arguments, vocab_size: int, width: int) -> VGBartConfig:
    """A small VG-BART with forget gate and visual transformer (the best published variant)."""
    return VGBartConfig(
        vocab_size=vocab_size,
        d_model=arguments.d_model,
        encoder_layers=arguments.layers,
        decoder_layers=arguments.layers,
        encoder_attention_heads=arguments.heads,
        decoder_attention_heads=arguments.heads,
        encoder_ffn_dim=arguments.ffn_dim,
        decoder_ffn_dim=arguments.ffn_dim,
        max_position_embeddings=512,
        dropout=arguments.dropout,
        attention_dropout=arguments.dropout,
        activation_dropout=0.0,
        fusion_layer=arguments.fusion_layer,
        cross_attn_type=0,
        use_forget_gate=True,
        use_img_trans=True,
        visual_feature_dim=width,
        img_trans_layers=arguments.img_trans_layers,
        img_trans_heads=4,
        img_trans_ffn_dim=2 * width,
        img_trans_dropout=arguments.dropout,
        softmax_dim=arguments.softmax_dim,
        mask_fusion=True,
        forced_eos_token_id=2,
    )


def how2_mini_corpus(num_items: int, *, seed: int) -> tuple[list[dict], MemoryFeatures, PreTrainedTokenizerFast]:
    """Summaries of seven domains, in a curriculum, and talk to denoise, in the order of training."""
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
    vocabulary = {word: index for index, word in enumerate([*SPECIAL_TOKENS, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = wrap_tokenizer(tokenizer)

    features = MemoryFeatures({clip.video_id: clip.features for clip in clips})
    features["no_video"] = np.zeros((1, clips[0].features.shape[1]), dtype=np.float32)
    lessons_in_order = [{"video_id": c.video_id, "transcript": c.transcript, "summary": c.summary} for c in clips]
    rng = np.random.default_rng(seed + 1)
    denoising = [{"video_id": "no_video", "transcript": infill(t.split(), rng), "summary": t} for t in talk]
    # Talk is strewn among the lessons, whose order is kept.
    places = np.sort(rng.choice(num_items, size=len(denoising), replace=False))
    strewn, rest = dict(zip(places.tolist(), denoising, strict=True)), iter(lessons_in_order)
    items = [strewn[index] if index in strewn else next(rest) for index in range(num_items)]
    return items, features, wrapped


def caption_corpus(arguments: Arguments, *, seed: int) -> tuple[list[dict], MemoryFeatures, PreTrainedTokenizerFast]:
    """Passages of consecutive captions with spans masked; the video is the features of the passage's clips."""
    if arguments.captions is None or arguments.features is None:
        raise ValueError("--corpus captions needs --captions (jsonl) and --features (archive)")
    opener = lzma.open if arguments.captions.endswith(".xz") else open
    with opener(arguments.captions, "rt", encoding="utf-8") as file:
        videos = {record["vid"]: [tokenize(c) for c in record["captions"]] for record in map(json.loads, file)}
    store = FeatureStore(arguments.features)
    videos = {vid: captions for vid, captions in videos.items() if vid in store}
    if not videos:
        raise ValueError(f"no video of {arguments.captions} has features in {arguments.features}")

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        (caption for captions in videos.values() for caption in captions),
        trainers.BpeTrainer(vocab_size=arguments.vocab_size, special_tokens=SPECIAL_TOKENS, show_progress=False),
    )
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
    return items, features, wrap_tokenizer(tokenizer)


def tokenize(caption: str) -> str:
    """Lower case, full stops and commas set off."""
    return " ".join(caption.lower().replace(".", " . ").replace(",", " , ").split())


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
    )


def infill(words: Sequence[str], rng: np.random.Generator) -> str:
    """BART's text infilling: spans of Poisson length become one <mask> each, about 30 % of the words in all."""
    words = list(words)
    to_mask = round(MASK_RATIO * len(words))
    while to_mask > 0:
        length = min(int(rng.poisson(MEAN_SPAN)), to_mask, len(words))
        start = int(rng.integers(0, len(words) - length + 1))
        words[start : start + length] = ["<mask>"]
        to_mask -= max(1, length)
    return " ".join(words)


if __name__ == "__main__":
    main()
