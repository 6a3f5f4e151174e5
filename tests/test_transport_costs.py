"""Pairwise costs: known values, padding, zero vectors, precision."""

import pytest
import torch

from peft_read.transport import cosine_cost, squared_euclidean_cost

BOTH = pytest.mark.parametrize("function", [cosine_cost, squared_euclidean_cost])


def test_cosine_costs_are_one_minus_the_cosine():
    video, language = torch.randn(2, 3, 7, 16).double(), torch.randn(2, 3, 5, 16).double()
    expected = 1 - torch.nn.functional.cosine_similarity(video[..., :, None, :], language[..., None, :, :], dim=-1)
    torch.testing.assert_close(cosine_cost(video, language), expected)


def test_squared_euclidean_costs_are_squared_distances():
    video, language = torch.randn(2, 7, 16).double(), torch.randn(2, 5, 16).double()
    torch.testing.assert_close(squared_euclidean_cost(video, language), torch.cdist(video, language) ** 2)
    assert (squared_euclidean_cost(100 * video.float(), 100 * video.float()) >= 0).all()


@BOTH
def test_zero_vectors_have_finite_costs_and_gradients(function):
    video = torch.zeros(1, 2, 4, requires_grad=True)
    language = torch.randn(1, 3, 4, requires_grad=True)
    cost = function(video, language)
    cost.sum().backward()
    assert cost.isfinite().all() and video.grad.isfinite().all() and language.grad.isfinite().all()
    if function is cosine_cost:
        assert (cost == 1).all() and (video.grad == 0).all()


@BOTH
def test_padding_may_hold_anything_and_gets_no_gradient(function):
    clean, language = torch.randn(2, 4, 8), torch.randn(2, 3, 8)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    video = torch.where(mask[..., None] == 1, clean, torch.nan).requires_grad_()
    cost = function(video, language, mask)
    cost.sum().backward()
    assert cost.isfinite().all() and (video.grad[mask == 0] == 0).all() and (video.grad[mask == 1] != 0).all()
    torch.testing.assert_close(cost[0, :2], function(clean[0, :2], language[0]))


@BOTH
def test_half_precision_gives_float32_also_under_autocast(function):
    video, language = torch.randn(2, 4, 64).bfloat16(), torch.randn(2, 3, 64).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cost = function(video, language)
    assert cost.dtype == torch.float32
    torch.testing.assert_close(cost.double(), function(video.double(), language.double()), atol=1e-4, rtol=1e-5)


@BOTH
def test_gradients(function):
    video, language = torch.randn(2, 3, 4).double().requires_grad_(), torch.randn(2, 2, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(function, (video, language))


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_extreme_lengths_have_directions(scale):
    video = torch.tensor([[3.0, 4.0]]) * scale
    torch.testing.assert_close(cosine_cost(video, torch.tensor([[0.0, 1.0]])), torch.tensor([[0.2]]))


@BOTH
def test_bad_input_is_named(function):
    with pytest.raises(ValueError, match=r"same width.* 4 and 5"):
        function(torch.rand(2, 3, 4), torch.rand(2, 3, 5))
    with pytest.raises(ValueError, match="video must be a floating-point"):
        function(torch.ones(2, 3, 4, dtype=torch.long), torch.rand(2, 3, 4))
    with pytest.raises(ValueError, match="video_mask must be a tensor of shape"):
        function(torch.rand(2, 3, 4), torch.rand(2, 3, 4), torch.ones(2, 5))


def test_second_derivatives_at_a_zero_vector_are_zero():
    video = torch.randn(3, 4, requires_grad=True)
    with torch.no_grad():
        video[2] = 0
    first = torch.autograd.grad(cosine_cost(video, torch.randn(2, 4)).square().sum(), video, create_graph=True)[0]
    (second,) = torch.autograd.grad(first.square().sum(), video)
    assert second[:2].abs().max() > 0 and second.isfinite().all() and (second[2] == 0).all()
