"""A layer that costs nothing, for measuring what an adapter costs around it."""

from torch import Tensor, nn


class FreeLinear(nn.Linear):
    """A linear layer's place without its cost."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class FreeModel(nn.Module):
    """What peft adapts: `fc2` of a width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc2 = FreeLinear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(x)
