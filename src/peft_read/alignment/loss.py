"""The alignment loss: how far a block's video states are from its language states, by partial optimal transport."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..plain import plain_number
from ..transport import cosine_cost, partial_optimal_transport, real_entries
from ..transport.arguments import METHODS

__all__ = ["DISTANCES", "AlignmentDistance", "PVLALoss", "alignment_distance", "mask_of"]

DISTANCES = ("partial_ot", "avg_cosine", "max_cosine", "avg_l2", "max_l2")


class AlignmentDistance(NamedTuple):
    """One number per block and example; no blocks where none of them ran."""

    distance: Tensor  # (blocks, B), differentiable
    mass: Tensor  # (blocks, B), the transported mass; 1 for pooled distances, 0 where a side is all padding
    converged: Tensor | None = None  # (blocks, B) bool, of transport; see TransportPlan

    def mean(self) -> Tensor:
        """The mean distance over blocks and examples, a scalar; 0 where no block ran."""
        return self.distance.mean() if self.distance.numel() else self.distance.sum()

    def over_blocks(self) -> tuple[Tensor, Tensor]:
        """The mean distance and mass of each example, (B,) each; 0 where no block ran."""
        count = max(1, len(self.distance))
        return self.distance.sum(0) / count, self.mass.sum(0) / count


def alignment_distance(
    video: Tensor | Sequence[Tensor],
    language: Tensor | Sequence[Tensor],
    video_mask: Tensor | Sequence[Tensor | None] | None = None,
    language_mask: Tensor | Sequence[Tensor | None] | None = None,
    *,
    distance: str = "partial_ot",
    mass: float = 0.5,
    reg: float = 0.05,
    method: str = "auto",
) -> AlignmentDistance:
    """Distance between the video and the language states of every block and example.

    `partial_ot` is the paper's POT distance (section 3.3, equations 7 and 8) with cosine cost, uniform weights over
    the tokens and a fixed fraction of the mass, divided by that mass. The other four are the pooled distances of
    Table 9: masked average or maximum over tokens, then 1 - cosine, or squared Euclidean distance / d.

    All blocks and examples are solved in one call, in at least float32 and outside autocast.

    Args:
        video: (B, N, d), or a sequence of such, one per block; N may differ from block to block.
        language: (B, M, d), or a sequence of such.
        video_mask: (B, N), 0 = padding, for all blocks or one per block; None = no padding.
        language_mask: (B, M), likewise.
        distance: one of `DISTANCES`.
        mass: fraction of the mass to transport, in (0, 1]; 1 is the paper's VLA ablation.
        reg: entropic regularisation, the paper's temperature.
        method: see `partial_optimal_transport`.

    Raises:
        ValueError: an unknown distance or solver, a number out of range, shapes that do not belong together, an
            additive attention mask, or (by block) a token that is not finite.
    """
    distance, method = checked_distance(distance), checked_method(method)
    mass, reg = checked_mass(mass), checked_reg(reg)
    blocks = _pair_blocks(video, language, video_mask, language_mask)
    device_type = blocks[0][0].device.type
    with torch.autocast(device_type=device_type, enabled=False):
        if distance == "partial_ot":
            try:
                return _transport_distance(blocks, mass=mass, reg=reg, method=method)
            except ValueError:
                _check_finite(blocks)  # the transport sees costs alone, and refuses those that are not finite
                raise
        _check_finite(blocks)
        pooling, metric = distance.split("_")
        distances = torch.stack([_pooled_distance(*block, pooling=pooling, metric=metric) for block in blocks])
        return AlignmentDistance(distances, torch.stack([_both_present(*block) for block in blocks]))


class PVLALoss(nn.Module):
    """Partial video-language alignment: the mean of `alignment_distance` over blocks and examples.

    Source: section 3.3 and Algorithm 1 of READ-PVLA; the default is true partial transport, see docs/paper_notes.md.

    Args:
        mass: fraction of the mass to transport, in (0, 1].
        reg: entropic regularisation (temperature), positive.
        distance: "partial_ot" or a pooled distance of Table 9.
        method: solver, see `partial_optimal_transport`.

    Raises:
        ValueError: a number out of range, an unknown distance or solver.

    Example:
        >>> import torch
        >>> loss = PVLALoss(mass=0.5)
        >>> states = torch.eye(4).unsqueeze(0)  # (1, 4, 4): four orthogonal tokens
        >>> bool(loss(states, states) < 0.01)  # every frame has its word
        True
    """

    def __init__(
        self, mass: float = 0.5, reg: float = 0.05, distance: str = "partial_ot", method: str = "auto"
    ) -> None:
        super().__init__()
        self.mass, self.reg = checked_mass(mass), checked_reg(reg)
        self.distance, self.method = checked_distance(distance), checked_method(method)

    def forward(
        self,
        video: Tensor | Sequence[Tensor],
        language: Tensor | Sequence[Tensor],
        video_mask: Tensor | Sequence[Tensor | None] | None = None,
        language_mask: Tensor | Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """The loss, a scalar; shapes as in `alignment_distance`."""
        result = alignment_distance(
            video,
            language,
            video_mask,
            language_mask,
            distance=self.distance,
            mass=self.mass,
            reg=self.reg,
            method=self.method,
        )
        return result.distance.mean()

    def extra_repr(self) -> str:
        """What `print(loss)` shows."""
        return f"mass={self.mass}, reg={self.reg}, distance={self.distance!r}, method={self.method!r}"


def checked_mass(mass: Any) -> float:
    """The mass fraction as a float in (0, 1]."""
    number = plain_number("mass", mass)
    if not 0 < number <= 1:
        raise ValueError(f"mass={number} is outside (0, 1]: it is the fraction of the mass to transport")
    return number


def checked_reg(reg: Any) -> float:
    """The temperature as a float above 0."""
    number = plain_number("reg", reg)
    if not number > 0:
        raise ValueError(f"reg={number} must be positive; the paper uses 0.05")
    return number


def checked_distance(distance: Any) -> str:
    """One of `DISTANCES`."""
    if distance not in DISTANCES:
        raise ValueError(f"distance={distance!r} is not one of {DISTANCES}")
    return str(distance)


def checked_method(method: Any) -> str:
    """One of the transport solvers."""
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not one of {METHODS}")
    return str(method)


def mask_of(mask: Any, where: str) -> Tensor:
    """A mask with 0 at padding, as a tensor.

    Args:
        mask: a tensor of any dtype, or an array.
        where: whose mask it is, for the message.

    Raises:
        ValueError: not a tensor, or complex numbers.
    """
    try:
        tensor = torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{where}: a mask must be a tensor, got {type(mask).__name__}") from error
    if tensor.is_complex():
        raise ValueError(f"{where} has complex entries; it must be 0 on padding and non-zero elsewhere")
    return tensor


# Video (B, N, d), language (B, M, d), and their boolean masks, None without padding.
Block = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def _pair_blocks(video: object, language: object, video_mask: object, language_mask: object) -> list[Block]:
    """Lists of equal length with boolean masks, every shape checked."""
    videos, languages = _as_list(video, "video"), _as_list(language, "language")
    if len(videos) != len(languages) or not videos:
        raise ValueError(f"{len(videos)} video blocks and {len(languages)} language blocks cannot be paired")
    count = len(videos)
    video_masks, language_masks = _masks_as_list(video_mask, count), _masks_as_list(language_mask, count)
    blocks = []
    known: KnownMasks = {}
    for index, (v, t, vm, tm) in enumerate(zip(videos, languages, video_masks, language_masks, strict=True)):
        where = "" if count == 1 else f"block {index}: "
        for name, states in (("video", v), ("language", t)):
            if not isinstance(states, Tensor) or not states.is_floating_point():
                kind = states.dtype if isinstance(states, Tensor) else type(states).__name__
                raise ValueError(f"{where}{name} states must be a floating-point tensor, got {kind}")
        if misfit := _misfit(v, t):
            shapes = f"video states {tuple(v.shape)} and language states {tuple(t.shape)}"
            raise ValueError(f"{where}{shapes}: {misfit}")
        blocks.append((*_masked(vm, v, "video", where, known), *_masked(tm, t, "language", where, known)))
    return [(v, t, vm, tm) for v, vm, t, tm in blocks]


def _misfit(video: Tensor, language: Tensor) -> str | None:
    """Why the states of the two sides do not belong together."""
    for name, states in (("video", video), ("language", language)):
        if states.dim() != 3:
            count = f"{states.dim()} dimension{'s' * (states.dim() != 1)}"
            return f"the {name} states have {count} and need three, (batch, tokens, width)"
        if not states.shape[2]:
            return f"the {name} states have the width 0"
    if len(video) != len(language):
        return (
            f"batch sizes {len(video)} and {len(language)} differ; a row of the video states and the same row of the "
            "language states are one example"
        )
    if video.shape[2] != language.shape[2]:
        return (
            f"widths {video.shape[2]} and {language.shape[2]} differ; project one of them to the width of the other, "
            "or name states of one width"
        )
    for name, states in (("video", video), ("language", language)):
        if not states.numel():
            return (
                f"the {name} states hold no token at all; an example without video or text is one whose mask is 0 "
                "everywhere"
            )
    return None


def _as_list(value: object, name: str) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name} must be a tensor or a list of tensors, one per block, got {type(value).__name__}")
    return list(value)


def _masks_as_list(value: object, count: int) -> list[Tensor | None]:
    if value is None or not isinstance(value, list | tuple):
        return [value] * count  # type: ignore[list-item]
    if len(value) != count:
        raise ValueError(f"{len(value)} masks were given for {count} blocks")
    return list(value)


KnownMasks = dict[tuple[int, torch.device], tuple[Tensor, Tensor | None]]  # by the id of what was given


def _masked(mask: Any, states: Tensor, side: str, where: str, known: KnownMasks) -> tuple[Tensor, Tensor | None]:
    """The states in at least float32, and their mask as booleans; one mask of all blocks is looked at once."""
    states = states if states.dtype == torch.float64 else states.float()
    if mask is None:
        return states, None
    whose = f"{where}the {side} mask"
    key = (id(mask), states.device)
    valid, wrong = known.get(key, (None, None))
    given = mask_of(mask, whose) if valid is None else valid
    if given.shape != states.shape[:2]:
        raise ValueError(
            f"{whose} has shape {tuple(given.shape)}, and the states that it describes have {tuple(states.shape)}; a "
            "mask has one entry per token, (batch, tokens)"
        )
    if valid is None:
        valid, wrong = real_entries(whose, given, tuple(states.shape[:2]))
        valid, wrong = valid.to(states.device), None if wrong is None else wrong.to(states.device)
        known[key] = valid, wrong
    if wrong is not None:  # reading values would wait for the device; the distance is NaN there
        states = torch.where(wrong[..., None], torch.nan, states)
    return states, valid


def _check_finite(blocks: list[Block]) -> None:
    if blocks[0][0].device.type != "cpu":
        return  # reading values would wait for the device; the distance is NaN there, which the trainer reports
    for index, (v, t, vm, tm) in enumerate(blocks):
        for name, states, mask in (("video", v, vm), ("language", t, tm)):
            finite = states.isfinite().all(-1)
            if not bool((finite if mask is None else finite | ~mask).all()):
                where = "" if len(blocks) == 1 else f"block {index}: "
                raise ValueError(f"{where}a token of the {name} states outside the padding is NaN or infinite")


def _transport_distance(blocks: list[Block], *, mass: float, reg: float, method: str) -> AlignmentDistance:
    cost, row_mask, col_mask = _alike(blocks) or _unlike(blocks)
    plan = partial_optimal_transport(cost, mass=mass, reg=reg, row_mask=row_mask, col_mask=col_mask, method=method)
    moved = plan.mass.detach()
    # An example without video or without words transports nothing: its cost is 0 and stays 0.
    distance = plan.cost / moved.masked_fill(moved <= 0, torch.inf)
    return AlignmentDistance(distance, moved, plan.converged)


# (blocks, B, N, M) and the masks, (blocks, B, N) and (blocks, B, M), None without padding.
Costs = tuple[Tensor, Tensor | None, Tensor | None]


def _alike(blocks: list[Block]) -> Costs | None:
    """The costs of blocks of one shape and dtype, which are those of one stack; None for others."""
    if len({(v.shape, t.shape, v.dtype, t.dtype, v.device) for v, t, _, _ in blocks}) > 1:
        return None
    videos, languages, video_masks, language_masks = (list(side) for side in zip(*blocks, strict=True))
    v, t = torch.stack(videos), torch.stack(languages)
    vm, tm = _one_mask(video_masks, v), _one_mask(language_masks, t)
    return cosine_cost(v, t, vm, tm), vm, tm


def _one_mask(masks: list[Tensor | None], states: Tensor) -> Tensor | None:
    """The masks of a stack of states (blocks, B, L, d); None if no block has one."""
    first = masks[0]
    if all(mask is first for mask in masks):
        return None if first is None else first.expand(states.shape[:-1])
    return torch.stack([_present(one, mask) for one, mask in zip(states, masks, strict=True)])


def _present(states: Tensor, mask: Tensor | None) -> Tensor:
    """The mask (B, L) of states (B, L, d)."""
    return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device) if mask is None else mask


def _unlike(blocks: list[Block]) -> Costs:
    """The costs of blocks whose lengths differ, filled up with padding."""
    rows, columns = max(v.shape[1] for v, *_ in blocks), max(t.shape[1] for _, t, *_ in blocks)
    costs, row_masks, column_masks = [], [], []
    for video, language, video_mask, language_mask in blocks:
        cost = cosine_cost(video, language, video_mask, language_mask)
        costs.append(F.pad(cost, (0, columns - cost.shape[2], 0, rows - cost.shape[1])))
        row_masks.append(F.pad(_present(video, video_mask), (0, rows - cost.shape[1])))
        column_masks.append(F.pad(_present(language, language_mask), (0, columns - cost.shape[2])))
    return torch.stack(costs), torch.stack(row_masks), torch.stack(column_masks)


def _pooled_distance(
    v: Tensor, t: Tensor, vm: Tensor | None, tm: Tensor | None, *, pooling: str, metric: str
) -> Tensor:
    a, b = _pool(v, vm, pooling), _pool(t, tm, pooling)  # (B, d)
    if metric == "cosine":
        distance = 1 - F.cosine_similarity(a, b, dim=-1)
    else:
        distance = (a - b).square().sum(-1) / a.shape[-1]
    return torch.where(_both_present(v, t, vm, tm) > 0, distance, torch.zeros_like(distance))


def _pool(states: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
    mask = _present(states, mask).unsqueeze(-1)  # (B, L, 1)
    if pooling == "avg":
        return states.masked_fill(~mask, 0).sum(1) / mask.sum(1).clamp_min(1)
    pooled = states.masked_fill(~mask, float("-inf")).amax(1)
    return torch.where(mask.any(1), pooled, torch.zeros_like(pooled))


def _both_present(v: Tensor, t: Tensor, vm: Tensor | None, tm: Tensor | None) -> Tensor:
    return (_present(v, vm).any(1) & _present(t, tm).any(1)).float()
