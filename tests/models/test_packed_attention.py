"""Our attention against PyTorch's, in every mode."""

import pytest
import torch
from torch import nn

from peft_read.models.packed_attention import PackedAttention


def pair():
    ours = PackedAttention(12, 3)
    theirs = nn.MultiheadAttention(12, 3, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients_equal_pytorchs(masked):
    ours, theirs = pair()
    padding = torch.tensor([[False] * 5, [False, False, True, True, True]]) if masked else None
    gradients = []
    for module in (ours, theirs):
        torch.manual_seed(0)
        query, key, value = (torch.randn(2, length, 12, requires_grad=True) for length in (4, 5, 5))
        states, _ = module(query, key, value, key_padding_mask=padding, need_weights=False)
        states.pow(2).sum().backward()
        gradients.append([states, query.grad, key.grad, value.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_one_computation_with_and_without_gradients():
    ours, _ = pair()
    states = torch.randn(2, 5, 12)
    with torch.no_grad():
        silent = ours(states, states, states)[0]
    assert ours(states, states, states)[0].equal(silent)
    ours.requires_grad_(False)
    assert ours(states, states, states)[0].equal(silent)


def test_the_output_projection_can_be_hooked():
    ours, _ = pair()
    seen = []
    ours.out_proj.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        states, _ = ours(*[torch.randn(1, 3, 12)] * 3)
    assert seen[0] is states


def test_rows_of_padding_are_finite_and_weights_are_refused():
    ours, _ = pair()
    states = torch.randn(1, 3, 12)
    assert ours(states, states, states, key_padding_mask=torch.ones(1, 3, dtype=torch.bool))[0].isfinite().all()
    with pytest.raises(NotImplementedError, match="returns no weights"):
        ours(states, states, states, need_weights=True)
    with pytest.raises(NotImplementedError, match=r"takes no \['attn_mask'\]"):
        ours(states, states, states, attn_mask=torch.zeros(3, 3))
