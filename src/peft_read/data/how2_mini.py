"""How2-mini: a generated summarisation dataset in the How2 layout that needs both streams and their order.

A clip shows three to six steps of an instruction. A step is a *motion* (one of ten: cut, join, pour ...) done to an
object with a *look* (one of eight: round, long, flat ...), and lasts two to four frames.

* The **video** carries what is done and when: a frame feature is code(motion) + code(look) + an offset of the domain +
  noise. It does not tell which object it is: several objects of a domain share a look.
* The **transcript** names the objects, in shuffled order, among chatter and objects that are never touched. It says
  neither what is done nor when.
* The **summary** lists the steps in temporal order, in the words of the domain: a motion "cut" is *chop* in cooking,
  *prune* in gardening.

So a model must find the word for every frame (the alignment that PVLA asks for), and keep the order (the recurrence
that READ adds). Motion and look codes are the same in all domains, as features of one video encoder would be; names,
jargon, the way summaries are phrased and the offset belong to the domain. Half of gardening's objects are known from
other domains, half are its own. Everything is drawn from one seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..files import safe_name, write_whole
from ..values import count, shown

__all__ = ["HOW2_MINI_DOMAINS", "How2MiniClip", "generate_how2_mini", "how2_mini_talk", "write_how2_mini"]

FEATURE_DIM = 64
WORLD_SEED = 20240222  # the codes of motions, looks and domains: one video encoder for every split and seed
FRAME_NOISE = 0.35  # standard deviation per channel; code channels have standard deviation 1 / sqrt(2)
FEATURE_SCALE = 1 / 9  # frames of about unit norm, as those of CLIP and of other contrastive encoders


@dataclass(frozen=True)
class Domain:
    """The words of one domain: ten verbs (by motion), two nouns for each of eight looks, and the phrasing."""

    verbs: tuple[str, ...]
    nouns: tuple[tuple[str, ...], ...]
    opening: str
    joint: str
    closing: str


def _domain(verbs: str, nouns: str, opening: str, joint: str, closing: str) -> Domain:
    words = nouns.split()
    return Domain(tuple(verbs.split()), tuple(zip(words[::2], words[1::2], strict=True)), opening, joint, closing)


# verbs in the order: cut join pour rub turn press lift cover fill mix
# nouns two by two in the order: round long flat boxy soft tiny hollow pointed
HOW2_MINI_DOMAINS: dict[str, Domain] = {
    "cooking": _domain(
        "chop combine drizzle knead flip mash plate wrap stuff whisk",
        "tomato onion carrot noodle pancake tortilla butter tofu dough spinach pea raisin pan kettle skewer cleaver",
        "in this cooking video you", ", then", ".",
    ),
    "woodwork": _domain(
        "saw glue varnish sand drill clamp hoist veneer putty blend",
        "knob dowel plank rod panel shelf block drawer felt shavings screw nail pipe barrel chisel awl",
        "a carpenter shows how to", ", next", "in his workshop .",
    ),
    "sewing": _domain(
        "snip stitch starch press fold iron gather line pad braid",
        "button pompom ribbon zipper collar patch cushion purse wool velvet bead sequin sleeve thimble needle pin",
        "sewing lesson :", "and", ", all done by hand .",
    ),
    "painting": _domain(
        "trim frame thin stipple tilt stamp hang prime daub tint",
        "medallion dish brush roller canvas poster easel crate sponge rag dot jewel vase jar pencil spatula",
        "an artist will", "; after that", "to finish the picture .",
    ),
    "bicycle": _domain(
        "file bolt lubricate polish spin pump mount tape inflate grease",
        "wheel bell chain cable pedal rim battery toolbox saddle grip spoke valve tube helmet fork lever",
        "bike repair :", "then", "and ride away .",
    ),
    "camping": _domain(
        "hack lash douse scrub unroll stake pitch shelter pack stir",
        "boulder canteen rope pole mat tarp cooler stove blanket pillow pebble match tent lantern hatchet arrow",
        "out in the woods they", ", later", "before the night falls .",
    ),
    "cleaning": _domain(
        "scrape seal spray wipe wring squeeze remove coat refill dilute",
        "bauble doorknob mop broom mirror tile cabinet fridge towel rug crumb hair bottle basin razor hook",
        "cleaning tricks :", "plus", "for a spotless home .",
    ),
    "gardening": _domain(
        "prune graft water rake dig tamp transplant mulch pot compost",
        "bulb boulder hose rope lawn tarp planter crate soil blanket seed pebble bucket barrel trowel fork",
        "learn from a gardener to", ", now", "on this garden show .",
    ),
}  # fmt: skip

MENTIONS = (
    "here is my {noun} .",
    "this {noun} is new .",
    "i like the {noun} .",
    "we have a {noun} .",
    "look at that {noun} .",
    "a {noun} too .",
    "there is the {noun} .",
    "and one {noun} .",
)
CHATTER = (
    "hi everyone and welcome back .",
    "thanks for watching today .",
    "it is so warm in here .",
    "let me know what you think .",
    "okay so let us begin .",
    "this is going to be fun .",
)
NUM_MOTIONS, NUM_LOOKS = 10, 8


@dataclass(frozen=True)
class How2MiniClip:
    """One item: `features` is (frames, 64) float32, `steps` the (verb, noun) pairs in temporal order."""

    video_id: str
    transcript: str
    summary: str
    features: np.ndarray
    steps: tuple[tuple[str, str], ...]


def _codes() -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Motion codes (10, 64), look codes (8, 64) and an offset (64,) for every domain."""
    world = np.random.default_rng(WORLD_SEED)
    motions = world.normal(size=(NUM_MOTIONS, FEATURE_DIM)) / np.sqrt(2)
    looks = world.normal(size=(NUM_LOOKS, FEATURE_DIM)) / np.sqrt(2)
    offsets = {name: 0.3 * world.normal(size=FEATURE_DIM) for name in HOW2_MINI_DOMAINS}
    return motions, looks, offsets


def generate_how2_mini(
    num_clips: int,
    *,
    seed: int,
    domains: Sequence[str] = ("gardening",),
    num_steps: tuple[int, int] = (3, 6),
    wandering: float = 0.0,
    prefix: str = "clip",
) -> list[How2MiniClip]:
    """Draws clips of the given domains.

    Args:
        num_clips: how many.
        seed: of the clips; the codes of motions, looks and domains do not depend on it.
        domains: keys of `HOW2_MINI_DOMAINS`, drawn uniformly.
        num_steps: fewest and most steps of a clip, at most eight.
        wandering: probability that an object comes from any of `domains` instead of the clip's own.
        prefix: video ids are `<prefix><seed>_<index>`.

    Raises:
        ValueError: an unknown domain, or invalid numbers of clips or steps.
    """
    count(num_clips, "num_clips", low=0)
    if not domains or isinstance(domains, str):
        raise ValueError(f"domains must be a list of {sorted(HOW2_MINI_DOMAINS)}, not {shown(domains)}")
    if len(num_steps) != 2 or not 1 <= num_steps[0] <= num_steps[1] <= NUM_LOOKS:
        raise ValueError(f"num_steps={num_steps} must be (fewest, most), from 1 to {NUM_LOOKS}")
    if unknown := set(domains) - set(HOW2_MINI_DOMAINS):
        raise ValueError(f"unknown How2-mini domains {sorted(unknown)}; there are {sorted(HOW2_MINI_DOMAINS)}")
    rng = np.random.default_rng(seed)
    motions, looks, offsets = _codes()
    clips = []
    for index in range(num_clips):
        name = domains[int(rng.integers(len(domains)))]
        domain = HOW2_MINI_DOMAINS[name]
        steps_shown = int(rng.integers(num_steps[0], num_steps[1] + 1))
        shown_looks = rng.permutation(NUM_LOOKS)
        nouns = []
        for look in shown_looks:
            owner = (
                domain if rng.random() >= wandering else HOW2_MINI_DOMAINS[domains[int(rng.integers(len(domains)))]]
            )
            nouns.append(owner.nouns[look][rng.integers(2)])
        shown_motions = rng.choice(NUM_MOTIONS, size=steps_shown, replace=False)
        steps = tuple((domain.verbs[m], noun) for m, noun in zip(shown_motions, nouns, strict=False))

        frames = []
        for motion, look in zip(shown_motions, shown_looks, strict=False):
            frames += [motions[motion] + looks[look] + offsets[name]] * int(rng.integers(2, 5))
        features = np.stack(frames) + FRAME_NOISE * rng.normal(size=(len(frames), FEATURE_DIM))

        # Objects that are named but not used: only the video tells which.
        num_named = min(NUM_LOOKS, steps_shown + int(rng.integers(1, 3)))
        sentences = [MENTIONS[rng.integers(len(MENTIONS))].format(noun=noun) for noun in nouns[:num_named]]
        sentences += [CHATTER[rng.integers(len(CHATTER))] for _ in range(int(rng.integers(0, 3)))]
        rng.shuffle(sentences)

        told = f" {domain.joint} ".join(f"{verb} the {noun}" for verb, noun in steps)
        clips.append(
            How2MiniClip(
                video_id=f"{prefix}{seed}_{index}",
                transcript=" ".join(sentences),
                summary=f"{domain.opening} {told} {domain.closing}".replace(" ,", ",").replace(",", " ,"),
                features=(FEATURE_SCALE * features).astype(np.float32),
                steps=steps,
            )
        )
    return clips


def how2_mini_talk(num_lines: int, *, seed: int) -> list[str]:
    """Draws lines of plain talk that use the words of all domains out of context: text to denoise, no video.

    Pretraining on this text teaches a language model the words of domains whose videos it has not seen.
    """
    rng = np.random.default_rng(seed)
    domains = list(HOW2_MINI_DOMAINS.values())
    verbs = [verb for domain in domains for verb in domain.verbs]
    nouns = [noun for domain in domains for pair in domain.nouns for noun in pair]
    phrasing = sorted({word for d in domains for text in (d.opening, d.joint, d.closing) for word in text.split()})
    lines = []
    for _ in range(num_lines):
        parts = []
        for _ in range(int(rng.integers(2, 6))):
            kind = rng.integers(4)
            if kind == 0:
                parts.append(MENTIONS[rng.integers(len(MENTIONS))].format(noun=nouns[rng.integers(len(nouns))]))
            elif kind == 1:
                parts.append(f"{verbs[rng.integers(len(verbs))]} the {nouns[rng.integers(len(nouns))]}")
            elif kind == 2:
                parts.append(" ".join(phrasing[i] for i in rng.integers(len(phrasing), size=4)))
            else:
                parts.append(CHATTER[rng.integers(len(CHATTER))])
        lines.append(" ".join(parts))
    return lines


def write_how2_mini(folder: str | Path, clips: dict[str, Sequence[How2MiniClip]]) -> Path:
    """Writes splits in the How2 layout: `<split>/tran.tok.txt`, `<split>/desc.tok.txt`, `video_features/<id>.npy`.

    Args:
        folder: created if absent.
        clips: split name to clips.

    Returns:
        The folder.

    Raises:
        ValueError: a split or video id that is not a file name, or an id that appears twice.
    """
    folder = Path(folder)
    for split, items in clips.items():
        ids = [item.video_id for item in items]
        if bad := [name for name in (split, *ids) if not name or safe_name(name) != name]:
            raise ValueError(f"{shown(bad[0])} cannot be the name of a file in every file system")
        if len(set(ids)) < len(ids):
            twice = next(name for name in ids if ids.count(name) > 1)
            raise ValueError(f"an id of {split!r} appears twice: {twice!r}")
    features = folder / "video_features"
    features.mkdir(parents=True, exist_ok=True)
    for split, items in clips.items():
        (folder / split).mkdir(exist_ok=True)
        for file, field in (("tran.tok.txt", "transcript"), ("desc.tok.txt", "summary")):
            lines = [f"{item.video_id} {getattr(item, field)}" for item in items]
            with write_whole(folder / split / file) as text:
                text.write("\n".join(lines) + "\n")
        for item in items:
            # Not written atomically: for thousands of small files that would take longer than everything else. They
            # can be generated again, and a truncated file is an error by name where it is read.
            np.save(features / f"{item.video_id}.npy", item.features)
    return folder
