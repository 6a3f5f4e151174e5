"""Shows what an aligned model sees: the transport plan of one item, and distances of right and wrong pairs.

    python examples/align_video_and_text.py --output_dir outputs/alignment
    python examples/align_video_and_text.py --adapter outputs/how2/adapter --data_dir how2 --split sum_test

Draws the transport plan of one item (frames against words) as a heat map, and prints the mean POT distance of a text
from its own video and from the video of another item (the paper's Table 7), with and without the adapter. Their
difference is how much nearer the own video is. Without `--data_dir` it uses How2-mini.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, HfArgumentParser

from peft_read import Aligner, PVLAConfig, partial_optimal_transport
from peft_read.alignment import AlignedBlock
from peft_read.data import FeatureStore, How2Collator, generate_how2_mini, load_how2
from peft_read.transport import cosine_cost

BACKBONE = str(Path(__file__).with_name("how2_mini_backbone"))


@dataclass
class Arguments:
    """Which model, which data, which item."""

    model_name_or_path: str = field(default=BACKBONE, metadata={"help": "a VG-BART or VG-T5: a folder, or on the Hub"})
    adapter: str | None = field(default=None, metadata={"help": "a saved adapter; measured with it and without it"})
    data_dir: str | None = field(default=None, metadata={"help": "a folder in the How2 layout; absent: How2-mini"})
    split: str = field(default="sum_test", metadata={"help": "the split of --data_dir to measure"})
    features: str | None = field(default=None, metadata={"help": "their folder; absent: the one in --data_dir"})
    item: int = field(default=0, metadata={"help": "index of the item to draw"})
    num_items: int = field(default=64, metadata={"help": "how many items to measure"})
    text: str = field(default="summary", metadata={"help": "align the video with the summary or the transcript"})
    mass: float = field(default=0.5, metadata={"help": "the part of frames and words to match, in (0, 1]"})
    block: int = field(default=-1, metadata={"help": "the encoder block to draw and to measure; -1 is the last"})
    output_dir: str = field(default="outputs/alignment", metadata={"help": "where the picture goes"})


def main() -> None:
    arguments = HfArgumentParser(Arguments, description=__doc__.rpartition("\n\n")[2]).parse_args_into_dataclasses()[0]
    if find_spec("matplotlib") is None:  # before the work, not after it
        sys.exit('the picture needs matplotlib: pip install ".[examples]"')
    items, features = load_items(arguments)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    model = AutoModelForSeq2SeqLM.from_pretrained(arguments.model_name_or_path).eval()
    if arguments.adapter is not None:
        model = PeftModel.from_pretrained(model, arguments.adapter).eval()
    aligner = Aligner(model, PVLAConfig(mass=arguments.mass, blocks=[arguments.block]))
    collator = How2Collator(tokenizer, features, decoder_start_token_id=model.config.decoder_start_token_id)

    wrong = [{**item, "video_id": items[index - 1]["video_id"]} for index, item in enumerate(items)]
    print(
        "Mean POT distance of a text from a video; difference: the other minus its own, above 0 if its own is nearer\n"
    )
    print("| model | from its own video | from another item's video | difference |\n|---|---|---|---|")
    names = ["with the adapter", "without"] if arguments.adapter is not None else ["backbone"]
    for name in names:
        if name == "without":
            model.disable_adapter_layers()
        right, other = (distances(aligner, model, collator, rows) for rows in (items, wrong))
        print(f"| {name} | {right.mean():.4f} | {other.mean():.4f} | {(other - right).mean():+.4f} |")
        if name == "without":
            model.enable_adapter_layers()
    path = Path(arguments.output_dir) / f"plan_{items[arguments.item]['video_id']}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    batch = collator([items[arguments.item]])
    draw(path, states(aligner, model, batch), tokenizer.convert_ids_to_tokens(batch["input_ids"][0]), arguments.mass)
    print(f"transport plan: {path}")


def load_items(arguments: Arguments) -> tuple[list[dict[str, Any]], Any]:
    """The items, with the text to align in the place of the transcript."""
    if arguments.data_dir is None:
        clips = generate_how2_mini(arguments.num_items, seed=3)
        rows = [{"video_id": c.video_id, "transcript": c.transcript, "summary": c.summary} for c in clips]
        features: Any = {clip.video_id: clip.features for clip in clips}
    else:
        folder = Path(arguments.data_dir)
        data = load_how2(folder, arguments.split)
        rows = [data[index] for index in range(min(arguments.num_items, len(data)))]
        path = arguments.features or next(
            p for p in (folder / "video_features", folder / "video_features.npz") if p.exists()
        )
        features = FeatureStore(path)
    return [{**row, "transcript": row[arguments.text]} for row in rows], features


@torch.no_grad()
def states(aligner: Aligner, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> AlignedBlock:
    with aligner.record() as recording:
        outputs = model(**batch)
    return aligner.blocks(recording, batch, outputs)[0]


@torch.no_grad()
def distances(
    aligner: Aligner, model: torch.nn.Module, collator: How2Collator, items: list[dict[str, Any]]
) -> torch.Tensor:
    """The POT distance of every item, (items,)."""
    measured = []
    for start in range(0, len(items), 16):
        batch = collator(items[start : start + 16])
        with aligner.record() as recording:
            outputs = model(**batch)
        measured.append(aligner.distance(recording, batch, outputs).distance[0])
    return torch.cat(measured)


def draw(path: Path, block: AlignedBlock, words: list[str], mass: float) -> None:
    """Frames against words, in units of a frame's own weight."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cost = cosine_cost(block.video, block.language, block.video_mask, block.language_mask)
    plan = partial_optimal_transport(cost, mass=mass).plan[0]  # (frames, words)
    figure, axes = plt.subplots(figsize=(max(6, 0.22 * len(words)), max(3, 0.2 * len(plan))), layout="constrained")
    image = axes.imshow(plan * len(plan), aspect="auto", cmap="magma")
    axes.set_xticks(range(len(words)), words, rotation=90, fontsize=7)
    axes.set_xlabel("words")
    axes.set_ylabel("frames")
    figure.colorbar(image, label="share of the frame's weight")
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
