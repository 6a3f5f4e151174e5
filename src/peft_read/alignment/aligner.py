"""PVLAConfig and the Aligner: the alignment loss of a model, for any training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .loss import DISTANCES, AlignmentDistance, alignment_distance
from .recorder import AlignedBlock, Recording, StreamPair
from .streams import Stream, preset_streams, unwrap_model

__all__ = ["Aligner", "PVLAConfig"]

Schedule = float | Callable[[float], float]


@dataclass
class PVLAConfig:
    """What to align with what, and how much it counts (section 3.3 of the paper).

    Args:
        video, language: streams; None = the preset of `model.config.model_type`.
        weight: of the alignment loss beside the task loss: a number, or `f(progress)` with progress in [0, 1].
        mass: fraction of the mass to transport, in (0, 1]: a number, or `f(progress)`. 1 is the paper's VLA ablation.
        reg: entropic regularisation (the paper's temperature).
        distance: "partial_ot", or a pooled distance of Table 9.
        blocks: "all", or indices of the blocks to align.
        extractor: `f(batch, outputs)` that returns the blocks itself, as (video, language, video_mask, language_mask)
            tuples; replaces the streams.
        method: the transport solver.

    Raises:
        ValueError: a value out of range.
    """

    video: Stream | None = None
    language: Stream | None = None
    weight: Schedule = 0.01
    mass: Schedule = 0.5
    reg: float = 0.05
    distance: str = "partial_ot"
    blocks: str | Sequence[int] = "all"
    extractor: Callable[[Mapping[str, Any], Any], Iterable[Sequence[Tensor | None]]] | None = None
    method: str = "auto"

    def __post_init__(self) -> None:
        if self.distance not in DISTANCES:
            raise ValueError(f"distance={self.distance!r} is not one of {DISTANCES}")
        if not callable(self.mass) and not 0 < self.mass <= 1:
            raise ValueError(f"mass={self.mass} is outside (0, 1]: it is the fraction of the mass to transport")
        if not callable(self.weight) and not self.weight >= 0:
            raise ValueError(f"weight={self.weight} must not be negative; pvla_config=None switches the loss off")
        if not self.reg > 0:
            raise ValueError(f"reg={self.reg} must be positive; the paper uses 0.05")
        if (self.video is None) != (self.language is None):
            raise ValueError("name both streams, video and language, or neither (then the model's preset is used)")
        if isinstance(self.blocks, str) and self.blocks != "all":
            raise ValueError(f"blocks={self.blocks!r} is neither 'all' nor a sequence of block indices")

    def record(self) -> dict[str, Any]:
        """The numbers that a model card should name, as plain JSON values."""
        return {
            "weight": "scheduled" if callable(self.weight) else self.weight,
            "mass": "scheduled" if callable(self.mass) else self.mass,
            "reg": self.reg,
            "distance": self.distance,
            "blocks": self.blocks if isinstance(self.blocks, str) else list(self.blocks),
        }

    def weight_at(self, progress: float) -> float:
        """The weight at a point of training, 0 = start, 1 = end."""
        return float(self.weight(progress) if callable(self.weight) else self.weight)

    def mass_at(self, progress: float) -> float:
        """The mass fraction at a point of training, 0 = start, 1 = end."""
        return float(self.mass(progress) if callable(self.mass) else self.mass)


class Aligner:
    """The alignment loss of one model: records a forward pass, then measures it.

    Works with any training loop; `PVLALossMixin` is this inside a `Trainer`.

    Args:
        model: the model, wrapped (peft, DDP, compile) or not.
        config: what to align.

    Example:
        ```python
        aligner = Aligner(model, PVLAConfig(weight=0.01))
        for batch in loader:
            with aligner.record() as recording:
                outputs = model(**batch)
            loss = outputs.loss + aligner.loss(recording, batch, outputs)
        ```
    """

    def __init__(self, model: nn.Module, config: PVLAConfig) -> None:
        base = unwrap_model(model)
        self.config = config
        self.model_name = type(base).__name__
        self.pair: StreamPair | None = None
        if config.extractor is None:
            if config.video is not None and config.language is not None:
                video, language = config.video, config.language
            else:
                video, language = preset_streams(base)
            self.pair = StreamPair(base, video, language, config.blocks)

    @contextmanager
    def record(self) -> Iterator[Recording]:
        """Records the one forward pass inside."""
        if self.pair is None:
            yield Recording(owner=id(self), with_grad=torch.is_grad_enabled())
        else:
            with self.pair.record() as recording:
                yield recording

    def blocks(self, recording: Recording, batch: Mapping[str, Any], outputs: Any = None) -> list[AlignedBlock]:
        """The states to align, one entry a block."""
        if self.pair is not None:
            return self.pair.blocks(recording, batch)
        assert self.config.extractor is not None
        blocks = [AlignedBlock(*block) for block in self.config.extractor(batch, outputs)]  # type: ignore[arg-type]
        if not blocks:
            raise ValueError("the extractor returned no blocks")
        return blocks

    def distance(
        self, recording: Recording, batch: Mapping[str, Any], outputs: Any = None, *, progress: float = 0.0
    ) -> AlignmentDistance:
        """The distance of every block and example, each (blocks, B), not weighted.

        Raises:
            RuntimeError: gradients are on and no aligned state has one, so the loss could train nothing.
        """
        blocks = self.blocks(recording, batch, outputs)
        if recording.with_grad and not any(b.video.requires_grad or b.language.requires_grad for b in blocks):
            raise RuntimeError(
                f"no aligned state of {self.model_name} has a gradient: no trainable parameter lies before the named "
                "modules. Align blocks at or after an adapter, or set pvla_config=None"
            )
        return alignment_distance(
            [block.video for block in blocks],
            [block.language for block in blocks],
            [block.video_mask for block in blocks],
            [block.language_mask for block in blocks],
            distance=self.config.distance,
            mass=self.config.mass_at(progress),
            reg=self.config.reg,
            method=self.config.method,
        )

    def loss(
        self, recording: Recording, batch: Mapping[str, Any], outputs: Any = None, *, progress: float = 0.0
    ) -> Tensor:
        """The weighted alignment loss, a scalar: weight x mean over blocks and examples."""
        distance = self.distance(recording, batch, outputs, progress=progress).distance
        return self.config.weight_at(progress) * distance.mean()

    def describe(self, model: nn.Module, batch: Mapping[str, Any]) -> str:
        """A table of what would be aligned with what, from one forward pass of `model` on `batch`."""
        with torch.no_grad(), self.record() as recording:
            outputs = model(**batch)
        blocks = self.blocks(recording, batch, outputs)
        names = self.pair.names if self.pair is not None else [("extractor", "extractor")] * len(blocks)
        lines = [f"{self.model_name}: {len(blocks)} blocks"]
        for index, (block, (video_name, language_name)) in enumerate(zip(blocks, names, strict=True)):
            lines.append(
                f"  block {index}: video {video_name} {_shape(block.video, block.video_mask)}"
                f"  <->  language {language_name} {_shape(block.language, block.language_mask)}"
            )
        return "\n".join(lines)

    def remove(self) -> None:
        """Takes the hooks away from the model."""
        if self.pair is not None:
            self.pair.remove()


def _shape(states: Tensor, mask: Tensor | None) -> str:
    real = "all real" if mask is None else f"{int(mask.sum())} of {mask.numel()} real"
    return f"{tuple(states.shape)} ({real})"
