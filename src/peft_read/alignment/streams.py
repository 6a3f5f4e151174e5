"""Streams: where, in any model, the video states and the language states of each block are."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

__all__ = ["PRESETS", "Stream", "preset_streams", "unwrap_model"]

Batch = Mapping[str, Any]
Tokens = slice | Callable[[Batch, int], Any]


@dataclass(frozen=True)
class Stream:
    """One side of the alignment: which modules, which of their tokens, which of these are real.

    Args:
        modules: modules of the *unwrapped* base model (no `base_model.model.` prefix), one a block: a regular
            expression that matches the full name, or a sequence of names. A stream of one module is broadcast over
            the blocks of the other side.
        tokens: part of the module's sequence: None = all, a slice, or `f(batch, length)` that returns one.
        mask: which tokens are real: None = all, a key of the batch, or `f(batch)`; (B, L) after `tokens`, non-zero =
            real.
        invert_mask: for masks in which non-zero means padding.
        output: which part of the module's output: an index into a tuple, a key of a mapping, or `f(output)`; a tensor
            output is taken as it is.
        input: take the module's first input instead of its output.
        batch_first: False for modules that work on (L, B, d).

    Example:
        >>> Stream(r"encoder\\.layers\\.\\d+", mask="attention_mask").mask
        'attention_mask'
    """

    modules: str | Sequence[str]
    tokens: Tokens | None = None
    mask: str | Callable[[Batch], Tensor | None] | None = None
    invert_mask: bool = False
    output: int | str | Callable[[Any], Tensor] = 0
    input: bool = False
    batch_first: bool = True

    def module_names(self, model: nn.Module) -> list[str]:
        """Names of this stream's modules in `model` (unwrapped), in the order of the model.

        Raises:
            ValueError: nothing matches, or a listed name does not exist; the message lists near names.
        """
        names = [name for name, _ in model.named_modules() if name]
        if isinstance(self.modules, str):
            found = [name for name in names if re.fullmatch(self.modules, name)]
            if not found:
                raise ValueError(f"no module of {type(model).__name__} matches {self.modules!r}; {_hint(names)}")
            return found
        missing = [name for name in self.modules if name not in set(names)]
        if missing:
            raise ValueError(f"{type(model).__name__} has no modules {missing}; {_hint(names)}")
        return list(self.modules)

    def select_output(self, output: Any, name: str) -> Tensor:
        """The state tensor (B, L, d) in a module's output or input."""
        if callable(self.output):
            states = self.output(output)
        elif isinstance(output, Mapping) and not isinstance(output, Tensor):
            key = self.output if isinstance(self.output, str) else list(output)[self.output]
            states = output[key]
        elif isinstance(output, tuple | list):
            states = output[self.output]  # type: ignore[index]
        else:
            states = output
        if not isinstance(states, Tensor) or states.dim() != 3:
            shape = tuple(states.shape) if isinstance(states, Tensor) else type(states).__name__
            raise ValueError(f"module {name!r} gave {shape}; a stream needs states of shape (batch, tokens, width)")
        return states if self.batch_first else states.transpose(0, 1)

    def select_tokens(self, states: Tensor, batch: Batch, name: str) -> tuple[Tensor, Tensor | None]:
        """The tokens of this stream (B, L', d), and their boolean mask (B, L') or None."""
        if self.tokens is not None:
            index = self.tokens(batch, states.shape[1]) if callable(self.tokens) else self.tokens
            states = states[:, index]
        if self.mask is None:
            return states, None
        if callable(self.mask):
            mask = self.mask(batch)
        elif self.mask in batch:
            mask = batch[self.mask]
        else:
            raise ValueError(f"the batch has no mask {self.mask!r}; it has {sorted(batch)}")
        if mask is None:
            return states, None
        if mask.shape != states.shape[:2]:
            source = self.mask if isinstance(self.mask, str) else "the mask function"
            raise ValueError(
                f"module {name!r}: mask {source!r} has shape {tuple(mask.shape)}, the states that it should describe "
                f"have {tuple(states.shape)}; set Stream.tokens to the part of the sequence that the mask covers"
            )
        real = mask.to(states.device) != 0
        return states, ~real if self.invert_mask else real


def _hint(names: list[str]) -> str:
    shown = sorted({re.sub(r"\.\d+(?=\.|$)", ".0", name) for name in names})
    return f"some of its modules: {', '.join(shown[:40])}"


def unwrap_model(model: nn.Module) -> nn.Module:
    """The base model inside DDP, FSDP1, torch.compile and peft wrappers."""
    wrapped: Any = model
    while True:
        if hasattr(wrapped, "get_base_model"):  # peft
            wrapped = wrapped.get_base_model()
        elif isinstance(getattr(wrapped, "_orig_mod", None), nn.Module):  # torch.compile
            wrapped = wrapped._orig_mod
        elif type(wrapped).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel"):
            wrapped = wrapped.module
        else:
            return wrapped


def _frames(batch: Batch, length: int) -> slice:
    return slice(0, batch["video_features"].shape[1])


def _words_after_frames(batch: Batch, length: int) -> slice:
    return slice(batch["video_features"].shape[1], None)


def _moment_detr(config: Any) -> tuple[Stream, Stream]:
    layers = r"(.*\.)?transformer\.encoder\.layers\.\d+"
    return (
        Stream(layers, tokens=_frames, mask="video_mask"),
        Stream(layers, tokens=_words_after_frames, mask="text_mask"),
    )


def _umt(config: Any) -> tuple[Stream, Stream]:
    """Clip-shaped states against the projected text, which never changes; without a text, video against audio."""
    if config.text_feature_dim is not None:
        clips = Stream(r"video_enc|cross_enc|query_dec\.decoder\.\d+", mask=_clip_mask)
        return clips, Stream(["query_gen.mapping"], mask=_text_mask)
    if config.audio_feature_dim is None:
        raise ValueError("this UMT has neither a text nor an audio stream: there is nothing to align its video with")
    return Stream(["video_enc"], mask=_clip_mask), Stream(["audio_enc"], mask=_clip_mask)


def _clip_mask(batch: Batch) -> Tensor | None:
    """As UMT does: the mask, or the clips that have a label."""
    mask: Tensor | None = batch.get("video_mask")
    if mask is not None:
        return mask
    labels = batch.get("saliency_labels")
    return None if labels is None else labels >= 0


def _text_mask(batch: Batch) -> Tensor:
    mask: Tensor | None = batch.get("text_mask")
    if mask is not None:
        return mask
    features: Tensor = batch["text_features"]
    return features[..., 0].isfinite()


def _vision_guided(config: Any, layers: str, prefix: str) -> tuple[Stream, Stream]:
    """Frames after the projection to the text width, against the text states of every encoder block."""
    kind = getattr(config, "cross_attn_type", 0)
    text = Stream(layers, mask="attention_mask")
    if kind == 3:  # both sides are projected to the common width
        text = Stream(rf"{prefix}_linear_1", mask="attention_mask")
        return Stream(rf"{prefix}_linear_2", mask="video_mask"), text
    if kind in (4, 5):
        text = Stream(rf"{prefix}_linear_3", mask="attention_mask")
    return Stream(rf"{prefix}_linear_1", mask="video_mask"), text


PRESETS: dict[str, Callable[[Any], tuple[Stream, Stream]]] = {
    "moment_detr": _moment_detr,
    "umt": _umt,
    "vg_bart": lambda config: _vision_guided(config, r"model\.encoder\.layers\.\d+", r"model\.encoder\."),
    "vg_t5": lambda config: _vision_guided(config, r"encoder\.block\.\d+", r"encoder\."),
}


def preset_streams(model: nn.Module) -> tuple[Stream, Stream]:
    """The (video, language) streams of the project's backbones, by `model.config.model_type`.

    Raises:
        ValueError: another model; the message says how to name its streams.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type not in PRESETS:
        raise ValueError(
            f"no preset streams for model_type={model_type!r} (there are presets for {sorted(PRESETS)}): say where "
            "the states are with PVLAConfig(video=Stream(...), language=Stream(...)) or PVLAConfig(extractor=...)"
        )
    return PRESETS[model_type](config)
