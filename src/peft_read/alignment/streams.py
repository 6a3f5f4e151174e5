"""Streams: where, in any model, the video states and the language states of each block are."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..names import near_names, own_names, without_numbers
from ..plain import plain_flag, plain_integer, plain_names
from ..transport import real_entries
from .loss import mask_of

__all__ = ["Batch", "KnownMasks", "Stream", "rows_of", "unwrap_model"]

Batch = Mapping[str, Any]
Tokens = slice | Callable[[Batch, int], Any]
# By the shape (B, L) and the device: which tokens are not padding, and which entries of the mask are no mask's.
KnownMasks = dict[tuple[torch.Size, torch.device], tuple[Tensor, Tensor | None]]

# Entries of a batch with one row per example, whatever else it holds (such as the patches of all images).
ROW_PER_EXAMPLE = ("input_ids", "inputs_embeds", "labels", "attention_mask", "video_features", "visual_features")


def rows_of(batch: Batch) -> tuple[str, Tensor]:
    """A tensor of the batch with one row per example, and its name: one of `ROW_PER_EXAMPLE`, else the first.

    Raises:
        ValueError: the batch holds no tensor.
    """
    for name in (*ROW_PER_EXAMPLE, *batch):
        value = batch.get(name)
        if isinstance(value, Tensor) and value.dim():
            return name, value
    raise ValueError(f"a batch without any tensor cannot be counted; it has {sorted(map(str, batch))}")


@dataclass(frozen=True)
class Stream:
    """One side of the alignment: which modules, which of their tokens, and their padding.

    Args:
        modules: modules of the *unwrapped* base model (no `base_model.model.` prefix), one per block: a regular
            expression that matches the full name, or a sequence of names. A stream of one module is broadcast over
            the blocks of the other side.
        tokens: part of the module's sequence: None = all, a slice, or `f(batch, length)` that returns one.
        mask: which tokens are not padding: None = all, a key of the batch, or `f(batch)`; (B, L) after `tokens`, 0 =
            padding.
        invert_mask: for masks in which non-zero means padding.
        output: which part of the module's output: an index into a tuple, a key of a mapping, or `f(output)`; a tensor
            output is taken as it is.
        input: take the module's first input instead of its output.
        batch_first: False for modules that work on (L, B, d).

    Raises:
        ValueError: a value of another type, or an invalid regular expression.

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

    def __post_init__(self) -> None:
        if isinstance(self.modules, str):
            try:
                re.compile(self.modules)
            except re.error as error:
                raise ValueError(f"modules={self.modules!r} is not a regular expression: {error}") from error
            if not self.modules:
                raise ValueError("modules='' names no module")
        else:
            names = plain_names("modules", self.modules)
            if not names:
                raise ValueError("modules=[] names no module")
            object.__setattr__(self, "modules", tuple(names))
        if not (self.tokens is None or isinstance(self.tokens, slice) or callable(self.tokens)):
            raise ValueError(f"tokens={self.tokens!r} is neither None nor a slice nor a function of batch and length")
        if not (self.mask is None or isinstance(self.mask, str) or callable(self.mask)):
            raise ValueError(f"mask={self.mask!r} is neither None nor a key of the batch nor a function of it")
        if not isinstance(self.output, str) and not callable(self.output):
            object.__setattr__(self, "output", plain_integer("output", self.output))
        for name in ("invert_mask", "input", "batch_first"):
            object.__setattr__(self, name, plain_flag(name, getattr(self, name)))

    def module_names(self, model: nn.Module) -> list[str]:
        """Names of this stream's modules in `model` (unwrapped), in the order of the model.

        Raises:
            ValueError: nothing matches, or a listed name does not exist; the message lists near names.
        """
        names = [name for name, _ in model.named_modules() if name]
        if isinstance(self.modules, str):
            matching = [name for name in names if re.fullmatch(self.modules, name)]
            if not matching:
                raise ValueError(
                    f"no module of {type(model).__name__} matches {self.modules!r}; {_hint(model, [self.modules])}"
                )
            return matching
        missing = [name for name in self.modules if name not in set(names)]
        if missing:
            raise ValueError(f"{type(model).__name__} has no modules {missing}; {_hint(model, missing)}")
        return list(self.modules)

    def select_output(self, output: Any, name: str) -> Tensor:
        """The state tensor (B, L, d) in a module's output or input.

        Raises:
            ValueError: by module, there is no such tensor.
        """
        states = self._part_of(output, name)
        if not isinstance(states, Tensor) or states.dim() != 3:
            shape = tuple(states.shape) if isinstance(states, Tensor) else type(states).__name__
            raise ValueError(f"module {name!r} gave {shape}; a stream needs states of shape (batch, tokens, width)")
        return states if self.batch_first else states.transpose(0, 1)

    def _part_of(self, output: Any, name: str) -> Any:
        if callable(self.output):
            return self.output(output)
        try:
            if isinstance(output, Mapping):
                return output[self.output if isinstance(self.output, str) else list(output)[self.output]]
            if isinstance(output, tuple | list):
                return output[self.output]  # type: ignore[index]
        except (LookupError, TypeError) as error:
            held = sorted(output) if isinstance(output, Mapping) else f"{len(output)} entries"
            raise ValueError(
                f"module {name!r} has no {'input' if self.input else 'output'} {self.output!r}; it has {held}"
            ) from error
        return output

    def select_tokens(
        self, states: Tensor, batch: Batch, name: str, known: KnownMasks | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The tokens of this stream (B, L', d), and their boolean mask (B, L') or None.

        Args:
            states: the module's, (B, L, d).
            batch: what the model was given.
            name: of the module, for messages.
            known: the masks of other modules for the same batch, looked up and added to; a mask depends on the batch
                alone, and looking at it once per block costs time of the host.

        Raises:
            ValueError: no tokens are selected, or the mask is absent, is not a mask, or has another shape.
        """
        if self.tokens is not None:
            states = self._selected(states, batch, name)
        if self.mask is None:
            return states, None
        kind = (states.shape[:2], states.device)
        if known is not None and kind in known:
            valid, wrong = known[kind]
            return states if wrong is None else torch.where(wrong[..., None], torch.nan, states), valid
        if callable(self.mask):
            mask = self.mask(batch)
        elif self.mask in batch:
            mask = batch[self.mask]
        else:
            raise ValueError(f"the batch has no mask {self.mask!r}; it has {sorted(batch)}")
        if mask is None:
            return states, None
        source = f"mask {self.mask!r}" if isinstance(self.mask, str) else "the mask function's result"
        where = f"module {name!r}, {source}"
        valid = mask_of(mask, where)
        if valid.shape != states.shape[:2]:
            raise ValueError(
                f"module {name!r}: {source} has shape {tuple(valid.shape)}, the states that it should describe "
                f"have {tuple(states.shape)}; set Stream.tokens to the part of the sequence that the mask covers"
            )
        valid, wrong = real_entries(where, valid, tuple(states.shape[:2]))
        valid, wrong = valid.to(states.device), None if wrong is None else wrong.to(states.device)
        if self.invert_mask:
            valid = ~valid
        if known is not None:
            known[kind] = valid, wrong
        if wrong is not None:  # on a device, where the distance says it as NaN
            states = torch.where(wrong[..., None], torch.nan, states)
        return states, valid

    def _selected(self, states: Tensor, batch: Batch, name: str) -> Tensor:
        index = self.tokens(batch, states.shape[1]) if callable(self.tokens) else self.tokens
        try:
            selected = states[:, index]
        except (IndexError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"module {name!r}: tokens {index!r} cannot be taken from {states.shape[1]} tokens: {error}"
            ) from error
        if selected.dim() != 3 or not selected.shape[1]:
            raise ValueError(
                f"module {name!r}: tokens {index!r} select {tuple(selected.shape)} of {tuple(states.shape)}; a stream "
                "needs (batch, tokens, width) with at least one token"
            )
        return selected


# What peft, torch.compile and DDP put before the names of the model that they wrap.
OUTER_NAMES = re.compile(r"(base_model\\?\.model\\?\.|_orig_mod\\?\.|module\\?\.)+")


def _hint(model: nn.Module, wanted: Sequence[str]) -> str:
    """What there is in the place of names or a regular expression that match nothing."""
    names = own_names(model)
    inner = [text[outer.end() :] for text in wanted if (outer := OUTER_NAMES.match(text)) and outer.end() < len(text)]
    if found := [text for text in inner if any(text == name or re.fullmatch(text, name) for name in names)]:
        return f"names are those of the model without its wrappers: {found[0]!r}"
    advice = "names are those of the model without its wrappers (no base_model.model.); " if inner else ""
    # What a regular expression stands for: signs that are escaped, and 0 for a number.
    spelt = [re.sub(r"\\(\W)", r"\1", re.sub(r"\\d[+*]?", "0", text)) for text in inner or wanted]
    shown = without_numbers(names)
    near = near_names(without_numbers(spelt), shown, count=4)
    if near:
        return f"{advice}near names: {', '.join(near)}"
    return f"{advice}some of its modules: {', '.join(sorted(shown)[:40])}"


WRAPPERS = frozenset({"DataParallel", "DeepSpeedEngine", "DistributedDataParallel", "FullyShardedDataParallel"})


def unwrap_model(model: nn.Module) -> nn.Module:
    """The base model inside DDP, FSDP1, torch.compile and peft wrappers."""
    wrapped: Any = model
    while True:
        if hasattr(wrapped, "get_base_model"):  # peft
            wrapped = wrapped.get_base_model()
        elif isinstance(getattr(wrapped, "_orig_mod", None), nn.Module):  # torch.compile
            wrapped = wrapped._orig_mod
        elif type(wrapped).__name__ in WRAPPERS:
            wrapped = wrapped.module
        else:
            return wrapped
