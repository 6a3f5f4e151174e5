"""The grounding datasets as the examples use them: features, text, splits and models."""

from __future__ import annotations

import inspect
import json
import logging
import zlib
from collections import ChainMap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from script_arguments import check_at_least, check_numbers
from torch import nn
from transformers import AutoConfig, AutoModel

from peft_read.data import (
    ClipFeatures,
    FeatureStore,
    MomentDetrCollator,
    SentenceEncoder,
    TextFeatures,
    UMTCollator,
    annotated_pairs,
    leave_one_video_out,
    load_qvhighlights,
    load_tvsum,
    load_youtube_highlights,
    low_resource_split,
    pool_frames,
    ranked_pairs,
    write_feature_archive,
)
from peft_read.data.features import read_arrays
from peft_read.models import (
    MomentDetrConfig,
    MomentDetrForTemporalGrounding,
    UMTConfig,
    UMTForTemporalGrounding,
)

logger = logging.getLogger(__name__)

DATASETS = ("qvhighlights", "tvsum", "youtube_highlights")


@dataclass
class DataArguments:
    """The dataset, its features, and a backbone that is not pretrained."""

    dataset: str = field(default="qvhighlights", metadata={"help": f"one of {', '.join(DATASETS)}"})
    train_file: str | None = field(default=None, metadata={"help": "annotations; of TVSum the only ones needed"})
    validation_file: str | None = field(default=None, metadata={"help": "not with --num_train_samples"})
    test_file: str | None = field(default=None, metadata={"help": "may lack labels (QVHighlights' official test)"})
    features: list[str] = field(
        default_factory=list,
        metadata={"help": "one place per kind of clip features; comma-separated places of one kind are joined"},
    )
    audio_features: list[str] = field(default_factory=list, metadata={"help": "UMT's second stream"})
    text_encoder: str | None = field(default=None, metadata={"help": "folder or Hub name of a sentence encoder"})
    projection: str | None = field(default=None, metadata={"help": ".npz with mean and components, for its tokens"})
    text_cache: str | None = field(default=None, metadata={"help": ".npz that keeps the encoder's work between runs"})
    text_features: str | None = field(default=None, metadata={"help": "instead of the encoder: folder of qid<id>.npz"})
    similarity: bool = field(default=True, metadata={"help": "the query-similarity channel; --no_similarity"})
    endpoints: bool = field(default=True, metadata={"help": "the temporal endpoints; --no_endpoints"})
    max_clips: int | None = field(
        default=None, metadata={"help": "clips kept of a video, from its start; default: all"}
    )
    clip_seconds: float = field(default=2.0, metadata={"help": "length of a clip, of the features and annotations"})
    max_tokens: int = 32
    num_train_samples: int | None = field(
        default=None, metadata={"help": "draws training and validation from one file"}
    )
    num_validation_samples: int = 150
    train_pool: int | None = field(
        default=None, metadata={"help": "queries of the training side, of which --num_train_samples are the first"}
    )
    subset_seed: int = field(default=0, metadata={"help": "of that draw; a pretrained backbone must have the same"})
    num_test_samples: int | None = field(default=None, metadata={"help": "the first so many, for a quick look"})
    domain: str | None = field(default=None, metadata={"help": "of TVSum or YouTube Highlights"})
    test_video: str | None = field(default=None, metadata={"help": "of TVSum: this fold only"})
    backbone: str = field(default="moment_detr", metadata={"help": "moment_detr or umt"})
    d_model: int = 128
    ffn_dim: int = 512
    model_options: str = field(default="{}", metadata={"help": "further fields of the configuration, as JSON"})


@dataclass(frozen=True)
class Fold:
    """One training with its selection and its report; `validation` is None where the last epoch is reported."""

    name: str
    train: Dataset
    validation: Dataset | None
    test: Dataset | None


class SeededByBatch(MomentDetrCollator):
    """Draws pairs that depend on the seed and on the queries of the batch alone.

    A generator that runs on from batch to batch is not part of a checkpoint, so that a training that goes on from one
    would draw other pairs than an uninterrupted one.
    """

    def __init__(self, *args: Any, seed: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seed = seed

    def _seed_worker(self) -> None:
        """The batch alone is the seed, in a worker process of a DataLoader too."""

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        """The batch, see `MomentDetrCollator`."""
        names = "\n".join(f"{row['vid']} {row['query']}" for row in rows)
        self.generator = np.random.default_rng((self.seed, zlib.crc32(names.encode("utf-8", "surrogatepass"))))
        return super().__call__(rows)


class GroundingData:
    """Rows, features and collator of one dataset; errors in them are raised when it is built.

    Args:
        arguments: what to read.
        extra_rows: rows beside the splits whose features and texts are needed (weak labels, one query to answer).
        folds: read the splits.
    """

    def __init__(self, arguments: DataArguments, *, extra_rows: Sequence[dict] = (), folds: bool = True) -> None:
        self.arguments = arguments
        check_data_arguments(arguments)
        self.folds = read_folds(arguments) if folds else []
        rows = [row for fold in self.folds for part in (fold.train, fold.validation, fold.test) for row in part or ()]
        rows += list(extra_rows)
        self.kinds = [self._store(places) for places in arguments.features]
        self.text = self._text(rows)
        # A model that is given no query cannot be given the similarity to one.
        similar = 0 if arguments.similarity and self.text is not None else None
        options: dict[str, Any] = {"endpoints": arguments.endpoints, "max_clips": arguments.max_clips}
        options["clip_seconds"] = arguments.clip_seconds
        self.clips = ClipFeatures(self.kinds, similarity=similar, **options)
        self.audio = None
        if arguments.audio_features:
            self.audio = ClipFeatures([self._store(p) for p in arguments.audio_features], **options)
        widths = UMTCollator(self.clips, audio=self.audio, text=self.text).check(rows)
        self.video_width, self.audio_width, self.text_width = map(widths.get, ("video", "audio", "text"))
        lengths = [self.clips.num_clips(vid) or 0 for vid in dict.fromkeys(row["vid"] for row in rows)]
        self.longest = min(max(lengths), arguments.max_clips or max(lengths))
        if similar is not None and (space := self.kinds[0][rows[0]["vid"]].shape[1]) != self.text_width:
            raise ValueError(
                f"the query similarity needs one space: the first --features are {space} wide, the text "
                f"{self.text_width}; --no_similarity leaves the channel out, --projection brings the text into a space"
            )

    def _store(self, places: str) -> Any:
        joined = open_store(places)
        if self.arguments.dataset == "tvsum" and not any(Path(place).is_dir() for place in places.split(",")):
            # The archive of caption features has a row every 15 frames; folders hold a row per clip.
            return pool_frames(joined, load_tvsum(self.arguments.train_file))
        return joined

    def _text(self, rows: Sequence[dict]) -> TextFeatures | None:
        arguments = self.arguments
        if arguments.dataset == "youtube_highlights":
            return None
        options = {"max_tokens": arguments.max_tokens}
        if arguments.text_features:
            tvsum = arguments.dataset == "tvsum"
            name, array, key = ("{id}", "token", "vid") if tvsum else ("qid{id}", "last_hidden_state", "qid")
            return TextFeatures(FeatureStore(arguments.text_features, name=name, array=array), key=key, **options)
        texts = list(dict.fromkeys(row["query"] for row in rows))
        return TextFeatures(encode(texts, arguments), key="query", **options)

    def collator(self, config: Any, *, pairs: Any = None, seed: int = 0) -> Any:
        """The collator for a model; `pairs` replaces the way in which pairs of clips are drawn for Moment-DETR."""
        if config.model_type == "umt":
            return UMTCollator(self.clips, audio=self.audio, text=self.text)
        if pairs is None:
            pairs = annotated_pairs if self.arguments.dataset == "qvhighlights" else ranked_pairs
        return SeededByBatch(
            self.clips,
            self.text,
            pairs=pairs,
            span_loss_type=config.span_loss_type,
            generator=np.random.default_rng(seed),
            seed=seed,
        )

    def build_model(self) -> nn.Module:
        """A backbone with random weights, of the widths that the features have."""
        arguments = self.arguments
        options = model_options(arguments)
        if arguments.backbone == "moment_detr":
            config = MomentDetrConfig(
                **{
                    "video_feature_dim": self.video_width,
                    "text_feature_dim": self.text_width,
                    "d_model": arguments.d_model,
                    "ffn_dim": arguments.ffn_dim,
                    "max_text_positions": arguments.max_tokens,
                    "num_span_bins": max(75, self.longest),
                    **options,
                }
            )
            return MomentDetrForTemporalGrounding(config)
        moments = arguments.dataset == "qvhighlights"
        config = UMTConfig(
            **{
                "video_feature_dim": self.video_width,
                "audio_feature_dim": self.audio_width,
                "text_feature_dim": self.text_width,
                "d_model": arguments.d_model,
                "ffn_ratio": arguments.ffn_dim / arguments.d_model,
                "heads": ["saliency", "boundary"] if moments else ["saliency"],
                "clip_seconds": arguments.clip_seconds,
                "saliency_loss_weight": 3.0 if moments else 1.0,
                "decoder_layers": 3 if moments else 1,
                # Unlike the original: results that do not depend on how a batch is padded.
                "mask_decoder": True,
                "saliency_over_padding": False,
                **options,
            }
        )
        return UMTForTemporalGrounding(config)

    def load_model(self, name_or_path: str) -> nn.Module:
        """A trained backbone; it must take these features.

        Raises:
            ValueError: it takes others, or it has seen a validation or test video.
        """
        self.check_backbone(name_or_path)
        return AutoModel.from_pretrained(name_or_path)

    def check_backbone(self, name_or_path: str) -> None:
        """Whether a trained backbone takes these features.

        Raises:
            ValueError: it takes others, or it has seen a validation or test video.
        """
        config = AutoConfig.from_pretrained(name_or_path)
        if config.model_type not in ("moment_detr", "umt"):
            raise ValueError(f"{name_or_path} is a model of the type {config.model_type!r}, no Moment-DETR and no UMT")
        widths = {"video": self.video_width, "text": self.text_width}
        if config.model_type == "umt":
            widths["audio"] = self.audio_width
        for kind, width in widths.items():
            expected = getattr(config, f"{kind}_feature_dim", None)
            if expected != width:
                raise ValueError(f"the {kind} features are {width} wide, {name_or_path} expects {expected}")
        if config.model_type == "umt":
            if config.clip_seconds != self.clips.clip_seconds:
                raise ValueError(
                    f"{name_or_path} was made for clips of {config.clip_seconds:g} s, --clip_seconds is "
                    f"{self.clips.clip_seconds:g}"
                )
            if config.max_positions < self.longest:
                raise ValueError(
                    f"{name_or_path} has {config.max_positions} positions, a video has {self.longest} clips: pass "
                    "--max_clips"
                )
        elif config.span_loss_type == "ce" and config.num_span_bins < self.longest:
            raise ValueError(
                f"{name_or_path} can name {config.num_span_bins} clips, a video has {self.longest}: pass --max_clips"
            )
        self._check_unseen(Path(name_or_path) / "pretraining.json")

    def _check_unseen(self, record: Path) -> None:
        if not record.is_file():
            return
        try:
            videos = json.loads(record.read_text(encoding="utf-8"))["videos"]
            seen = {vid.rsplit("_", 2)[0] for vid in videos}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{record} does not say which videos the backbone was pretrained on: {error!r}"
            ) from error
        for fold in self.folds:
            for role, part in (("validation", fold.validation), ("test", fold.test)):
                known = sorted({vid for vid in (part["vid"] if part else ()) if vid.rsplit("_", 2)[0] in seen})
                if known:
                    raise ValueError(
                        f"the backbone was pretrained on sources of {len(known)} {role} videos ({', '.join(known[:3])}"
                        " ...); pretrain it with the same --train_file, --num_train_samples and --subset_seed"
                    )


def open_store(places: str) -> Any:
    """The features at one place, or at several, separated by commas, of which each holds some of the videos.

    Raises:
        ValueError: an empty place, or a video at two of them.
    """
    names = places.split(",")
    if not all(name.strip() for name in names):
        raise ValueError(f"--features {places!r} names an empty place")
    stores = [FeatureStore(name) for name in names]
    seen: dict[str, str] = {}
    for name, store in zip(names, stores, strict=True):
        for vid in store:
            if seen.setdefault(vid, name) is not name:
                raise ValueError(f"the features of {vid!r} are at {seen[vid]} and at {name}: unclear which to read")
    return stores[0] if len(stores) == 1 else ChainMap(*stores)


def model_options(arguments: DataArguments) -> dict[str, Any]:
    """`--model_options`, which must name fields of the backbone's configuration."""
    kind = MomentDetrConfig if arguments.backbone == "moment_detr" else UMTConfig
    try:
        options = json.loads(arguments.model_options)
    except ValueError as error:
        raise ValueError(f"--model_options {arguments.model_options!r} is not valid JSON: {error}") from error
    known = set(inspect.signature(kind).parameters) - {"kwargs"}
    if not isinstance(options, dict) or set(options) - known:
        raise ValueError(
            f"--model_options {arguments.model_options} must be a JSON object with fields of {sorted(known)}"
        )
    return options


# What the other datasets do not read, and where an argument without its partner would be left aside.
ONLY_WITH = {
    "num_train_samples": ("qvhighlights",),
    "train_pool": ("qvhighlights",),
    "num_test_samples": ("qvhighlights",),
    "validation_file": ("qvhighlights", "youtube_highlights"),
    "test_file": ("qvhighlights", "youtube_highlights"),
    "domain": ("tvsum", "youtube_highlights"),
    "test_video": ("tvsum",),
}
LEAST = {
    "max_clips": 1,
    "max_tokens": 1,
    "num_train_samples": 1,
    "train_pool": 1,
    "num_validation_samples": 1,
    "num_test_samples": 1,
    "subset_seed": 0,
    "d_model": 1,
    "ffn_dim": 1,
}


def check_data_arguments(arguments: DataArguments) -> None:
    if arguments.dataset not in DATASETS:
        raise ValueError(f"--dataset {arguments.dataset!r} is not one of {', '.join(DATASETS)}")
    if arguments.backbone not in ("moment_detr", "umt"):
        raise ValueError(f"--backbone {arguments.backbone!r} is neither 'moment_detr' nor 'umt'")
    check_numbers(arguments)
    check_at_least(arguments, LEAST)
    if arguments.clip_seconds <= 0:
        raise ValueError(f"--clip_seconds {arguments.clip_seconds} must be positive")
    if arguments.dataset == "tvsum" and arguments.clip_seconds != 2:
        raise ValueError("--clip_seconds: the labels of TVSum are those of clips of 2 seconds")
    if not arguments.features:
        raise ValueError("--features is needed: folders or archives of clip features")
    if arguments.train_file is None:
        raise ValueError("--train_file is needed: the annotations")
    if arguments.dataset == "youtube_highlights":
        if arguments.backbone == "moment_detr":
            raise ValueError("YouTube Highlights has no queries, and Moment-DETR needs one: use --backbone umt")
    elif not (arguments.text_features or arguments.text_encoder):
        raise ValueError("--text_encoder or --text_features is needed for the queries")
    if arguments.dataset != "qvhighlights" and arguments.domain is None:
        raise ValueError(f"--domain is needed: {arguments.dataset} is trained and reported by domain")
    for name, datasets in ONLY_WITH.items():
        if getattr(arguments, name) is not None and arguments.dataset not in datasets:
            raise ValueError(f"--{name} has no meaning with --dataset {arguments.dataset}")
    if arguments.validation_file is not None and arguments.num_train_samples is not None:
        raise ValueError(
            "--num_train_samples draws the validation part from --train_file: leave out --validation_file"
        )
    if arguments.train_pool is not None and arguments.num_train_samples is None:
        raise ValueError("--train_pool has no meaning without --num_train_samples, the queries that are taken from it")
    if arguments.text_encoder and arguments.text_features:
        raise ValueError("--text_encoder and --text_features: pass one of them")
    for name in ("projection", "text_cache"):
        if getattr(arguments, name) and not arguments.text_encoder:
            raise ValueError(f"--{name} has no meaning without --text_encoder")
    if arguments.audio_features and arguments.backbone == "moment_detr":
        raise ValueError("--audio_features: Moment-DETR has one stream; use --backbone umt")
    model_options(arguments)


def read_folds(arguments: DataArguments) -> list[Fold]:
    train_file = arguments.train_file
    if arguments.dataset == "tvsum":
        folds = leave_one_video_out(load_tvsum(train_file, domain=arguments.domain))
        named = [Fold(test["vid"][0], train, None, test) for train, test in folds]
        if arguments.test_video is not None:
            named = [fold for fold in named if fold.name == arguments.test_video]
            if not named:
                raise ValueError(f"--test_video {arguments.test_video!r} is not a video of {arguments.domain}")
        return named
    if arguments.dataset == "youtube_highlights":
        parts = [
            None if file is None else load_youtube_highlights(file, domain=arguments.domain)
            for file in (train_file, arguments.validation_file, arguments.test_file)
        ]
        return [Fold(arguments.domain, *parts)]
    seconds = arguments.clip_seconds
    train = load_qvhighlights(train_file, clip_seconds=seconds)
    validation = None
    if arguments.num_train_samples is not None:
        train, validation = low_resource_split(
            train,
            num_train=arguments.num_train_samples,
            num_validation=arguments.num_validation_samples,
            seed=arguments.subset_seed,
            pool=arguments.train_pool,
        )
    elif arguments.validation_file is not None:
        validation = load_qvhighlights(arguments.validation_file, clip_seconds=seconds)
    test = None
    if arguments.test_file is not None:
        test = load_qvhighlights(arguments.test_file, require_labels=False, clip_seconds=seconds)
        if arguments.num_test_samples is not None:
            test = test.select(range(min(arguments.num_test_samples, len(test))))
    return [Fold("qvhighlights", train, validation, test)]


def encode(texts: list[str], arguments: DataArguments) -> dict[str, np.ndarray]:
    """Token features by text; what the cache holds is not computed again, if the same encoder made it."""
    encoder = SentenceEncoder(arguments.text_encoder, projection=arguments.projection, max_tokens=arguments.max_tokens)
    cache = Path(arguments.text_cache) if arguments.text_cache else None
    known = {} if cache is None else read_text_cache(cache, encoder.fingerprint)
    new = encoder.tokens([text for text in texts if text not in known])
    if cache is not None and new:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_feature_archive(cache, known | new, extra={"made_by": np.array(encoder.fingerprint)})
    encoded = known | new
    return {text: encoded[text] for text in texts}


def read_text_cache(cache: Path, fingerprint: str) -> dict[str, np.ndarray]:
    """Token features by text, none where another encoder, projection or length made them.

    Raises:
        ValueError: the file is not a text cache, and would be lost if it became one.
    """
    if not cache.exists():
        return {}
    made_by = read_arrays(cache).get("made_by")
    if made_by is None:
        raise ValueError(f"--text_cache {cache} is a file of another kind; delete it, or name another")
    if str(made_by) != fingerprint:
        logger.warning("%s was made by another encoder, projection or length, and is made again", cache)
        return {}
    store = FeatureStore(cache)
    return {text: store[text] for text in store}
