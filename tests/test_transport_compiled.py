"""The compiled loops: same answers as Newton in torch; when `auto` takes them; the benchmark that compares them."""

import warnings
from pathlib import Path

import pytest
import torch
from problems import FAMILIES, costs, ragged_masks

pytest.importorskip("numba", reason="numba is not installed")

from peft_read.transport import compiled, fast, partial_optimal_transport

FORMS = ({"mass": 0.1}, {"mass": 0.5}, {"mass": 0.95}, {"mass": 1.0}, {"mass": 0.8, "marginals": "count"})


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("shape", [(4, 75, 32), (3, 20, 64)])
def test_compiled_loops_agree_with_newton(family, shape):
    cost, (row_mask, col_mask) = costs(family, *shape), ragged_masks(*shape)
    for form in FORMS:
        for masks in ({}, {"row_mask": row_mask, "col_mask": col_mask}):
            found = partial_optimal_transport(cost.float(), method="numba", **form, **masks)
            expected = partial_optimal_transport(cost, method="newton", tol=1e-9, **form, **masks)
            assert found.converged.all() and found.marginal_error.max() <= 1e-5
            assert ((found.mass - expected.mass).abs() <= 1e-3 * expected.mass).all()
            assert ((found.cost - expected.cost).abs() <= 1e-4 * expected.cost + 1e-7).all()
            if masks:
                assert (found.plan[~(row_mask[:, :, None] & col_mask[:, None, :])] == 0).all()


@pytest.mark.parametrize("penalty", [0.2, 0.6, 2.0])
def test_compiled_loops_agree_under_a_penalty(penalty):
    cost = costs("lowd", 3, 30, 20)
    found = partial_optimal_transport(cost.float(), method="numba", penalty=penalty)
    expected = partial_optimal_transport(cost, method="newton", penalty=penalty, tol=1e-9)
    assert found.converged.all()
    torch.testing.assert_close(found.plan.double(), expected.plan, atol=2e-5, rtol=0)


def test_newton_in_torch_takes_over_what_the_loops_leave(monkeypatch):
    monkeypatch.setattr(compiled, "LARGEST_NEWTON_SIDE", 4)
    cost = costs("matched", 4, 40, 24)
    found = partial_optimal_transport(cost.float(), 0.5, method="numba")
    expected = partial_optimal_transport(cost, 0.5, method="newton", tol=1e-9)
    assert found.converged.all()
    torch.testing.assert_close(found.cost.double(), expected.cost, rtol=1e-4, atol=0)


@pytest.mark.parametrize("gradient", ["envelope", "implicit"])
def test_gradients_agree(gradient):
    cost = costs("aligned", 3, 20, 12).float()
    gradients = []
    for method in ("numba", "newton"):
        leaf = cost.clone().requires_grad_()
        partial_optimal_transport(leaf, 0.6, method=method, gradient=gradient).cost.sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=0)


def test_auto_takes_the_loops_once_they_are_compiled(monkeypatch):
    cost = costs("aligned", 2, 20, 12).float()
    partial_optimal_transport(cost, method="numba")
    assert compiled.is_ready()
    calls = []
    solve = compiled.solve_compiled
    monkeypatch.setattr(compiled, "solve_compiled", lambda *a, **k: calls.append(1) or solve(*a, **k))
    partial_optimal_transport(cost)
    assert calls == [1]
    partial_optimal_transport(cost.double())  # float64 is torch's
    assert calls == [1]


def test_auto_does_not_wait_for_the_compiler(monkeypatch):
    started = []
    monkeypatch.setattr(compiled, "is_ready", lambda: False)
    monkeypatch.setattr(compiled, "compile_now", lambda: started.append(1))
    monkeypatch.setattr(fast, "_threads", [])
    cost = costs("aligned", 2, 20, 12).float()
    first, second = partial_optimal_transport(cost), partial_optimal_transport(cost)
    for thread in fast._threads:
        thread.join()
    assert started == [1]
    assert first.converged.all() and torch.equal(first.cost, second.cost)


def test_the_background_compilation_works():
    compiled.compile_now()
    assert compiled.is_ready()


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match="in float32"):
        partial_optimal_transport(torch.rand(3, 2).double(), method="numba")
    with pytest.raises(ValueError, match="at most 42"):
        partial_optimal_transport(torch.rand(3, 2), method="numba", reg=1e-3)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(fast, "is_installed", lambda package: False)
    for method in ("numba", "triton"):
        with pytest.raises(ImportError, match=f"needs {method}"):
            partial_optimal_transport(torch.rand(3, 2), method=method)
    assert partial_optimal_transport(torch.rand(3, 2)).converged


def test_the_benchmark_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples" / "benchmarks"))
    import transport as benchmark

    with warnings.catch_warnings():
        benchmark.main(["--quick", "--repeats", "1", "--output", str(tmp_path / "out")])
    assert "torch Newton" in capsys.readouterr().out
    assert (tmp_path / "out.json").exists() and (tmp_path / "out.md").exists()
