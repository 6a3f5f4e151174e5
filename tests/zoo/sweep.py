"""Runs every check on every family, each in a process of its own, and renders the page of model families.

python -m tests.zoo.sweep --output families.json --markdown docs/model_families.md
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from peft_read.adapter.targets import default_targets

from .checks import SETTINGS, check_family, faults, numberless
from .families import all_families, build_case, build_model, family_named

__all__ = ["main", "sweep"]


def _one_family(name: str, settings: tuple[str, ...], path: str) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    family = family_named(name)
    results: dict[str, Any] = {"family": name, "head": family.head, "class": family.class_name}
    began = time.time()
    if settings == ("targets",):
        results |= _targets_of(family)
        Path(path).write_text(json.dumps(results))
        return
    try:
        case = build_case(family)
        results["inputs"] = {k: list(v.shape) if hasattr(v, "shape") else repr(v) for k, v in case.inputs.items()}
        results["rejected"] = [message[:200] for message in case.rejected]
    except Exception as error:
        results |= {"state": "not built", "message": f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]}
    else:
        results |= {"state": "checked", **check_family(case, settings)}
    results["seconds"] = time.time() - began
    Path(path).write_text(json.dumps(results))


def _targets_of(family: Any) -> dict[str, Any]:
    """The default targets of a family, whose model is built and not run."""
    try:
        model = build_model(family)
        names = default_targets(model)
    except Exception as error:
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]
        return {"state": "targets" if "target_modules" in message else "not built", "message": message}
    chosen = [
        name
        for name, _ in model.named_modules()
        if (re.fullmatch(names, name) if isinstance(names, str) else {name, *_tails(name)} & names)
    ]
    return {"state": "targets", "default": sorted(set(map(numberless, chosen)))}


def _tails(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[start:]) for start in range(len(parts))}


def sweep(names: list[str], settings: tuple[str, ...], output: Path, *, limit: float, jobs: int) -> dict[str, Any]:
    """The findings of the families by name; those that the output file has are not tried again.

    Args:
        names: the families.
        settings: the target settings.
        output: the file of findings, written after each family.
        limit: seconds a family may take.
        jobs: how many are tried at once.
    """
    results: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
    waiting = [name for name in names if name not in results]
    context = multiprocessing.get_context("fork")
    running: dict[str, tuple[Any, float, Path]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            path = output.with_suffix(f".{os.getpid()}.{name.replace('/', '_')}.part")
            process = context.Process(target=_one_family, args=(name, settings, str(path)))
            process.start()
            running[name] = (process, time.time(), path)
        for name, (process, began, path) in list(running.items()):
            late = time.time() - began > limit
            if process.is_alive() and not late:
                continue
            if process.is_alive():
                process.kill()
            process.join()
            if path.exists():
                results[name] = json.loads(path.read_text())
                path.unlink()
            else:
                reason = f"took longer than {limit:.0f} s" if late else f"ended with code {process.exitcode}"
                results[name] = {"family": name, "state": "crashed", "message": reason}
            output.write_text(json.dumps(results, indent=1))
            del running[name]
        time.sleep(0.02)
    return results


def _cell(setting: dict[str, Any] | None) -> str:
    """What the page says of one setting of one family."""
    if setting is None:
        return "not tried"
    state = setting["state"]
    if state in ("no default", "no feed-forward block seen"):
        return {"no default": "no default", "no feed-forward block seen": "–"}[state]
    if state == "stopped at get_peft_model":
        return "refused: " + _sentence(setting["message"])
    wrong = faults(setting)
    if wrong:
        return "**wrong**: " + ", ".join(wrong)
    said = []
    for name, check in setting["checks"].items():
        if check["verdict"] == "refused":
            said.append(f"{name} refused: {_sentence(check['read']['error'])}")
        elif check["verdict"] == "as LoRA":
            said.append(f"{name}: LoRA's error, {_sentence(check['read']['error'])}")
        elif check["verdict"] == "explained":
            said.append("; ".join(check["reasons"]))
    return "exact" + (f"; {'; '.join(said)}" if said else "")


def _sentence(message: str) -> str:
    """The first sentence of an error, without its class, safe in a table."""
    text = message.partition(": ")[2].replace("|", "\\|")
    return text.split(". ")[0].split("; ")[0][:160]


def page(results: dict[str, Any]) -> str:
    """The page of model families in Markdown: one row for each family, one column for each target setting."""
    tried = [one for one in results.values() if one["state"] == "checked"]
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}, peft {peft.__version__}"
    lines = [
        "# Model families",
        "",
        f"Made with {versions} by",
        "",
        "    python -m tests.zoo.sweep --output families.json --markdown docs/model_families.md",
        "",
        "which continues where it was ended (each row is of the run that measured it) and takes `--families`.",
        "",
        "Each family is a tiny model with random weights, built from its configuration, and a random READ "
        "that is not the identity. *exact*: identity at the start, a gradient for every parameter, a "
        "recurrence over the tokens of each example and no other, left and right padding without effect, "
        "cached generation equal to one full pass, saving and loading, and gradients under checkpointing, "
        "each as far as the family has it and as exactly as the bare model holds it. *refused*: READ raises, "
        "with the reason given. *no default*: name `target_modules`.",
        "",
        "In towers of images, video and sound a sequence is one image, video or clip: the patches of an image "
        "in raster order, all frames of a video one after the other where the model is given whole videos, "
        "the frames of a clip. Where a tower computes in windows, the recurrence runs over the image if the "
        "layer sees the image (B, H, W, d), and over each window if the layer is called window by window. "
        "Images of a batch that stand in one row are kept apart. Keys that a pyramid pools to one token have "
        "nothing to carry.",
        "",
        f"{len(tried)} families were measured. The three columns are `target_modules` absent, the last linear "
        'layer of each feed-forward block named, towers included, and `"all-linear"`.',
        "",
        "| family | model | default | feed-forward | all-linear |",
        "|---|---|---|---|---|",
    ]
    for one in sorted(tried, key=lambda one: one["family"]):
        cells = (_cell(one["settings"].get(setting)) for setting in SETTINGS)
        lines.append(f"| {one['family']} | {one['class']} | {' | '.join(cells)} |")
    named = sorted((one for one in results.values() if one["state"] == "targets"), key=lambda one: one["family"])
    if named:
        lines += [
            "",
            "## Default targets only",
            "",
            f"Of {len(named)} further families the model was built and its default targets were looked up "
            "(`--settings targets`); it was not run with them.",
            "",
            "| family | model | default targets |",
            "|---|---|---|",
        ]
        for one in named:
            targets = ", ".join(f"`{name}`" for name in one.get("default", ())) or "none"
            lines.append(f"| {one['family']} | {one['class']} | {targets} |")
    lines += ["", "## Not tried", "", "| family | why |", "|---|---|"]
    untried = (one for one in results.values() if one["state"] not in ("checked", "targets"))
    for one in sorted(untried, key=lambda one: one["family"]):
        lines.append(f"| {one['family']} | {_reason(one['message'])} |")
    return "\n".join(lines) + "\n"


def _reason(message: str) -> str:
    needed = re.search(r"requires? the (\S+) library", message)
    if needed:
        return f"needs the library {needed.group(1)}"
    if message.startswith("took longer"):
        return "its smallest configuration is too large"
    return "no tiny configuration or inputs yet"


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", help="names with commas; all families otherwise")
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--limit", type=float, default=90.0, help="seconds a family may take")
    parser.add_argument("--jobs", type=int, default=1)
    chosen = parser.parse_args(arguments)
    names = chosen.families.split(",") if chosen.families else [family.name for family in all_families()]
    settings = tuple(chosen.settings.split(","))
    results = sweep(names, settings, chosen.output, limit=chosen.limit, jobs=chosen.jobs)
    if chosen.markdown:
        chosen.markdown.write_text(page(results))
    states: dict[str, int] = {}
    for one in results.values():
        states[one["state"]] = states.get(one["state"], 0) + 1
    print(f"transformers {transformers.__version__}: {states}")


if __name__ == "__main__":
    main()
