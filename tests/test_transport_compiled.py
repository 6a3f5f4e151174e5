"""The compiled loops: same answers as Newton in torch; when `auto` takes them; the benchmark that compares them."""

import warnings
from pathlib import Path

import pytest
import torch
from problems import FAMILIES, costs, ragged_masks

pytest.importorskip("numba", reason="numba is not installed")

from peft_read import backends, use_backend
from peft_read.transport import numba_kernels, partial_optimal_transport

FORMS = ({"mass": 0.1}, {"mass": 0.5}, {"mass": 0.95}, {"mass": 1.0}, {"mass": 0.8, "marginals": "count"})


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("shape", [(4, 75, 32), (3, 20, 64)])
def test_compiled_loops_agree_with_newton(family, shape):
    cost, (row_mask, col_mask) = costs(family, *shape), ragged_masks(*shape)
    for form in FORMS:
        for masks in ({}, {"row_mask": row_mask, "col_mask": col_mask}):
            actual = partial_optimal_transport(cost.float(), method="auto", **form, **masks)
            expected = partial_optimal_transport(cost, method="newton", tol=1e-9, **form, **masks)
            assert actual.converged.all() and actual.marginal_error.max() <= 1e-5
            assert ((actual.mass - expected.mass).abs() <= 1e-3 * expected.mass).all()
            assert ((actual.cost - expected.cost).abs() <= 1e-4 * expected.cost + 1e-7).all()
            if masks:
                assert (actual.plan[~(row_mask[:, :, None] & col_mask[:, None, :])] == 0).all()


@pytest.mark.parametrize("penalty", [0.2, 0.6, 2.0])
def test_compiled_loops_agree_under_a_penalty(penalty):
    cost = costs("lowd", 3, 30, 20)
    actual = partial_optimal_transport(cost.float(), method="auto", penalty=penalty)
    expected = partial_optimal_transport(cost, method="newton", penalty=penalty, tol=1e-9)
    assert actual.converged.all()
    torch.testing.assert_close(actual.plan.double(), expected.plan, atol=2e-5, rtol=0)


def test_newton_in_torch_takes_over_what_the_loops_leave(monkeypatch):
    monkeypatch.setattr(numba_kernels, "LARGEST_NEWTON_SIDE", 4)
    cost = costs("matched", 4, 40, 24)
    actual = partial_optimal_transport(cost.float(), 0.5, method="auto")
    expected = partial_optimal_transport(cost, 0.5, method="newton", tol=1e-9)
    assert actual.converged.all()
    torch.testing.assert_close(actual.cost.double(), expected.cost, rtol=1e-4, atol=0)


@pytest.mark.parametrize("gradient", ["envelope", "implicit"])
def test_gradients_agree(gradient):
    cost = costs("aligned", 3, 20, 12).float()
    gradients = []
    for method in ("auto", "newton"):
        leaf = cost.clone().requires_grad_()
        partial_optimal_transport(leaf, 0.6, method=method, gradient=gradient).cost.sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=0)


def test_auto_takes_the_loops_where_they_fit(monkeypatch):
    partial_optimal_transport(torch.rand(2, 20, 12))  # the trial of the loops is over before calls are counted
    calls = []
    solve = numba_kernels.solve_compiled
    monkeypatch.setattr(numba_kernels, "solve_compiled", lambda *a, **k: calls.append(1) or solve(*a, **k))
    cost = costs("aligned", 2, 20, 12).float()
    partial_optimal_transport(cost)
    assert calls == [1]
    partial_optimal_transport(cost.double())  # float64 is torch's
    partial_optimal_transport(cost, method="newton")
    with use_backend("torch"):
        partial_optimal_transport(cost)
    assert calls == [1]


def test_what_a_forced_backend_cannot_run_is_reported(monkeypatch):
    monkeypatch.setattr(backends, "_said", set())
    with use_backend("numba"):
        with pytest.warns(RuntimeWarning, match='"numba" cannot take this transport problem: it is float64'):
            partial_optimal_transport(torch.rand(3, 2).double())
        with pytest.warns(RuntimeWarning, match="more than 42 temperatures|float64"):
            monkeypatch.setattr(backends, "_said", set())
            partial_optimal_transport(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), reg=1e-3)


def test_the_benchmark_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples" / "benchmarks"))
    import transport as benchmark

    with warnings.catch_warnings():
        benchmark.main(["--quick", "--repeats", "1", "--output", str(tmp_path / "out")])
    assert "torch Newton" in capsys.readouterr().out
    assert (tmp_path / "out.json").exists() and (tmp_path / "out.md").exists()
