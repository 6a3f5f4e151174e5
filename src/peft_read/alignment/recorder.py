"""The recorder: hooks that record the states of one forward pass for the alignment loss."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .streams import KnownMasks, Stream

__all__ = ["AlignedBlock", "Recording", "StreamPair", "drops_blocks"]


@dataclass
class AlignedBlock:
    """The states of one block: (B, N, d) video, (B, M, d) language, and their boolean masks or None."""

    video: Tensor
    language: Tensor
    video_mask: Tensor | None = None
    language_mask: Tensor | None = None
    names: tuple[str, str] = ("extractor", "extractor")  # the modules that they come from


class _Owner:
    """A unique object that ties a recording to its hooks.

    Hooks of a copied or unpickled model refer to a copy of it, which belongs to no recording: they record nothing.
    """


@dataclass
class Recording:
    """What the hooks saw in one forward pass: (side, module name) to the states (B, L, d) of each run."""

    owner: _Owner | None
    with_grad: bool
    training: bool = False
    streams: Mapping[str, Stream] = field(default_factory=dict)
    states: dict[tuple[str, str], list[Tensor]] = field(default_factory=dict)
    passes: int = 0
    depth: int = 0

    def keep(self, side: str, name: str, output: Any) -> None:
        """Adds the states of one run of a module."""
        states = self.streams[side].select_output(output, name)
        if self.with_grad and not torch.is_grad_enabled():
            raise RuntimeError(
                f"the states of {name!r} were captured where gradients are switched off (inside a reentrant gradient "
                "checkpoint, or under no_grad), so the alignment loss would silently have no gradient. Use "
                "gradient_checkpointing_kwargs={'use_reentrant': False}, or name whole blocks instead of their parts"
            )
        runs = self.states.setdefault((side, name), [])
        # Within one pass of the model a shared block runs several times; beyond it the states are of another pass.
        if runs and not (self.depth and self.passes == 1):
            raise RuntimeError(
                f"module {name!r} ran twice in one recording, and not within one forward pass of the model, so its "
                "states are ambiguous; record one forward pass at a time"
            )
        runs.append(states)


# A ContextVar keeps threads apart; the hooks do nothing unless their own recording is open, so that generate(),
# evaluation and the recomputation of checkpointed blocks in backward record nothing.
_RECORDING: ContextVar[Recording | None] = ContextVar("peft_read_alignment_recording", default=None)


class StreamPair:
    """The video and the language stream of one model, with hooks on their modules for as long as the pair exists.

    Args:
        model: unwrapped base model.
        video, language: the streams.
        blocks: "all", or the indices of the blocks to align (negative ones count from the end).

    Raises:
        ValueError: block counts that do not match, or a block that does not exist or is named twice.
    """

    def __init__(self, model: nn.Module, video: Stream, language: Stream, blocks: str | Sequence[int] = "all") -> None:
        self.streams = {"video": video, "language": language}
        pairs = _pair_names(video.module_names(model), language.module_names(model))
        self.names = pairs if isinstance(blocks, str) else [_pick(pairs, index) for index in blocks]
        if not isinstance(blocks, str) and len({index % len(pairs) for index in blocks}) != len(blocks):
            raise ValueError(f"blocks={list(blocks)} names a block twice: there are {len(pairs)}")
        self.owner = _Owner()
        self._drops_blocks = drops_blocks(model)
        self._model = weakref.ref(model)
        self._have_run: set[tuple[str, str]] = set()
        self._said: set[str] = set()
        self.handles = [
            model.register_forward_pre_hook(_PassBegins(self.owner)),
            model.register_forward_hook(_PassEnds(self.owner), always_call=True),
        ]
        modules = dict(model.named_modules())
        for side, stream in self.streams.items():
            for name in sorted({pair[side == "language"] for pair in self.names}):
                self.handles.append(_install(modules[name], self.owner, side, name, stream.input))
        # Bound to the handles alone: whoever drops the pair drops its hooks.
        self._finalizer = weakref.finalize(self, _remove, self.handles)

    @contextmanager
    def record(self) -> Iterator[Recording]:
        """Records the forward pass inside; opening a second recording inside hides the first."""
        model = self._model()
        recording = Recording(
            owner=self.owner,
            with_grad=torch.is_grad_enabled(),
            training=model is not None and model.training,
            streams=self.streams,
        )
        token = _RECORDING.set(recording)
        try:
            yield recording
        finally:
            _RECORDING.reset(token)

    def blocks(self, recording: Recording, batch: Mapping[str, Any]) -> list[AlignedBlock]:
        """The recorded states as blocks, one per run, tokens selected and masks attached.

        A pair of modules of which one did not run is left out (LayerDrop, early exit).

        Raises:
            RuntimeError: no pair ran, and not because of LayerDrop; or the two modules of a pair ran unequally often.
        """
        blocks, absent = [], []
        masks: dict[str, KnownMasks] = {side: {} for side in self.streams}
        for names in self.names:
            keys = list(zip(self.streams, names, strict=True))
            runs = [recording.states.get(key, []) for key in keys]
            if not all(runs):
                absent += [key for key, has_run in zip(keys, runs, strict=True) if not has_run]
                continue
            for video, language in _pair_runs(names, *runs):
                sides = [
                    stream.select_tokens(states, batch, name, masks[side])
                    for (side, stream), states, name in zip(
                        self.streams.items(), (video, language), names, strict=True
                    )
                ]
                blocks.append(AlignedBlock(sides[0][0], sides[1][0], sides[0][1], sides[1][1], names))
        if absent:
            self._judge_absent(absent, recording, any_ran=bool(blocks))
        self._have_run |= set(recording.states)
        return blocks

    def _judge_absent(self, absent: list[tuple[str, str]], recording: Recording, *, any_ran: bool) -> None:
        dropped = recording.training and self._drops_blocks
        # A module that has run before is one of this model's blocks, which this pass did without.
        unknown = [key for key in absent if key not in self._have_run]
        if not unknown or dropped:
            return
        side, name = unknown[0]
        if not any_ran:
            raise RuntimeError(
                f"the {side} stream's module {name!r} did not run in the recorded forward pass; recorded: "
                f"{sorted({name for _, name in recording.states}) or 'nothing'}. The Aligner knows one model object: "
                "after a copy or a replacement call attach(model)"
            )
        if name not in self._said:
            self._said.add(name)
            warnings.warn(
                f"the {side} stream's module {name!r} did not run, its block is left out of the alignment; name it "
                "only if it is a block that runs at times (early exit)",
                stacklevel=2,
            )

    def remove(self) -> None:
        """Removes the hooks."""
        self._finalizer()


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


def drops_blocks(model: nn.Module) -> bool:
    """Whether blocks are skipped at random in training, as the models of transformers with LayerDrop say it."""
    config = getattr(model, "config", None)
    names = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
    holders = [*model.modules(), *([] if config is None else [config])]
    rates = [getattr(holder, name, None) for holder in holders for name in names]
    return any(isinstance(value, int | float) and value > 0 for value in rates)


def _pair_runs(names: tuple[str, str], video: list[Tensor], language: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The runs of two modules, the single run of one with each run of the other."""
    if len(video) != len(language) and 1 not in (len(video), len(language)):
        raise RuntimeError(
            f"{names[0]!r} ran {len(video)} times and {names[1]!r} {len(language)} times in one forward pass, so that "
            "their runs cannot be paired; PVLAConfig(extractor=...) can say which belong together"
        )
    count = max(len(video), len(language))
    return list(zip(*(runs * count if len(runs) == 1 else runs for runs in (video, language)), strict=True))


def _pair_names(video: list[str], language: list[str]) -> list[tuple[str, str]]:
    if len(video) == 1:
        video = video * len(language)
    if len(language) == 1:
        language = language * len(video)
    if len(video) != len(language):
        raise ValueError(
            f"{len(video)} video modules {video} and {len(language)} language modules {language} cannot be paired: "
            "name the same number of each, or a single one"
        )
    return list(zip(video, language, strict=True))


def _pick(pairs: list[tuple[str, str]], index: int) -> tuple[str, str]:
    if not -len(pairs) <= index < len(pairs):
        raise ValueError(f"blocks={index} does not exist: the streams have {len(pairs)} blocks, {pairs}")
    return pairs[index]


def _install(module: nn.Module, owner: _Owner, side: str, name: str, take_input: bool) -> Any:
    if take_input:
        return module.register_forward_pre_hook(_InputHook(owner, side, name), with_kwargs=True)
    return module.register_forward_hook(_OutputHook(owner, side, name))


class _Hook:
    """Refers to its owner and not to the streams: a model can be pickled even if its streams hold functions."""

    def __init__(self, owner: _Owner, side: str = "", name: str = "") -> None:
        self.owner, self.side, self.name = owner, side, name

    @property
    def recording(self) -> Recording | None:
        """The open recording, where it is the owner's."""
        recording = _RECORDING.get()
        return recording if recording is not None and recording.owner is self.owner else None


class _InputHook(_Hook):
    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if (recording := self.recording) is not None:
            recording.keep(self.side, self.name, args or tuple(kwargs.values()))


class _OutputHook(_Hook):
    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        if (recording := self.recording) is not None:
            recording.keep(self.side, self.name, output)


class _PassBegins(_Hook):
    def __call__(self, module: nn.Module, args: tuple) -> None:
        if (recording := self.recording) is not None:
            recording.passes += not recording.depth
            recording.depth += 1


class _PassEnds(_Hook):
    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        if (recording := self.recording) is not None:
            recording.depth -= 1
