"""Gradients of the transport cost: envelope, implicit and unrolled, against finite differences and each other."""

import pytest
import torch
from problems import costs

from peft_read.transport import cosine_cost, partial_optimal_transport

FORMS = pytest.mark.parametrize(
    "form",
    [{"mass": 0.5}, {"mass": 0.9}, {"mass": 1.0}, {"penalty": 0.2}, {"mass": 0.7, "marginals": "count"}],
    ids=str,
)
SIDES = pytest.mark.parametrize("shape", [(6, 4), (4, 6)], ids=str)


def gradient_of(cost, function):
    cost = cost.clone().requires_grad_()
    return torch.autograd.grad(function(cost), cost)[0]


@FORMS
@SIDES
def test_the_envelope_gradient_is_that_of_the_regularised_value(form, shape):
    cost = costs("lowd", 1, *shape)
    plan = partial_optimal_transport(cost, method="newton", tol=1e-11, **form)
    gradient = gradient_of(cost, lambda c: partial_optimal_transport(c, method="newton", tol=1e-11, **form).cost.sum())
    torch.testing.assert_close(gradient, plan.plan, rtol=0, atol=0)

    def value(c):
        actual = partial_optimal_transport(c, method="newton", tol=1e-11, **form)
        entropy = torch.special.xlogy(actual.plan, actual.plan) - actual.plan
        reward = -form["penalty"] * actual.plan if "penalty" in form else 0
        if "penalty" in form:  # the entropy is relative to the reference 1 / (N M)
            entropy = entropy + actual.plan * torch.tensor(float(shape[0] * shape[1])).log()
        return (actual.plan * c + 0.05 * entropy + reward).sum()

    direction = torch.randn_like(cost)
    difference = (value(cost + 1e-5 * direction) - value(cost - 1e-5 * direction)) / 2e-5
    torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-6, atol=1e-9)


@FORMS
@SIDES
def test_the_implicit_gradient_is_that_of_cost_and_plan(form, shape):
    cost = costs("lowd", 1, *shape).requires_grad_()

    def both(c):
        actual = partial_optimal_transport(c, method="newton", gradient="implicit", tol=1e-11, **form)
        return actual.cost, actual.plan

    assert torch.autograd.gradcheck(both, cost, eps=1e-5, atol=1e-5)


@FORMS
def test_the_implicit_gradient_equals_the_unrolled_one(form):
    cost = costs("aligned", 2, 8, 5)
    implicit, unrolled = (
        gradient_of(
            cost,
            lambda c, how=how: partial_optimal_transport(c, gradient=how, tol=1e-10, **form).cost.sum(),
        )
        for how in ("implicit", "unrolled")
    )
    torch.testing.assert_close(implicit, unrolled, rtol=0, atol=1e-8)


@pytest.mark.parametrize("gradient", ["envelope", "implicit"])
def test_second_derivatives_are_an_error_where_they_would_be_wrong(gradient):
    states = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    cost = cosine_cost(states, torch.randn(4, 3, dtype=torch.float64))  # curved, so that a second derivative comes out
    value = partial_optimal_transport(cost, 0.5, method="newton", gradient=gradient).cost
    (first,) = torch.autograd.grad(value, states, create_graph=True)
    with pytest.raises(RuntimeError, match=r'second derivative .* use gradient="unrolled"'):
        torch.autograd.grad(first.square().sum(), states)


def test_the_envelope_works_under_functional_gradients():
    states, words = torch.randn(5, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)

    def value(states):
        return partial_optimal_transport(cosine_cost(states, words), 0.5, method="newton").cost

    torch.testing.assert_close(torch.func.grad(value)(states), gradient_of(states, value))


def test_the_printed_algorithm_can_be_unrolled():
    cost = costs("aligned", 1, 6, 4).requires_grad_()

    def value(c):
        return partial_optimal_transport(c, method="paper", gradient="unrolled", max_iter=30).cost

    assert torch.autograd.gradcheck(value, cost, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("reg", [0.05, 0.0005])
@pytest.mark.parametrize("method", ["dykstra", "paper"])
def test_padding_leaves_unrolled_gradients_numbers(method, reg):
    """The logarithm of what padding sums to is infinite, and so would be its derivative."""
    cost = costs("aligned", 1, 6, 4).requires_grad_()
    masks = {"row_mask": torch.tensor([1, 1, 1, 0, 1, 1]), "col_mask": torch.tensor([1, 0, 1, 1])}
    if method == "paper" and reg < 0.01:
        pytest.skip("the printed algorithm exponentiates the cost and refuses this temperature")

    def gradient(c, **masked):
        plan = partial_optimal_transport(c, reg=reg, method=method, gradient="unrolled", max_iter=30, **masked)
        return torch.autograd.grad(plan.cost.sum(), c)[0]

    found = gradient(cost, **masks)
    real = torch.tensor([0, 1, 2, 4, 5])[:, None], torch.tensor([0, 2, 3])
    known = gradient(cost.detach()[0][real][None].requires_grad_())
    torch.testing.assert_close(found[0][real][None], known)
    assert (found[0, 3] == 0).all() and (found[0, :, 1] == 0).all()


def test_the_envelope_keeps_nothing_but_the_plan():
    cost = torch.rand(4, 30, 12, requires_grad=True)
    kept = _numbers_kept(lambda: partial_optimal_transport(cost, method="newton"))
    unrolled = _numbers_kept(
        lambda: partial_optimal_transport(cost, method="paper", gradient="unrolled", max_iter=1000)
    )
    assert kept <= 2 * cost.numel()
    assert unrolled > 1000 * kept


def _numbers_kept(function):
    """How many numbers autograd keeps for the backward pass."""
    storages = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: storages.setdefault(tensor.untyped_storage().data_ptr(), tensor), lambda tensor: tensor
    ):
        function()
    return sum(tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_shapes_have_finite_gradients(dtype):
    video = torch.randn(2, 3, 12, 8, dtype=dtype, requires_grad=True)
    language = torch.randn(2, 3, 7, 8, dtype=dtype, requires_grad=True)
    mask = torch.ones(3, 12)
    mask[1, 5:] = 0
    mask[2] = 0
    plan = partial_optimal_transport(cosine_cost(video, language, mask), row_mask=mask)
    (plan.cost / 0.5).mean().backward()
    assert video.grad.dtype == dtype and video.grad.isfinite().all() and language.grad.isfinite().all()
    assert (video.grad[:, mask == 0] == 0).all() and (video.grad[:, mask == 1].abs().sum(-1) > 0).all()
