"""Down and Up of an adapter in interchangeable forms: linear, a sum of Kronecker products, a low-rank product."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["LentRule", "LowRankLinear", "PHMLinear", "Rule", "reset_linear"]

RULE_DEVIATION = 0.01  # of the original's rules


class Rule(nn.Module):
    """The rules A (n, n, n) of a sum of n Kronecker products."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n, n, n))

    def reset_parameters(self, init_weights: bool | str) -> None:
        """N(0, 0.01) as the original draws them, or N(0, 1/√n), which makes the sum as large as one B_i."""
        nn.init.normal_(self.weight, std=RULE_DEVIATION if init_weights == "original" else len(self.weight) ** -0.5)

    def forward(self, factor: Tensor) -> Tensor:
        """H (d, e) = Σ_i A_i ⊗ B_i, in a call: for its time alone FSDP and offloading put the weight in its place.

        Args:
            factor: the B_i (n, d/n, e/n).
        """
        rule = self.weight.to(factor)  # a shared rule has one dtype, the layers of the base may have several
        n, inputs, outputs = factor.shape
        products = rule.flatten(1).T @ factor.flatten(1)  # Σ_i A_i[p, q] B_i[a, c] at (p, q), (a, c)
        return products.view(n, n, inputs, outputs).transpose(1, 2).reshape(n * inputs, n * outputs)


class LentRule:
    """Rules that another module holds and several share.

    They are looked up at each use, since FSDP puts a wrapper in the place of a module.

    Args:
        owner: the module that holds them.
        name: of its child.
    """

    def __init__(self, owner: nn.Module, name: str) -> None:
        self.owner = owner
        self.name = name

    def module(self) -> Any:
        """The rules, or a wrapper around them."""
        return getattr(self.owner, self.name)


class PHMLinear(nn.Module):
    """x (..., d) -> x H + b with H = Σ_i A_i ⊗ B_i (d, e), the parameterised hypercomplex multiplication.

    From "Beyond Fully-Connected Layers with Quaternions" (arXiv 2102.08597) and Compacter (arXiv 2106.04647): row
    p·d/n + a, column q·e/n + c of H is Σ_i A_i[p, q] B_i[a, c].

    Args:
        in_features: d.
        out_features: e.
        n: the number of products, which divides both.
        rank: of the B_i, which are then products left (d/n, rank) right (rank, e/n); full if None.
        lent: the rules, if they are shared and stored elsewhere; its own if None.
    """

    def __init__(
        self, in_features: int, out_features: int, *, n: int, rank: int | None, lent: LentRule | None = None
    ) -> None:
        super().__init__()
        inputs, outputs = in_features // n, out_features // n
        if rank is None:
            self.weight = nn.Parameter(torch.empty(n, inputs, outputs))
        else:
            self.left = nn.Parameter(torch.empty(n, inputs, rank))
            self.right = nn.Parameter(torch.empty(n, rank, outputs))
        self.bias = nn.Parameter(torch.empty(out_features))
        self.lent = lent
        if lent is None:
            self._modules["rule"] = Rule(n)  # lent ones are stored, moved and saved once, where they belong

    @property
    def rule(self) -> Any:
        """Its own rules, or the lent ones."""
        return self._modules["rule"] if self.lent is None else self.lent.module()

    def reset_parameters(self, init_weights: bool | str, *, zero: bool) -> None:
        """B_i Glorot uniform times √2, biases zero, rules as `Rule` says; the last factor is zero where asked."""
        if self.lent is None:
            self.rule.reset_parameters(init_weights)
        factors: list[Any] = [self.left, self.right] if "left" in self._parameters else [self.weight]
        for factor in factors:
            _glorot(factor, math.sqrt(2))
        if zero:
            nn.init.zeros_(factors[-1])
        nn.init.zeros_(self.bias)

    def matrix(self) -> Tensor:
        """H (d, e)."""
        matrix: Tensor = self.rule(self.left @ self.right if "left" in self._parameters else self.weight)
        return matrix

    def forward(self, x: Tensor) -> Tensor:
        """X H + b."""
        return F.linear(x, self.matrix().T, self.bias)

    def extra_repr(self) -> str:
        """The sizes of the factors."""
        shapes = [f"{name}={tuple(parameter.shape)}" for name, parameter in self.named_parameters(recurse=False)]
        return ", ".join(shapes)


class LowRankLinear(nn.Module):
    """x (..., d) -> x left right + b, with left (d, rank) and right (rank, e).

    Args:
        in_features: d.
        out_features: e.
        rank: of the product.
    """

    def __init__(self, in_features: int, out_features: int, *, rank: int) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.empty(in_features, rank))
        self.right = nn.Parameter(torch.empty(rank, out_features))
        self.bias = nn.Parameter(torch.empty(out_features))

    def reset_parameters(self, init_weights: bool | str, *, zero: bool) -> None:
        """Both factors Glorot uniform times √2, biases zero; the right factor is zero where asked."""
        _glorot(self.left, math.sqrt(2))
        if zero:
            nn.init.zeros_(self.right)
        else:
            _glorot(self.right, math.sqrt(2))
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """X left right + b."""
        return F.linear(x @ self.left, self.right.T, self.bias)

    def extra_repr(self) -> str:
        """The sizes of the factors."""
        return f"left={tuple(self.left.shape)}, right={tuple(self.right.shape)}"


def _glorot(weight: Any, gain: float) -> None:
    """Uniform, with the bound of a matrix of the last two dimensions."""
    bound = gain * math.sqrt(6 / (weight.shape[-2] + weight.shape[-1]))
    nn.init.uniform_(weight, -bound, bound)


def reset_linear(linear: nn.Linear, init_weights: bool | str, *, zero: bool, deviation: float | None) -> None:
    """Initialise a full Down or Up.

    Args:
        linear: the layer.
        init_weights: "original" draws N(0, `deviation`) with zero biases, or torch's default where the base model has
            no deviation of its own; else Kaiming normal with zero biases.
        zero: set it to zero instead.
        deviation: of the base model's own linear layers, if it has one.
    """
    if zero:
        nn.init.zeros_(linear.weight)
    elif init_weights != "original":
        nn.init.kaiming_normal_(linear.weight)
    elif deviation is None:
        linear.reset_parameters()
        return
    else:
        nn.init.normal_(linear.weight, std=deviation)
    nn.init.zeros_(linear.bias)
