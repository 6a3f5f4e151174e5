"""The grounding datasets as the examples use them: features, text, splits, models and predictions in seconds."""

from __future__ import annotations

import json
import os
from collections import ChainMap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModel

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
from peft_read.models import (
    MomentDetrConfig,
    MomentDetrForTemporalGrounding,
    UMTConfig,
    UMTForTemporalGrounding,
)
from peft_read.models.moment_detr import highlight_scores, ranked_windows
from peft_read.spans import temporal_nms

DATASETS = ("qvhighlights", "tvsum", "youtube_highlights")
MAX_WINDOWS = 10


@dataclass
class DataArguments:
    """The dataset, its features, and a backbone that is not pretrained."""

    dataset: str = field(default="qvhighlights", metadata={"help": f"one of {', '.join(DATASETS)}"})
    train_file: str | None = field(default=None, metadata={"help": "annotations; of TVSum the only ones needed"})
    validation_file: str | None = field(default=None, metadata={"help": "not with --num_train_samples"})
    test_file: str | None = field(default=None, metadata={"help": "may lack labels (QVHighlights' official test)"})
    features: list[str] = field(
        default_factory=list,
        metadata={"help": "one place a kind of clip features; comma-separated places of one kind are joined"},
    )
    audio_features: list[str] = field(default_factory=list, metadata={"help": "UMT's second stream"})
    text_encoder: str | None = field(default=None, metadata={"help": "folder or Hub name of a sentence encoder"})
    projection: str | None = field(default=None, metadata={"help": ".npz with mean and components, for its tokens"})
    text_cache: str | None = field(default=None, metadata={"help": ".npz that keeps the encoder's work between runs"})
    text_features: str | None = field(default=None, metadata={"help": "instead of the encoder: folder of qid<id>.npz"})
    similarity: bool = field(default=True, metadata={"help": "the query-similarity channel; --no_similarity"})
    endpoints: bool = field(default=True, metadata={"help": "the temporal endpoints; --no_endpoints"})
    max_clips: int | None = field(default=None, metadata={"help": "default: 75 of QVHighlights, all of the others"})
    max_tokens: int = 32
    num_train_samples: int | None = field(
        default=None, metadata={"help": "draws training and validation from one file"}
    )
    num_validation_samples: int = 150
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


class GroundingData:
    """Rows, features and collator of one dataset; everything that is wrong with them is said when it is built.

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
        default_clips = 75 if arguments.dataset == "qvhighlights" else None
        options = {"endpoints": arguments.endpoints, "max_clips": arguments.max_clips or default_clips}
        self.clips = ClipFeatures(self.kinds, similarity=similar, **options)
        self.audio = None
        if arguments.audio_features:
            self.audio = ClipFeatures([self._store(p) for p in arguments.audio_features], **options)
        self.video_width = self.clips.check(rows)
        self.audio_width = None if self.audio is None else self.audio.check(rows)
        self.text_width = None if self.text is None else self.text.check(rows)
        if similar is not None and (space := self.kinds[0][rows[0]["vid"]].shape[1]) != self.text_width:
            raise ValueError(
                f"the query similarity needs one space: the first --features are {space} wide, the text "
                f"{self.text_width}; --no_similarity leaves the channel out, --projection brings the text into a space"
            )

    def _store(self, places: str) -> Any:
        joined = open_store(places)
        if self.arguments.dataset == "tvsum" and not any(Path(place).is_dir() for place in places.split(",")):
            # The archive of caption features has a row every 15 frames; folders hold a row a clip.
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
        return MomentDetrCollator(
            self.clips,
            self.text,
            pairs=pairs,
            span_loss_type=config.span_loss_type,
            generator=np.random.default_rng(seed),
        )

    def build_model(self) -> nn.Module:
        """A backbone with random weights, of the widths that the features have."""
        arguments = self.arguments
        options = json.loads(arguments.model_options)
        if arguments.backbone == "moment_detr":
            config = MomentDetrConfig(
                **{
                    "video_feature_dim": self.video_width,
                    "text_feature_dim": self.text_width,
                    "d_model": arguments.d_model,
                    "ffn_dim": arguments.ffn_dim,
                    "max_text_positions": arguments.max_tokens,
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
        model = AutoModel.from_pretrained(name_or_path)
        config = model.config
        widths = {"video": self.video_width, "text": self.text_width}
        if config.model_type == "umt":
            widths["audio"] = self.audio_width
        for kind, width in widths.items():
            expected = getattr(config, f"{kind}_feature_dim", None)
            if expected != width:
                raise ValueError(f"the {kind} features are {width} wide, {name_or_path} expects {expected}")
        self._check_unseen(Path(name_or_path) / "pretraining.json")
        return model

    def _check_unseen(self, record: Path) -> None:
        if not record.is_file():
            return
        seen = {vid.rsplit("_", 2)[0] for vid in json.loads(record.read_text(encoding="utf-8"))["videos"]}
        for fold in self.folds:
            for role, part in (("validation", fold.validation), ("test", fold.test)):
                known = sorted({vid for vid in (part["vid"] if part else ()) if vid.rsplit("_", 2)[0] in seen})
                if known:
                    raise ValueError(
                        f"the backbone was pretrained on sources of {len(known)} {role} videos ({', '.join(known[:3])}"
                        " ...); pretrain it with the same --train_file, --num_train_samples and --subset_seed"
                    )


def open_store(places: str) -> Any:
    """The features at one place, or at several, separated by commas, of which each holds some of the videos."""
    stores = [FeatureStore(place) for place in places.split(",")]
    return stores[0] if len(stores) == 1 else ChainMap(*stores)


def check_data_arguments(arguments: DataArguments) -> None:
    if arguments.dataset not in DATASETS:
        raise ValueError(f"--dataset {arguments.dataset!r} is not one of {', '.join(DATASETS)}")
    if arguments.backbone not in ("moment_detr", "umt"):
        raise ValueError(f"--backbone {arguments.backbone!r} is neither 'moment_detr' nor 'umt'")
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


def read_folds(arguments: DataArguments) -> list[Fold]:
    train_file = arguments.train_file
    if arguments.dataset == "tvsum":
        folds = leave_one_video_out(load_tvsum(train_file, domain=arguments.domain))
        named = [Fold(test["vid"][0], train, None, test) for train, test in folds]
        if arguments.test_video is not None:
            named = [fold for fold in named if fold.name == arguments.test_video]
            if not named:
                raise ValueError(f"--test_video {arguments.test_video!r} is no video of {arguments.domain}")
        return named
    if arguments.dataset == "youtube_highlights":
        parts = [
            None if file is None else load_youtube_highlights(file, domain=arguments.domain)
            for file in (train_file, arguments.validation_file, arguments.test_file)
        ]
        return [Fold(arguments.domain, *parts)]
    train = load_qvhighlights(train_file)
    validation = None
    if arguments.num_train_samples is not None:
        train, validation = low_resource_split(
            train,
            num_train=arguments.num_train_samples,
            num_validation=arguments.num_validation_samples,
            seed=arguments.subset_seed,
        )
    elif arguments.validation_file is not None:
        validation = load_qvhighlights(arguments.validation_file)
    test = None
    if arguments.test_file is not None:
        test = load_qvhighlights(arguments.test_file, require_labels=False)
        if arguments.num_test_samples is not None:
            test = test.select(range(min(arguments.num_test_samples, len(test))))
    return [Fold("qvhighlights", train, validation, test)]


def encode(texts: list[str], arguments: DataArguments) -> Any:
    """Token features by text, from the cache where it holds all of them."""
    cache = Path(arguments.text_cache) if arguments.text_cache else None
    if cache is not None and cache.is_file():
        store = FeatureStore(cache)
        if all(text in store for text in texts):
            return store
    encoder = SentenceEncoder(arguments.text_encoder, projection=arguments.projection, max_tokens=arguments.max_tokens)
    tokens = encoder.tokens(texts)
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        known = {text: FeatureStore(cache)[text] for text in FeatureStore(cache)} if cache.is_file() else {}
        # Several runs may start together: the file appears whole or not at all.
        part = write_feature_archive(cache.with_name(f"{cache.stem}.{os.getpid()}.part.npz"), known | tokens)
        part.replace(cache)
    return tokens


def submission(
    outputs: Sequence[np.ndarray],
    rows: Sequence[dict],
    lengths: Sequence[int],
    config: Any,
    nms_threshold: float | None = None,
) -> list[dict[str, Any]]:
    """Records of the official submission format.

    Args:
        outputs: of Moment-DETR `pred_logits`, `pred_spans`, `saliency_scores`; of UMT `saliency_scores`, and
            `boundaries` where it predicts any.
        rows: of the dataset, in the same order.
        lengths: clips of each video.
        config: of the model.
        nms_threshold: of the suppression of overlapping windows; None = none.
    """
    durations = [row["duration"] for row in rows]
    windows: list[list[list[float]]] | None = None
    if config.model_type == "moment_detr":
        logits, spans, saliency = map(torch.as_tensor, outputs)
        windows = ranked_windows(
            logits, spans, durations, config=config, longest_seconds=max(durations), nms_threshold=nms_threshold
        )
    else:
        found = outputs if isinstance(outputs, tuple | list) else (outputs,)
        saliency = torch.as_tensor(found[0])
        if len(found) > 1:
            windows = [
                _umt_windows(rows_, seconds, nms_threshold) for rows_, seconds in zip(found[1], durations, strict=True)
            ]
    clips = torch.arange(saliency.shape[1]) < torch.tensor(lengths)[:, None]
    scores = highlight_scores(saliency, clips)
    records = []
    for index, row in enumerate(rows):
        record = {"qid": row.get("qid", row["vid"]), "query": row["query"], "vid": row["vid"]}
        if windows is not None:
            record["pred_relevant_windows"] = windows[index]
        records.append({**record, "pred_saliency_scores": scores[index]})
    return records


def _umt_windows(boundaries: np.ndarray, seconds: float, nms_threshold: float | None) -> list[list[float]]:
    """UMT's windows that lie on real clips, cut to the video, to 4 decimals."""
    real = boundaries[boundaries[:, 2] > 0]
    rounded = [
        [round(min(float(start), seconds), 4), round(min(float(end), seconds), 4), round(float(score), 4)]
        for start, end, score in real
    ]
    return rounded[:MAX_WINDOWS] if nms_threshold is None else temporal_nms(rounded, nms_threshold)
