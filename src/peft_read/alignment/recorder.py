"""The recorder: hooks that hand the states of one forward pass to the alignment loss, and to nobody else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .streams import Stream

__all__ = ["AlignedBlock", "Recording", "StreamPair"]


@dataclass
class AlignedBlock:
    """The states of one block: (B, N, d) video, (B, M, d) language, and their boolean masks or None."""

    video: Tensor
    language: Tensor
    video_mask: Tensor | None = None
    language_mask: Tensor | None = None


@dataclass
class Recording:
    """What the hooks saw in one forward pass: (side, module name) to states (B, L, d)."""

    owner: int
    with_grad: bool
    states: dict[tuple[str, str], Tensor] = field(default_factory=dict)


# A ContextVar keeps threads apart; the hooks do nothing unless their own recording is open, so that generate(),
# evaluation and the recomputation of checkpointed blocks in backward record nothing.
_RECORDING: ContextVar[Recording | None] = ContextVar("peft_read_alignment_recording", default=None)


class StreamPair:
    """The video and the language stream of one model, with hooks on their modules.

    Args:
        model: unwrapped base model.
        video, language: the streams.
        blocks: "all", or the indices of the blocks to align (negative ones count from the end).

    Raises:
        ValueError: block counts that do not match, or a block that does not exist.
    """

    def __init__(self, model: nn.Module, video: Stream, language: Stream, blocks: str | Sequence[int] = "all") -> None:
        self.video, self.language = video, language
        pairs = _pair_names(video.module_names(model), language.module_names(model))
        self.names = pairs if isinstance(blocks, str) else [_pick(pairs, index) for index in blocks]
        modules = dict(model.named_modules())
        self.handles = []
        for side, stream in (("video", video), ("language", language)):
            for name in {pair[side == "language"] for pair in self.names}:
                self.handles.append(
                    _install(modules[name], partial(_keep, id(self), side, stream, name), stream.input)
                )

    @contextmanager
    def record(self) -> Iterator[Recording]:
        """Records the forward passes inside; opening a second recording inside hides the first."""
        recording = Recording(owner=id(self), with_grad=torch.is_grad_enabled())
        token = _RECORDING.set(recording)
        try:
            yield recording
        finally:
            _RECORDING.reset(token)

    def blocks(self, recording: Recording, batch: Mapping[str, Any]) -> list[AlignedBlock]:
        """The recorded states as blocks, tokens selected and masks attached.

        Raises:
            RuntimeError: a module of the streams did not run in the recorded forward pass.
        """
        blocks = []
        for video_name, language_name in self.names:
            sides = []
            for side, stream, name in (
                ("video", self.video, video_name),
                ("language", self.language, language_name),
            ):
                if (side, name) not in recording.states:
                    raise RuntimeError(
                        f"the {side} stream's module {name!r} did not run in the recorded forward pass; recorded: "
                        f"{sorted(name for _, name in recording.states) or 'nothing'}"
                    )
                sides.append(stream.select_tokens(recording.states[side, name], batch, name))
            (video, video_mask), (language, language_mask) = sides
            blocks.append(AlignedBlock(video, language, video_mask, language_mask))
        return blocks

    def remove(self) -> None:
        """Takes the hooks away."""
        for handle in self.handles:
            handle.remove()
        self.handles = []


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


def _install(module: nn.Module, keep: Any, take_input: bool) -> Any:
    if take_input:
        return module.register_forward_pre_hook(partial(_pre_hook, keep), with_kwargs=True)
    return module.register_forward_hook(partial(_post_hook, keep))


def _pre_hook(keep: Any, module: nn.Module, args: tuple, kwargs: dict) -> None:
    keep(args or tuple(kwargs.values()))


def _post_hook(keep: Any, module: nn.Module, args: tuple, output: Any) -> None:
    keep(output)


def _keep(owner: int, side: str, stream: Stream, name: str, output: Any) -> None:
    recording = _RECORDING.get()
    if recording is None or recording.owner != owner:
        return
    states = stream.select_output(output, name)
    if recording.with_grad and not torch.is_grad_enabled():
        raise RuntimeError(
            f"the states of {name!r} were captured where gradients are switched off (inside a reentrant gradient "
            "checkpoint, or under no_grad), so the alignment loss would silently have no gradient. Use "
            "gradient_checkpointing_kwargs={'use_reentrant': False}, or name whole blocks instead of their parts"
        )
    if (side, name) in recording.states:
        raise RuntimeError(
            f"module {name!r} ran twice in one recorded forward pass, so its states are ambiguous; record one forward "
            "pass at a time, and name modules that run once a pass"
        )
    recording.states[side, name] = states
