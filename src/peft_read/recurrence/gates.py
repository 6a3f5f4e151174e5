"""What a scan leaves to torch: how a state follows its gates, and all gradients from those of the gates.

The gates get W_ih x + b_ih from the inputs, here "inner", and W_hh h + b_hh from the state before, here "outer".
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .arguments import ScanArguments

__all__ = ["gradients_of_gates", "slopes_of_gru", "states_before"]


def slopes_of_gru(arguments: ScanArguments, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """How h_t = n + z (h_{t-1} - n), with n = tanh(inner_n + r outer_n), follows its gates and the state before.

    Returns:
        The derivatives by outer_r, outer_z, outer_n and inner_n, (B, T, 4 k), 0 at padding; and that by h_{t-1} apart
        from the gates, (B, T, k), 1 at padding.
    """
    x, state, mask, weight_ih, weight_hh, bias_ih, bias_hh = arguments
    before = states_before(outputs, state)
    inner = F.linear(x, weight_ih, bias_ih).chunk(3, dim=-1)
    outer = F.linear(before, weight_hh, bias_hh).chunk(3, dim=-1)
    reset, update = (inner[0] + outer[0]).sigmoid(), (inner[1] + outer[1]).sigmoid()
    new = torch.tanh(inner[2] + reset * outer[2])
    by_new = (1 - update) * (1 - new * new)
    by_update = (before - new) * update * (1 - update)
    by_reset = by_new * outer[2] * reset * (1 - reset)
    slopes = torch.cat((by_reset, by_update, by_new * reset, by_new), dim=-1)
    if mask is None:
        return slopes, update
    return torch.where(mask[..., None], slopes, 0), torch.where(mask[..., None], update, 1)


def states_before(outputs: Tensor, state: Tensor | None) -> Tensor:
    """h_{t-1} of every token, (B, T, k), from all h_t and the state before the first token."""
    if state is None:
        return F.pad(outputs[:, :-1], (0, 0, 1, 0))
    return torch.cat((state[:, None], outputs[:, :-1]), dim=1)


def gradients_of_gates(
    inner: Tensor, outer: Tensor, grad_state: Tensor, arguments: ScanArguments, outputs: Tensor, needs: ScanArguments
) -> ScanArguments:
    """The gradients that are needed, by matrix products.

    Args:
        inner: the gradient of W_ih x + b_ih, (B, T, G k), zero at padding.
        outer: that of W_hh h + b_hh.
        grad_state: that of the state before the first token.
        arguments: of the scan.
        outputs: its h_t, (B, T, k).
        needs: which of the arguments need a gradient.
    """
    flat, flat_outer = inner.flatten(0, 1), outer.flatten(0, 1)
    bias_ih = flat.sum(0) if needs.bias_ih else None
    bias_hh = None
    if needs.bias_hh:  # of the RNN both biases have one gradient
        bias_hh = bias_ih.clone() if inner is outer and bias_ih is not None else flat_outer.sum(0)
    return ScanArguments(
        inner @ arguments.weight_ih if needs.x else None,  # type: ignore[arg-type]
        grad_state,
        None,
        flat.T @ arguments.x.flatten(0, 1) if needs.weight_ih else None,  # type: ignore[arg-type]
        flat_outer.T @ states_before(outputs, arguments.state).flatten(0, 1) if needs.weight_hh else None,  # type: ignore[arg-type]
        bias_ih,  # type: ignore[arg-type]
        bias_hh,  # type: ignore[arg-type]
    )
