"""Random transport problems whose tokens are about topics, so that some pairs match and others do not."""

import torch
from torch import Tensor


def tokens_about_topics(batch: int, n: int, m: int, noise: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Video tokens about six topics and text tokens about twelve, those six among them.

    Args:
        batch: problems B.
        n: video tokens N of a problem.
        m: text tokens M of a problem.
        noise: standard deviation of a token around its topic, whose own is 1.
        generator: where the numbers come from.

    Returns:
        Video (B, N, 256) and text (B, M, 256).
    """
    topics = torch.randn(batch, 12, 256, generator=generator)
    problem = torch.arange(batch)[:, None]
    video = topics[problem, torch.randint(0, 6, (batch, n), generator=generator)]
    text = topics[problem, torch.randint(0, 12, (batch, m), generator=generator)]
    video = video + noise * torch.randn(batch, n, 256, generator=generator)
    text = text + noise * torch.randn(batch, m, 256, generator=generator)
    return video, text
