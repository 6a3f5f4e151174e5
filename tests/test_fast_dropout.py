"""The cheaper dropout of the example scripts."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path[:0] = [str(EXAMPLES / "reproduction"), str(EXAMPLES / "benchmarks")]
dropout, fast_dropout = (importlib.import_module(name) for name in ("dropout", "fast_dropout"))
FastDropout, thin_out = fast_dropout.FastDropout, fast_dropout.thin_out


@pytest.mark.parametrize("p", [0.1, 0.5, 0.3])
def test_a_share_p_is_dropped_and_the_rest_is_scaled(p):
    torch.manual_seed(0)
    x = torch.ones(1000, 333, requires_grad=True)
    with FastDropout():
        y = F.dropout(x, p)
    rate = 65536 / (65536 - round(65536 * p))
    assert set(y.detach().unique().tolist()) == {0.0, torch.tensor(rate).item()}
    kept = (y != 0).float()
    assert abs(1 - kept.mean() - p) < 4 * (p * (1 - p) / x.numel()) ** 0.5
    # No row, no column and no neighbour is favoured: each share lies within five standard deviations.
    for dim in (0, 1):
        assert ((1 - kept.mean(dim)) - p).abs().max() < 5 * (p * (1 - p) / kept.shape[dim]) ** 0.5
    both = (kept.view(-1)[1:] * kept.view(-1)[:-1]).mean()
    assert abs(both - (1 - p) ** 2) < 5 * (0.25 / x.numel()) ** 0.5
    y.sum().backward()
    torch.testing.assert_close(x.grad, kept * rate)


def test_the_seed_decides_and_every_call_draws_anew():
    x = torch.ones(64, 7)
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append((thin_out(x, 0.5), thin_out(x, 0.5)))
    assert torch.equal(draws[0][0], draws[1][0]) and torch.equal(draws[0][1], draws[1][1])
    assert not torch.equal(*draws[0])


@pytest.mark.parametrize("kind", ["none", "bool", "float"])
def test_attention_is_the_formula_with_this_mask(kind):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 6, 8) for _ in range(3))
    mask = None if kind == "none" else torch.ones(2, 1, 1, 6).tril(4).bool()
    mask = torch.zeros(2, 1, 6, 6).masked_fill(~mask, -1e4) if kind == "float" else mask
    torch.manual_seed(1)
    with FastDropout():
        ours = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.25)
    torch.manual_seed(1)
    keep = thin_out(torch.ones(2, 4, 6, 6), 0.25)
    bias = 0.0 if mask is None else mask if kind == "float" else torch.where(mask, 0.0, -torch.inf)
    torch.testing.assert_close(ours, ((q @ k.mT / 8**0.5 + bias).softmax(-1) * keep) @ v)


def test_what_it_does_not_take_is_torchs_own():
    layer, x = nn.Dropout(0.5), torch.ones(9, 9)
    q = torch.randn(1, 1, 3, 4)
    with FastDropout():
        assert torch.equal(layer.eval()(x), x)
        assert F.dropout(x.double(), 0.5).dtype is torch.float64
        assert torch.equal(F.dropout(x, 0.0), x)
        assert not F.dropout(x, 1.0).any()
        causal = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    torch.testing.assert_close(causal, F.scaled_dot_product_attention(q, q, q, is_causal=True))
    torch.manual_seed(0)
    expected = F.dropout(x, 0.5)
    torch.manual_seed(0)
    with FastDropout(enabled=False):
        assert torch.equal(F.dropout(x, 0.5), expected)


def test_the_benchmark_measures_three_cases(tmp_path, capsys):
    times = dropout.main(["--quick", "--repeats", "1", "--output", str(tmp_path / "dropout")])
    assert len(times) == 3 and all(a > 0 and b > 0 for a, b in times.values())
    report = (tmp_path / "dropout.md").read_text()
    assert report.strip() in capsys.readouterr().out and "Moment-DETR" in report
