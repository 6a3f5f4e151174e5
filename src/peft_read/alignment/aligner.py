"""PVLAConfig and the Aligner: the alignment loss of a model, for any training loop."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..plain import plain_integers, plain_number
from .loss import (
    AlignmentDistance,
    alignment_distance,
    checked_distance,
    checked_mass,
    checked_method,
    checked_reg,
)
from .packing import packed_message, packed_rows
from .presets import preset_streams
from .recorder import AlignedBlock, Recording, StreamPair
from .streams import Stream, rows_of, unwrap_model

__all__ = ["Aligner", "PVLAConfig"]

Schedule = float | Callable[[float], float]


@dataclass
class PVLAConfig:
    """What to align with what, and how much it counts (section 3.3 of the paper).

    Args:
        video, language: streams; None = the preset of the model, see `preset_streams`.
        weight: of the alignment loss beside the task loss: a number, or `f(progress)` with progress in [0, 1].
        mass: fraction of the mass to transport, in (0, 1]: a number, or `f(progress)`. 1 is the paper's VLA ablation.
        reg: entropic regularisation (the paper's temperature).
        distance: "partial_ot", or a pooled distance of Table 9.
        blocks: "all", or indices of the blocks to align.
        extractor: `f(batch, outputs)` that returns the blocks itself, as (video, language, video_mask, language_mask)
            tuples; replaces the streams.
        method: the transport solver.

    Numbers of numpy and torch are converted to Python's; the results of schedule functions are checked at each
    step.

    Raises:
        ValueError: a value out of range or of another kind, NaN and infinity included.
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
        self.distance, self.method = checked_distance(self.distance), checked_method(self.method)
        self.reg = checked_reg(self.reg)
        if not callable(self.mass):
            self.mass = checked_mass(self.mass)
        if not callable(self.weight):
            self.weight = _checked_weight(self.weight)
        for name in ("video", "language"):
            stream = getattr(self, name)
            if stream is not None and not isinstance(stream, Stream):
                raise ValueError(f"{name}={stream!r} is not a Stream")
        if (self.video is None) != (self.language is None):
            raise ValueError("name both streams, video and language, or neither (then the model's preset is used)")
        if self.extractor is not None and not callable(self.extractor):
            raise ValueError(f"extractor={self.extractor!r} is not a function of batch and outputs")
        if self.extractor is not None and self.video is not None:
            raise ValueError("an extractor replaces the streams: give one or the other")
        if isinstance(self.blocks, str):
            if self.blocks != "all":
                raise ValueError(f"blocks={self.blocks!r} is neither 'all' nor a sequence of block indices")
            return
        self.blocks = plain_integers("blocks", self.blocks)
        if not self.blocks or len(set(self.blocks)) != len(self.blocks):
            raise ValueError(f"blocks={self.blocks} must name at least one block, and each block once")
        if self.extractor is not None:
            raise ValueError("blocks picks from streams; an extractor returns the blocks to align itself")

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
        """The weight at a point of training, 0 = start, 1 = end.

        Raises:
            ValueError: the schedule gave a weight that is negative or not finite.
        """
        return _scheduled(_checked_weight, self.weight, progress)

    def mass_at(self, progress: float) -> float:
        """The mass fraction at a point of training, 0 = start, 1 = end.

        Raises:
            ValueError: the schedule gave a mass outside (0, 1].
        """
        return _scheduled(checked_mass, self.mass, progress)


def _checked_weight(weight: Any) -> float:
    number = plain_number("weight", weight)
    if number < 0:
        raise ValueError(f"weight={number} must not be negative; pvla_config=None switches the loss off")
    return number


def _scheduled(check: Callable[[Any], float], value: Schedule, progress: float) -> float:
    if not callable(value):
        return check(value)
    try:
        return check(value(progress))
    except ValueError as error:
        raise ValueError(f"the schedule at progress {progress:g}: {error}") from error


class Aligner:
    """The alignment loss of one model: records a forward pass, then measures it.

    Works with any training loop; `PVLALossMixin` is this inside a `Trainer`. The passes of a copy of
    the model are not recorded until `attach` moves the Aligner to it. The hooks are removed with the Aligner.

    A block that runs several times in a pass (shared layers) counts once for each run. Blocks that do not run in a
    pass (LayerDrop, early exit) are left out of its mean.

    Args:
        model: the model, wrapped (peft, DDP, compile) or not.
        config: what to align.

    Raises:
        ValueError: streams that do not fit the model, or something else than a module and a PVLAConfig.

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
        if not isinstance(config, PVLAConfig):
            raise ValueError(f"the settings of the alignment must be a PVLAConfig, got {type(config).__name__}")
        self.config = config
        self.pair: StreamPair | None = None
        self._model: weakref.ref[nn.Module] | None = None
        self._has_aligned = False
        self._packed: tuple[str, Tensor] | None = None  # noted on a device, and by which entry of the batch
        self.attach(model)

    def attach(self, model: nn.Module) -> bool:
        """Moves the hooks to `model`, where they are not there already.

        Args:
            model: wrapped or not.

        Returns:
            Whether it is another model than before.

        Raises:
            ValueError: streams that do not fit the model.
        """
        if not isinstance(model, nn.Module):
            raise ValueError(f"an Aligner needs a torch.nn.Module, got {type(model).__name__}")
        base = unwrap_model(model)
        if self._model is not None and self._model() is base:
            return False
        pair = None
        if self.config.extractor is None:
            if self.config.video is not None and self.config.language is not None:
                video, language = self.config.video, self.config.language
            else:
                video, language = preset_streams(base)
            pair = StreamPair(base, video, language, self.config.blocks)
        self.remove()
        self.pair, self._model, self.model_name = pair, weakref.ref(base), type(base).__name__
        # transformers cuts causal attention where positions restart; in encoders they number the tokens of one sample.
        self._positions_pack = any(getattr(module, "is_causal", False) is True for module in base.modules())
        return True

    @contextmanager
    def record(self) -> Iterator[Recording]:
        """Records the one forward pass inside."""
        if self.pair is None:
            yield Recording(owner=None, with_grad=torch.is_grad_enabled())
        else:
            with self.pair.record() as recording:
                yield recording

    def blocks(self, recording: Recording, batch: Mapping[str, Any], outputs: Any = None) -> list[AlignedBlock]:
        """The states to align, one entry per run of a block; none where LayerDrop left none.

        Raises:
            RuntimeError: no module of the streams has run in this pass or in one before.
            ValueError: the extractor returned no blocks, or something else; or rows hold several packed samples. On a
                device, values are read with the first batch that is aligned, and then by `refuse_packed` only.
        """
        if self.pair is not None:
            self._look_for_packed(batch)
            return self.pair.blocks(recording, batch)
        assert self.config.extractor is not None
        try:
            blocks = [AlignedBlock(*block) for block in self.config.extractor(batch, outputs)]  # type: ignore[arg-type]
        except TypeError as error:
            raise ValueError(
                f"the extractor must return (video, language, video_mask, language_mask) for each block: {error}"
            ) from error
        if not blocks:
            raise ValueError("the extractor returned no blocks")
        return blocks

    def _look_for_packed(self, batch: Mapping[str, Any]) -> None:
        told = packed_rows(batch)
        if told is None or (told[0] == "position_ids" and not self._positions_pack):
            return
        name, packed = told
        if isinstance(packed, Tensor) and self._has_aligned and _is_on_a_device(packed):
            before = None if self._packed is None else self._packed[1]
            self._packed = name, packed if before is None else packed | before.to(packed.device)
        elif packed:
            raise ValueError(packed_message(name))

    def refuse_packed(self) -> None:
        """Reports packed rows of batches on a device since the last call, and waits for the device; `PVLALossMixin`
        does so at each log.

        Raises:
            ValueError: rows of a batch held several samples.
        """
        noted, self._packed = self._packed, None
        if noted is not None and noted[1]:
            raise ValueError(packed_message(noted[0]))

    def distance(
        self, recording: Recording, batch: Mapping[str, Any], outputs: Any = None, *, progress: float = 0.0
    ) -> AlignmentDistance:
        """The distance of every block and example, each (blocks, B), not weighted.

        Raises:
            RuntimeError: gradients are on and no aligned state has one, so the loss could train nothing.
            ValueError: rows of the batch hold several packed samples.
        """
        blocks = self.blocks(recording, batch, outputs)
        if not blocks:
            return _nothing_aligned(batch)
        if recording.with_grad and not any(b.video.requires_grad or b.language.requires_grad for b in blocks):
            raise RuntimeError(
                f"no aligned state of {self.model_name} has a gradient: no trainable parameter lies before the named "
                "modules. Align blocks at or after an adapter, or set pvla_config=None"
            )
        result = alignment_distance(
            [block.video for block in blocks],
            [block.language for block in blocks],
            [block.video_mask for block in blocks],
            [block.language_mask for block in blocks],
            distance=self.config.distance,
            mass=self.config.mass_at(progress),
            reg=self.config.reg,
            method=self.config.method,
        )
        if not self._has_aligned:
            self._has_aligned = bool(result.mass.any())
            if not self._has_aligned:
                warnings.warn(
                    "no example of the batch has both video tokens and words outside the padding, so there is "
                    "nothing to align; if it should, look at the streams' masks (0 = padding; else invert_mask)",
                    stacklevel=2,
                )
        return result

    def loss(
        self, recording: Recording, batch: Mapping[str, Any], outputs: Any = None, *, progress: float = 0.0
    ) -> Tensor:
        """The weighted alignment loss, a scalar: weight x mean over blocks and examples."""
        result = self.distance(recording, batch, outputs, progress=progress)
        return self.config.weight_at(progress) * result.mean()

    def describe(self, model: nn.Module, batch: Mapping[str, Any]) -> str:
        """A table of what would be aligned with what, from one forward pass of `model` on `batch`."""
        with torch.no_grad(), self.record() as recording:
            outputs = model(**batch)
        blocks = self.blocks(recording, batch, outputs)
        lines = [f"{self.model_name}: {len(blocks)} blocks"]
        for index, block in enumerate(blocks):
            video_name, language_name = block.names
            lines.append(
                f"  block {index}: video {video_name} {_shape(block.video, block.video_mask)}"
                f"  <->  language {language_name} {_shape(block.language, block.language_mask)}"
            )
        return "\n".join(lines)

    def remove(self) -> None:
        """Removes the hooks from the model."""
        if self.pair is not None:
            self.pair.remove()


def _is_on_a_device(tensor: Tensor) -> bool:
    """Whether looking at a value waits."""
    return tensor.device.type != "cpu"


def _nothing_aligned(batch: Mapping[str, Any]) -> AlignmentDistance:
    tensor = rows_of(batch)[1]
    empty = torch.zeros(0, len(tensor), device=tensor.device)
    return AlignmentDistance(empty, empty)


def _shape(states: Tensor, mask: Tensor | None) -> str:
    shown = "all tokens" if mask is None else f"{int((mask != 0).sum())} of {mask.numel()} tokens"
    return f"{tuple(states.shape)} ({shown})"
