"""Draws docs/pictures/plan.svg: what partial transport moves when a quarter of the frames has no word.

    python docs/drawings/plan.py        # needs matplotlib

Sixteen frames walk through four topics and back out of them; eight words name three of the topics. The cost is
cosine, the mass 0.5 and 1.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt

from peft_read import partial_optimal_transport
from peft_read.transport import cosine_cost

TOPICS = ("intro", "onion", "pan", "plate")
FRAMES = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]  # the topic of each frame
WORDS = {"chop": 1, "the": 1, "onion": 1, "fry": 2, "in": 2, "oil": 2, "serve": 3, "it": 3}  # none of the intro


def states() -> tuple[torch.Tensor, torch.Tensor]:
    """States of the frames (1, 16, 8) and of the words (1, 8, 8): a direction for each topic, and noise."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.eye(len(TOPICS), 8)

    def around(topics: list[int]) -> torch.Tensor:
        noise = 0.25 * torch.randn(len(topics), 8, generator=generator)
        return (directions[topics] + noise)[None]

    return around(FRAMES), around(list(WORDS.values()))


def draw(path: Path) -> None:
    """Writes the picture: the cost, and the plan for two masses."""
    video, words = states()
    cost = cosine_cost(video, words)
    panels = {"cost (cosine distance)": cost[0]}
    for mass in (0.5, 1.0):
        plan = partial_optimal_transport(cost, mass=mass)
        panels[f"plan, mass = {mass:g}, cost / mass = {float(plan.cost[0] / plan.mass[0]):.2f}"] = plan.plan[0]
    plt.rcParams.update({"svg.hashsalt": "peft_read", "font.size": 8, "svg.fonttype": "none"})
    figure, axes = plt.subplots(1, len(panels), figsize=(9, 4), layout="constrained", sharey=True)
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        axis.imshow(values, aspect="auto", cmap="magma" if "plan" in title else "magma_r")
        axis.set_title(title, fontsize=8)
        axis.set_xticks(range(len(WORDS)), WORDS, rotation=60)
        axis.set_yticks(range(len(FRAMES)), [f"{TOPICS[topic]} {index}" for index, topic in enumerate(FRAMES)])
    axes[0].set_ylabel("frames")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "pictures" / "plan.svg")
    draw(parser.parse_args().output)
