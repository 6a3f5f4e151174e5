"""Transport problems to test with: families of cosine costs from easy to hard, and plans that are known by hand."""

import torch
from torch import Tensor

WIDTH = 64
TOPICS = 12


def iid(batch: int, n: int, m: int, generator: torch.Generator) -> Tensor:
    """Features without any relation: every cost is near 1."""
    return _cosine(_normal((batch, n, 256), generator), _normal((batch, m, 256), generator))


def aligned(batch: int, n: int, m: int, generator: torch.Generator) -> Tensor:
    """Tokens of twelve topics with noise; the video shows half of the topics only."""
    return _topics(batch, n, m, 1.0, generator)


def matched(batch: int, n: int, m: int, generator: torch.Generator) -> Tensor:
    """The same, nearly without noise: costs near 0 and near 1, what training drives towards. The hardest family."""
    return _topics(batch, n, m, 0.15, generator)


def lowd(batch: int, n: int, m: int, generator: torch.Generator) -> Tensor:
    """Directions in four dimensions: costs all over [0, 2]."""
    return _cosine(_normal((batch, n, 4), generator), _normal((batch, m, 4), generator))


def grid(batch: int, n: int, m: int, generator: torch.Generator) -> Tensor:
    """Only three different costs: most potentials tie."""
    return torch.randint(0, 3, (batch, n, m), generator=generator).double() / 2


def duplicates(batch: int, n: int, m: int, generator: torch.Generator) -> Tensor:
    """A few distinct tokens, each repeated many times."""
    rows = torch.randint(0, 4, (batch, n), generator=generator)
    cols = torch.randint(0, 3, (batch, m), generator=generator)
    base = torch.rand(batch, 4, 3, generator=generator, dtype=torch.float64)
    number = torch.arange(batch)[:, None, None]
    return base[number, rows[:, :, None], cols[:, None, :]]


def nearly_equal(batch: int, n: int, m: int, generator: torch.Generator) -> Tensor:
    """Collapsed features: all costs the same but for the sixth digit."""
    return 0.9 + 1e-6 * _normal((batch, n, m), generator)


def one_hot(batch: int, n: int, m: int, generator: torch.Generator) -> Tensor:
    """Cost 0 for one partner of every row, 2 for all others: the range of a cosine used to the full."""
    partner = torch.randint(0, m, (batch, n), generator=generator)
    return 2.0 - 2.0 * torch.nn.functional.one_hot(partner, m).double()


FAMILIES = {
    function.__name__: function for function in (iid, aligned, matched, lowd, grid, duplicates, nearly_equal, one_hot)
}


def costs(family: str, batch: int, n: int, m: int, seed: int = 0) -> Tensor:
    """(batch, n, m) float64 costs of a family, the same for the same arguments."""
    return FAMILIES[family](batch, n, m, torch.Generator().manual_seed(seed))


def ragged_masks(batch: int, n: int, m: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Boolean masks with at least one entry per row that is not padding, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(1, n + 1, (batch, 1), generator=generator)
    cols = torch.randint(1, m + 1, (batch, 1), generator=generator)
    return torch.arange(n) < rows, torch.arange(m) < cols


def _topics(batch: int, n: int, m: int, noise: float, generator: torch.Generator) -> Tensor:
    centres = _normal((batch, TOPICS, WIDTH), generator)
    shown = torch.randint(0, TOPICS // 2, (batch, n), generator=generator)
    said = torch.randint(0, TOPICS, (batch, m), generator=generator)
    number = torch.arange(batch)[:, None]
    video = centres[number, shown] + noise * _normal((batch, n, WIDTH), generator)
    language = centres[number, said] + noise * _normal((batch, m, WIDTH), generator)
    return _cosine(video, language)


def _cosine(video: Tensor, language: Tensor) -> Tensor:
    return 1 - torch.nn.functional.normalize(video, dim=-1) @ torch.nn.functional.normalize(language, dim=-1).mT


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)
