"""Partial optimal transport: known plans, agreement of the solvers, accuracy on hard and degenerate problems."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import FAMILIES, costs, ragged_masks

from peft_read.transport import cosine_cost, partial, partial_optimal_transport
from peft_read.transport.arguments import check_device
from peft_read.transport.dykstra import solve_dykstra
from peft_read.transport.newton import solve_newton
from peft_read.transport.paper import printed_algorithm
from peft_read.transport.problem import Kernel, Problem

ot = pytest.importorskip("ot")
HARD = ("aligned", "matched", "lowd", "one_hot")
MASSES = (0.1, 0.5, 0.9, 0.999, 1.0)


def solve(cost, mass=0.5, **options):
    return partial_optimal_transport(cost, mass, **{"method": "newton", **options})


def precise(cost, mass=0.5, **options):
    return solve(cost.double(), mass, tol=1e-9, **options)


def assert_accurate(plan, reference, *, cost_error=1e-4):
    assert plan.converged.all() and reference.converged.all()
    assert plan.marginal_error.max() <= 1e-5
    assert ((plan.mass - reference.mass).abs() <= 1e-3 * reference.mass).all()
    assert ((plan.cost - reference.cost).abs() <= cost_error * reference.cost + 1e-8).all()


# Known answers


def test_two_by_two_moves_the_cheapest_pair():
    plan = solve(torch.tensor([[0.0, 1.0], [1.0, 0.2]]), 0.5, reg=0.01)
    torch.testing.assert_close(plan.plan, torch.tensor([[0.5, 0.0], [0.0, 0.0]]), atol=1e-4, rtol=0)
    assert plan.cost < 1e-4


def test_equal_costs_spread_the_mass_evenly():
    plan = solve(torch.full((6, 4), 0.3), 0.8)
    torch.testing.assert_close(plan.plan, torch.full((6, 4), 0.8 / 24), rtol=1e-5, atol=0)
    torch.testing.assert_close(plan.cost, torch.tensor(0.24))


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1)])
@pytest.mark.parametrize("mass", [0.1, 0.5, 1.0])
def test_a_single_row_or_column(shape, mass):
    cost = torch.rand(shape, dtype=torch.float64)
    plan = solve(cost, mass, tol=1e-9)
    torch.testing.assert_close(plan.mass.item(), mass)
    weights = torch.exp(-cost / 0.05)
    if mass < 0.15:  # no capacity binds: a softmax
        torch.testing.assert_close(plan.plan, mass * weights / weights.sum())


def test_counting_marginals_give_a_row_at_most_one_column():
    cost = 1 - torch.eye(6, 4, dtype=torch.float64)
    plan = solve(cost, 0.5, marginals="count", reg=0.02)
    torch.testing.assert_close(plan.mass.item(), 2.0)
    torch.testing.assert_close(plan.plan, torch.eye(6, 4, dtype=torch.float64) / 2, atol=1e-4, rtol=0)


def test_a_penalty_moves_what_is_cheaper_than_it():
    cost = torch.tensor([[0.1, 2.0, 2.0], [2.0, 0.2, 2.0], [2.0, 2.0, 1.9]], dtype=torch.float64)
    plan = solve(cost, penalty=1.0, reg=0.01)
    torch.testing.assert_close(plan.mass.item(), 2 / 3, atol=1e-3, rtol=0)
    with_everything = solve(cost, penalty=4.0, reg=0.01)
    torch.testing.assert_close(with_everything.mass.item(), 1.0, atol=1e-3, rtol=0)


# Agreement


@pytest.mark.parametrize("family", ["aligned", "lowd", "grid"])
@pytest.mark.parametrize("mass", [0.3, 0.8])
def test_agrees_with_pot(family, mass):
    cost = costs(family, 2, 20, 12)
    plan, swept = precise(cost, mass), solve(cost, mass, method="dykstra", tol=1e-9)
    for number in range(len(cost)):
        expected = ot.partial.entropic_partial_wasserstein(
            np.full(20, 1 / 20), np.full(12, 1 / 12), cost[number].numpy(), 0.05, m=mass, numItermax=4000
        )
        np.testing.assert_allclose(plan.plan[number], expected, atol=1e-6)
        np.testing.assert_allclose(swept.plan[number], expected, atol=1e-6)


@pytest.mark.parametrize("family", ["aligned", "matched", "lowd"])
def test_all_of_the_mass_is_balanced_sinkhorn(family):
    cost = costs(family, 2, 20, 12)
    plan = precise(cost, 1.0)
    for number in range(len(cost)):
        expected = ot.sinkhorn(
            np.full(20, 1 / 20), np.full(12, 1 / 12), cost[number].numpy(), 0.05, numItermax=20_000, stopThr=1e-12
        )
        np.testing.assert_allclose(plan.plan[number], expected, atol=1e-6)


@pytest.mark.parametrize("n_iter", [1, 7, 50])
def test_dykstra_is_the_iteration_of_pot(n_iter):
    cost = costs("lowd", 1, 15, 9)
    rows, cols = torch.full((1, 15), 1 / 15).double(), torch.full((1, 9), 1 / 9).double()
    total, no = torch.tensor([0.7], dtype=torch.float64), torch.zeros(1, dtype=torch.bool)
    problem = Problem(cost, rows, cols, total, cost.amin((1, 2)), cost.amax((1, 2)), 0.05, None, 40.0, False, no, no)
    kernel = Kernel(problem, torch.float64, False)
    actual = solve_dykstra(problem, kernel, tol=0, max_iter=n_iter)
    expected = ot.partial.entropic_partial_wasserstein(
        rows[0].numpy(), cols[0].numpy(), cost[0].numpy(), 0.05, m=0.7, numItermax=n_iter
    )
    np.testing.assert_allclose(kernel.plan(actual.log_left, actual.log_right)[0], expected, atol=1e-14)


@pytest.mark.parametrize("options", [{"mass": 0.6}, {"mass": 1.0}, {"penalty": 0.3}, {"marginals": "count"}])
def test_newton_and_dykstra_agree(options):
    cost = costs("lowd", 3, 18, 11)
    newton, dykstra = precise(cost, **options), solve(cost, method="dykstra", tol=1e-8, **options)
    torch.testing.assert_close(newton.plan, dykstra.plan, atol=1e-7, rtol=0)


def test_logarithms_and_exponentials_agree():
    cost = costs("lowd", 3, 18, 11)
    rows, cols = torch.full((3, 18), 1 / 18).double(), torch.full((3, 11), 1 / 11).double()
    no = torch.zeros(3, dtype=torch.bool)
    problem = Problem(
        cost,
        rows,
        cols,
        torch.full((3,), 0.7).double(),
        cost.amin((1, 2)),
        cost.amax((1, 2)),
        0.05,
        None,
        40.0,
        False,
        no,
        no,
    )
    plans = []
    for log_domain in (False, True):
        kernel = Kernel(problem, torch.float64, log_domain)
        actual = solve_newton(problem, kernel, tol=1e-11, max_iter=50)
        assert actual.converged.all()
        plans.append(kernel.plan(actual.log_left, actual.log_right))
    torch.testing.assert_close(*plans, atol=1e-11, rtol=0)


@pytest.mark.parametrize("mass", [0.3, 0.8, 1.0])
def test_small_temperatures_approach_the_linear_programme(mass):
    cost = costs("lowd", 3, 12, 9)
    exact = solve(cost, mass, method="exact")
    for reg, gap in ((0.05, 0.1), (1e-3, 1e-2)):  # the second one needs logarithms
        plan = precise(cost, mass, reg=reg)
        assert plan.converged.all()
        assert (plan.cost >= exact.cost * (1 - 1e-7)).all()
        assert (plan.cost <= exact.cost + gap).all()


# The paper's algorithm


def test_the_loop_over_s_of_the_printed_algorithm_changes_no_bit():
    cost = costs("aligned", 1, 9, 5).float()
    rows, cols = torch.full((1, 9), 1 / 9), torch.full((1, 5), 1 / 5)
    value = torch.tensor(float("inf"))
    for _s in range(1, min(9, 5) + 1):
        value = torch.minimum(value, (printed_algorithm(cost, rows, cols, 0.05, 40) * cost).sum())
    one_pass = solve(cost - cost.amin(), method="paper", max_iter=40)
    assert value == (printed_algorithm(cost, rows, cols, 0.05, 40) * cost).sum()
    torch.testing.assert_close((one_pass.plan * cost).sum(), value)
    assert one_pass.n_iter.item() == 40


def test_the_printed_algorithm_moves_everything_for_any_mass():
    cost = costs("aligned", 2, 20, 12)
    plan, balanced = solve(cost, 0.3, method="paper"), precise(cost, 1.0)
    torch.testing.assert_close(plan.mass, torch.ones(2).double())
    torch.testing.assert_close(plan.cost, balanced.cost, rtol=1e-3, atol=0)
    assert (plan.n_iter == 1000).all()


# Hard problems


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("shape", [(4, 75, 32), (2, 20, 64), (3, 10, 10)])
def test_newton_is_accurate_in_float32(family, shape):
    cost, (row_mask, col_mask) = costs(family, *shape), ragged_masks(*shape)
    for mass in MASSES:
        for masks in ({}, {"row_mask": row_mask, "col_mask": col_mask}):
            plan = solve(cost.float(), mass, **masks)
            assert_accurate(plan, precise(cost, mass, **masks))
            assert plan.n_iter.max() <= 20


@pytest.mark.parametrize("family", HARD)
def test_newton_is_accurate_on_large_problems(family):
    cost = costs(family, 1, 300, 128)
    for mass in (0.5, 0.95, 1.0):
        plan = solve(cost.float(), mass)
        assert_accurate(plan, precise(cost, mass))
        assert plan.n_iter.max() <= 20


@pytest.mark.parametrize("family", HARD)
@pytest.mark.parametrize("penalty", [0.2, 1.0, 2.0])
def test_penalties_on_hard_problems(family, penalty):
    cost = costs(family, 3, 40, 24)
    plan = solve(cost.float(), penalty=penalty)
    reference = precise(cost, penalty=penalty)
    assert plan.converged.all() and plan.n_iter.max() <= 20
    torch.testing.assert_close(plan.plan.double(), reference.plan, atol=1e-5, rtol=0)


def test_half_precision_is_solved_in_float32_also_under_autocast():
    cost = costs("aligned", 2, 20, 12).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plan = solve(cost, 0.6)
    assert plan.cost.dtype == plan.plan.dtype == torch.float32
    assert_accurate(plan, precise(cost, 0.6))


def test_float64_stays_float64():
    plan = solve(costs("aligned", 2, 20, 12), 0.6)
    assert plan.cost.dtype == plan.plan.dtype == torch.float64


# Shapes, masks, weights


def test_any_leading_shape_and_a_mass_for_each_problem():
    cost = costs("lowd", 6, 15, 9).reshape(2, 3, 15, 9)
    mass = torch.tensor([0.2, 0.6, 1.0])
    plan = precise(cost, mass)
    torch.testing.assert_close(plan.mass, mass.double().expand(2, 3))
    for block in range(2):
        for number in range(3):
            alone = precise(cost[block, number], mass[number].item())
            torch.testing.assert_close(alone.plan, plan.plan[block, number], atol=1e-9, rtol=0)
            assert alone.cost.shape == ()


@pytest.mark.parametrize("method", ["newton", "dykstra", "paper", "exact"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.bfloat16])
def test_padding_is_invisible(method, dtype):
    cost, (row_mask, col_mask) = costs("lowd", 4, 14, 9), ragged_masks(4, 14, 9)
    real = row_mask[:, :, None] & col_mask[:, None, :]
    poisoned = torch.where(real, cost, torch.nan)
    plan = solve(poisoned, 0.7, row_mask=row_mask.to(dtype), col_mask=col_mask.to(dtype), method=method, tol=1e-9)
    assert (plan.plan[~real] == 0).all()
    for number in range(4):
        n, m = int(row_mask[number].sum()), int(col_mask[number].sum())
        alone = solve(cost[number, :n, :m], 0.7, method=method, tol=1e-9)
        torch.testing.assert_close(plan.plan[number, :n, :m], alone.plan, atol=1e-9, rtol=0)
        torch.testing.assert_close(plan.cost[number], alone.cost)


@pytest.mark.parametrize("mask", [torch.ones(2, 1), torch.ones(()), torch.ones(1, 1)], ids=["rows", "scalar", "one"])
def test_a_mask_that_is_broadcast_over_its_side_gives_the_same_capacities(mask):
    cost = costs("lowd", 2, 5, 4)
    expected = solve(cost, 0.5)
    for side in ("row", "col"):
        actual = solve(cost, 0.5, **{f"{side}_mask": mask})
        torch.testing.assert_close(actual.plan, expected.plan)
    weights = mask.double() / 5  # as many rows, each of a fifth
    torch.testing.assert_close(solve(cost, 0.5, row_weights=weights).plan, expected.plan)


def test_a_device_without_float64_is_named():
    with pytest.raises(ValueError, match=r"float64, which MPS does not have: .*\.cpu\(\)"):
        check_device(torch.device("mps"))


def test_holes_in_the_mask_are_padding_too():
    cost = costs("lowd", 1, 14, 9)
    kept = torch.arange(14) % 3 != 1
    plan = precise(cost, 0.7, row_mask=kept)
    torch.testing.assert_close(plan.plan[:, kept], precise(cost[:, kept], 0.7).plan, atol=1e-9, rtol=0)


@pytest.mark.parametrize("method", ["newton", "dykstra", "paper", "exact", "auto"])
def test_problems_of_padding_only_cost_nothing(method):
    cost = torch.rand(3, 6, 4, requires_grad=True)
    row_mask = torch.ones(3, 6)
    row_mask[1] = 0
    plan = solve(cost, row_mask=row_mask, method=method)
    plan.cost.sum().backward()
    assert plan.cost[1] == 0 and plan.mass[1] == 0 and plan.converged[1]
    assert (cost.grad[1] == 0).all() and (cost.grad[0] != 0).any()


@pytest.mark.parametrize("shape", [(0, 6, 4), (2, 0, 4), (2, 6, 0)])
def test_empty_problems(shape):
    cost = torch.rand(shape, requires_grad=True)
    plan = solve(cost)
    plan.cost.sum().backward()
    assert plan.cost.shape == shape[:1] and plan.plan.shape == shape and (plan.cost == 0).all()


def test_weights_are_capacities():
    cost = costs("lowd", 2, 14, 9)
    rows, cols = torch.rand(2, 14).double(), torch.rand(9).double() + 0.1
    rows[0, :3] = 0
    plan = precise(cost, 0.8, row_weights=rows, col_weights=cols)
    smaller = torch.minimum(rows.sum(-1), cols.sum())
    torch.testing.assert_close(plan.mass, 0.8 * smaller)
    assert (plan.plan.sum(-1) <= rows + 1e-9).all() and (plan.plan.sum(-2) <= cols + 1e-9).all()
    assert (plan.plan[0, :3] == 0).all()


# Properties


problem_strategy = st.tuples(
    st.integers(1, 12), st.integers(1, 12), st.sampled_from(sorted(FAMILIES)), st.floats(0.05, 1), st.integers(0, 99)
)


@settings(max_examples=40, deadline=None)
@given(problem_strategy)
def test_plans_are_feasible_and_no_better_than_the_linear_programme(drawn):
    n, m, family, mass, seed = drawn
    cost = costs(family, 1, n, m, seed)
    plan = precise(cost, mass)
    assert (plan.plan >= 0).all() and plan.converged.all() and plan.marginal_error.max() <= 1e-9
    torch.testing.assert_close(plan.mass.item(), mass, rtol=1e-6, atol=0)
    assert plan.cost.item() >= solve(cost, mass, method="exact").cost.item() - 1e-7


@settings(max_examples=12, deadline=None)
@given(problem_strategy)
def test_values_are_convex_in_the_mass(drawn):
    n, m, family, _, seed = drawn
    masses = torch.linspace(0.1, 1, 7, dtype=torch.float64)
    cost = costs(family, 1, n, m, seed).expand(7, n, m)
    exact = solve(cost, masses, method="exact").cost
    plan = precise(cost, masses).plan
    entropy = torch.special.xlogy(plan, plan) - plan
    regularised = (plan * cost + 0.05 * entropy).sum((-2, -1))
    assert (exact.diff() >= -1e-9).all() and (exact.diff(n=2) >= -1e-9).all()
    assert (regularised.diff(n=2) >= -1e-7).all()


@settings(max_examples=12, deadline=None)
@given(problem_strategy)
def test_permutations_carry_through(drawn):
    n, m, family, mass, seed = drawn
    cost = costs(family, 1, n, m, seed)
    rows, cols = torch.randperm(n), torch.randperm(m)
    permuted = precise(cost[:, rows][:, :, cols], mass)
    torch.testing.assert_close(permuted.plan, precise(cost, mass).plan[:, rows][:, :, cols], atol=1e-7, rtol=0)


# Failures and extremes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cost": torch.tensor([[0.0, torch.nan]])}, "cost must be finite"),
        ({"cost": torch.tensor([[0.0, torch.inf]])}, "cost must be finite"),
        ({"cost": torch.zeros(3, 2, dtype=torch.long)}, "cost must be a floating-point tensor"),
        ({"mass": 0.0}, r"mass must be in \(0, 1\]"),
        ({"mass": 1.5}, r"mass must be in \(0, 1\].* 1.5"),
        ({"mass": torch.tensor([0.5, 0.5, 0.5])}, "mass must be a number or broadcast"),
        ({"reg": 0.0}, "reg must be a finite number above 0"),
        ({"reg": 1e-6}, "reg=1e-06 is too small for a cost that ranges over"),
        ({"tol": -1.0}, "tol must be"),
        ({"max_iter": 0}, "max_iter must be"),
        ({"penalty": float("nan")}, "penalty must be"),
        ({"method": "simplex"}, "method must be one of"),
        ({"method": "numba"}, r'not an algorithm but an implementation.*use_backend\("numba"\)'),
        ({"method": "triton"}, "PEFT_READ_BACKEND=triton"),
        ({"row_weights": torch.full((3,), 1e-300, dtype=torch.float64)}, "cannot hold it"),
        (
            {"row_weights": torch.full((3,), 3e38), "col_weights": torch.full((2,), 3e38), "mass": 1.0},
            "cannot hold it",
        ),
        ({"cost": torch.full((1, 3, 2), 1e-39)}, "cannot hold it"),
        ({"gradient": "none"}, "gradient must be one of"),
        ({"marginals": "sum"}, "marginals must be one of"),
        ({"row_weights": torch.tensor([-1.0, 1.0, 1.0])}, "row_weights must be finite and at least 0"),
        ({"col_weights": torch.zeros(2)}, "col_weights sums to zero"),
        ({"row_weights": torch.ones(2)}, r"row_weights must be a real tensor of shape \(1, 3\)"),
        ({"row_weights": torch.ones(3), "marginals": "count"}, "row_weights cannot be given"),
        ({"row_mask": torch.ones(2)}, r"row_mask must be a tensor of shape \(1, 3\)"),
        ({"col_mask": torch.ones(2, dtype=torch.complex64)}, "col_mask must be boolean"),
        ({"row_mask": torch.tensor([0.0, 0.0, -1e9])}, "not a mask to be added"),
        ({"method": "paper", "penalty": 0.5}, "takes neither"),
        ({"method": "newton", "gradient": "unrolled"}, "needs method"),
        ({"method": "exact", "gradient": "implicit"}, "piecewise constant"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        partial_optimal_transport(**{"cost": torch.rand(1, 3, 2), **options})


def test_weights_of_any_size_scale_the_plan():
    cost, rows, cols = costs("lowd", 2, 9, 6), torch.rand(9).double() + 0.1, torch.rand(6).double() + 0.1
    expected = precise(cost, 0.6, row_weights=rows, col_weights=cols)
    for size in (1e-250, 1e-30, 1e30, 1e250):
        actual = precise(cost, 0.6, row_weights=size * rows, col_weights=size * cols)
        assert actual.converged.all()
        torch.testing.assert_close(actual.plan / size, expected.plan, rtol=1e-9, atol=1e-12)


def test_a_cost_far_beyond_the_temperature_is_solved():
    cost = torch.tensor([[0.0, 1.0]])
    for method in ("newton", "dykstra", "auto"):
        for reg in (0.05, 0.001):
            plan = solve(cost, 0.8, reg=reg, method=method)
            assert plan.converged
            torch.testing.assert_close(plan.mass, torch.tensor(0.8), rtol=1e-3, atol=0)
            torch.testing.assert_close(plan.cost, torch.tensor(0.3), rtol=1e-3, atol=0)


def test_converged_is_computed_from_the_plan_and_not_taken_from_the_solver(monkeypatch):
    cost = costs("lowd", 2, 9, 6).float()
    honest = partial.solve_newton

    def boastful(which, change):
        def solver(*arguments, **options):
            actual = honest(*arguments, **options)
            return dataclasses.replace(actual, **{which: getattr(actual, which) + change})

        return solver

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for which, change in (
            ("log_left", 0.01),  # too much everywhere
            ("log_left", -0.01),  # too little mass
            ("log_right", 0.3 * torch.randn(2, 6)),  # another plan
        ):
            monkeypatch.setattr(partial, "solve_newton", boastful(which, change))
            assert not solve(cost, 0.7).converged.any(), which
    monkeypatch.setattr(partial, "solve_newton", honest)
    assert solve(cost, 0.7).converged.all()


def an_extreme_problem(seed):
    """A random small problem at an extreme of size, range, temperature, mass, weights or form: (cost, options)."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (1,), generator=generator))]

    n, m = pick(1, 2, 3, 7, 16), pick(1, 2, 3, 5, 12)
    cost = costs(pick(*sorted(FAMILIES)), 1, n, m, seed) * pick(1e-39, 1e-10, 1.0, 1.0, 1e3, 1e30)
    cost = (cost + pick(0.0, 0.0, -5.0)).float()
    spread = float(cost.double().amax() - cost.double().amin()) or 1.0
    options = {"reg": max(spread / pick(0.5, 5, 20, 40, 100, 400, 800, 2000, 9000), 1e-300)}
    options["mass"] = pick(0.05, 0.3, 0.5, 0.8, 0.999, 1.0)
    form = pick("plain", "plain", "weights", "uneven", "count", "penalty")
    if form in ("weights", "uneven"):
        rows, cols = (torch.rand(size, generator=generator).double() + 0.01 for size in (n, m))
        if form == "uneven":
            rows[0], cols[-1] = rows[0] * 1e-12, cols[-1] * 1e-12
        size = pick(1e-300, 1e-30, 1.0, 1e30, 3e38)
        options |= {"row_weights": size * rows, "col_weights": size * cols}
    elif form == "count":
        options["marginals"] = "count"
    elif form == "penalty":
        options["penalty"] = float(cost.double().mean())
    return cost, spread, options


@pytest.mark.slow
@pytest.mark.parametrize("method", ["newton", "auto", "dykstra"])
@pytest.mark.parametrize("part", range(4))
def test_what_converged_is_right_at_every_extreme(method, part):
    solved = 0
    for seed in range(500 * part, 500 * (part + 1)):
        cost, spread, options = an_extreme_problem(seed)
        limit = {"max_iter": 3000} if method == "dykstra" else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                plan = solve(cost, method=method, **limit, **options)
            except ValueError as error:
                assert "cannot hold it" in str(error), seed
                continue
            exact = solve(cost.double(), tol=1e-10, **options)
        if not plan.converged.all() or not exact.converged.all():
            continue
        solved += 1
        assert plan.marginal_error.double() <= 1e-5 * exact.mass.clamp_min(1), seed
        assert (plan.mass.double() - exact.mass).abs() <= 1e-3 * exact.mass, seed
        scale = torch.maximum(exact.cost.abs(), 0.01 * spread * exact.mass)
        rounding = 1e-6 * cost.abs().amax() * exact.mass  # of float32, where all costs share their first digits
        assert (plan.cost.double() - exact.cost).abs() <= 1e-4 * scale + rounding, seed
    assert solved >= (150 if method == "dykstra" else 300)


def test_a_problem_that_does_not_converge_warns_once(monkeypatch):
    monkeypatch.setattr(partial, "_warned", False)
    cost = costs("matched", 2, 40, 24)
    with pytest.warns(RuntimeWarning, match="did not reach the tolerance"):
        plan = solve(cost, 0.8, max_iter=1)
    assert not plan.converged.all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve(cost, 0.8, max_iter=1)


def test_costs_feed_the_solver():
    video, language = torch.randn(2, 7, 16), torch.randn(2, 5, 16)
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    plan = partial_optimal_transport(cosine_cost(video, language, None, mask), col_mask=mask)
    assert plan.converged.all() and plan.plan.shape == (2, 7, 5)


@pytest.mark.parametrize("method", ["auto", "newton", "dykstra"])
def test_what_is_wrong_shows_in_the_result_where_values_are_not_looked_at(method, monkeypatch):
    """As on a device, for the problems that its kernel does not take."""
    for name in ("checked_weights", "checked_fraction"):  # which on the CPU look at the values
        real = getattr(partial, name)
        monkeypatch.setattr(partial, name, lambda *taken, real=real: real(*taken[:-1], False))
    monkeypatch.setattr(partial, "_warned", True)
    cost, wrong = torch.rand(2, 4, 3), [True, False]
    additive = torch.tensor([[0.0, 0.0, -1e9, 0.0], [1.0] * 4])
    weights = torch.tensor([[1.0, -1.0, 1.0, 1.0], [1.0] * 4])
    masses = torch.tensor([1.5, 0.5])
    for bad in ({"row_mask": additive}, {"row_weights": weights}, {"mass": masses}):
        found = partial_optimal_transport(cost, method=method, **bad)
        assert found.cost.isnan().tolist() == wrong and found.plan.isnan().all((1, 2)).tolist() == wrong
        assert not found.converged[0] and found.converged[1]


@pytest.mark.parametrize("method", ["auto", "newton", "dykstra"])
@pytest.mark.parametrize("reg", [0.05, 0.0005])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_scalings_of_padding_are_nothing(method, reg, shape, monkeypatch):
    """What judges a plan takes the largest scaling of a side for that of a real row or column."""
    seen, judge = [], partial.keeps_promises

    def looking(problem, plan, scaling, tol):
        seen.append(scaling)
        return judge(problem, plan, scaling, tol)

    monkeypatch.setattr(partial, "keeps_promises", looking)
    rows, cols = torch.arange(shape[0]) != 1, torch.arange(shape[1]) != 2
    partial_optimal_transport(torch.rand(3, *shape), reg=reg, method=method, row_mask=rows, col_mask=cols)
    for found, real in ((seen[0].log_left, rows), (seen[0].log_right, cols)):
        assert (found[:, ~real] == -torch.inf).all() and found[:, real].isfinite().all()
