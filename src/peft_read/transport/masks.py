"""The package's masks: zero is padding, anything else a token; additive attention masks are refused."""

import torch
from torch import Tensor

__all__ = ["broadcasts", "real_entries", "shape_of"]


def real_entries(
    name: str, mask: Tensor, shape: tuple[int, ...], *, check: bool | None = None
) -> tuple[Tensor, Tensor | None]:
    """Which entries are not padding by a mask of any dtype.

    Args:
        name: what the mask is called in errors.
        mask: 0 = padding.
        shape: what it must broadcast to.
        check: whether to look at the values, which waits for a device; by default on the CPU only.

    Returns:
        The mask as booleans and, if its values were not checked, which of its entries are invalid, else None.

    Raises:
        ValueError: for another shape, and for negative or NaN entries, which are those of a mask that is added to
            attention scores: it would be read the other way round.
    """
    if not isinstance(mask, Tensor) or not broadcasts(mask.shape, shape):
        raise ValueError(f"{name} must be a tensor of shape {shape}, or broadcast to it, got {shape_of(mask)}.")
    if mask.is_complex():
        raise ValueError(f"{name} must be boolean, integer or floating point (0 = padding), got {mask.dtype}.")
    if mask.dtype is torch.bool:
        return mask, None
    if mask.dtype is torch.uint8:
        return mask != 0, None
    good = mask >= 0
    if check or (check is None and mask.device.type == "cpu"):
        if not bool(good.all()):
            raise ValueError(
                f"{name} has negative or NaN entries: it must be non-zero on real entries and 0 on padding, not a "
                "mask to be added to attention scores."
            )
        return mask != 0, None
    return mask != 0, ~good


def broadcasts(shape: torch.Size, target: tuple[int, ...]) -> bool:
    """Whether a shape broadcasts to another without making it larger."""
    return len(shape) <= len(target) and all(
        size in (1, full) for size, full in zip(reversed(shape), reversed(target), strict=False)
    )


def shape_of(value: object) -> str:
    """The shape of a tensor, or what else it is, for errors."""
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
