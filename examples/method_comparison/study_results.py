"""One file with the numbers of all runs, from which every table and picture is made, and its reader.

Figures of single queries are kept in thousandths, as whole numbers: the file is small enough to be committed, and
`.xz` at the end of its name makes it smaller.
"""

from __future__ import annotations

import json
import lzma
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from run_folder import versions, write_json
from study_runs import Plan, Run

from peft_read.files import write_whole

FORMAT = 1
PER_PERCENT = 10  # thousandths in a percent


def collect(plans: Mapping[str, Plan]) -> dict[str, Any]:
    """The numbers of the runs that have ended, by setting; settings without any are left out."""
    found = {name: _setting(plan) for name, plan in plans.items()}
    return {
        "format": FORMAT,
        "versions": versions(),
        "hardware": hardware(),
        "settings": {name: numbers for name, numbers in found.items() if numbers["tuning"] or numbers["main"]},
    }


def hardware() -> str:
    """The name of the GPU, where there is one, or of the processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpus = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", cpus.read_text(), re.MULTILINE) if cpus.exists() else []
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} logical processors"


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Writes them, compressed where the name ends in .xz."""
    text = (json.dumps(results, separators=(",", ":")) + "\n").encode()
    with write_whole(path, "wb") as file:
        file.write(lzma.compress(text) if path.suffix == ".xz" else text)


def read_results(path: Path) -> dict[str, Any]:
    """Reads them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another kind.
    """
    content = path.read_bytes()
    try:
        results = json.loads(lzma.decompress(content) if path.suffix == ".xz" else content)
        known = results["format"]
    except (ValueError, lzma.LZMAError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no results of the study: {error!r}") from error
    if known != FORMAT:
        raise ValueError(f"{path} has the format {known!r}, this reads {FORMAT}")
    return results


def restore(results: Mapping[str, Any], output: Path) -> int:
    """Writes the results of runs back into folders, so that a study goes on from its file on another machine.

    A folder that has a result stays as it is. What was trained is not in the file: it cannot be loaded from there.

    Args:
        results: of `read_results`.
        output: folder of the runs.

    Returns:
        How many were written.
    """
    written = 0
    for setting in results["settings"].values():
        summarises = setting["script"] == "summarise"
        for run in (*setting["tuning"], *setting["main"]):
            folder = output / run["folder"]
            if (folder / "results.json").exists():
                continue
            test = run.get("test", {})
            chosen_by = {setting["validation"]: run["validation"]} if "validation" in run else {}
            part = "test" if summarises or test else "validation"
            items = setting["items"]["test" if test else "validation"]
            source_of = dict(zip(items["ids"], items["sources"], strict=True))
            ids = run.get("ids", items["ids"])
            columns = {figure: [value / PER_PERCENT for value in values] for figure, values in run["each"].items()}
            folder.mkdir(parents=True, exist_ok=True)
            each = {"ids": ids, "sources": [source_of[item] for item in ids], "figures": columns}
            write_json(folder / f"each_{part}.json", each, indent=None)
            found = {"rouge_after": {"rouge_score": chosen_by | test}} if summarises else {}
            found = found or {"validation": chosen_by, "test": test}
            numbers = {key: run[key] for key in ("seconds", "trainable", "parameters")}
            # Last: with it the run has ended.
            write_json(folder / "results.json", {**found, **numbers, "restored": True})
            written += 1
    return written


def table_of(runs: Sequence[Mapping[str, Any]], figure: str, ids: Sequence[Any]) -> NDArray:
    """The figure of every query, (seeds, queries) in percent; the runs of a seed in several domains are joined.

    Args:
        runs: of one row, in the order of the results.
        figure: its name in the test part.
        ids: of all queries, in their order.
    """
    place = {item: index for index, item in enumerate(ids)}
    seeds = sorted({run["seed"] for run in runs})
    table = np.full((len(seeds), len(ids)), np.nan)
    for run in runs:
        columns = [place[item] for item in run["ids"]] if "ids" in run else slice(None)
        table[seeds.index(run["seed"]), columns] = run["each"][figure]
    return table / PER_PERCENT


def _setting(plan: Plan) -> dict[str, Any]:
    items: dict[str, Any] = {}
    tuning = [_tuning(run, result, items) for run in plan.tuning_runs() if (result := run.result) is not None]
    main = [_main(run, result, items) for run in plan.main_runs() if (result := run.result) is not None]
    setting = plan.setting
    for known in items.values():
        numbers = {source: index for index, source in enumerate(dict.fromkeys(known["sources"]))}
        known["sources"] = [numbers[source] for source in known["sources"]]
    return {
        "title": setting.title,
        "script": setting.script,
        "figures": dict(setting.figures),
        "validation": setting.validation,
        "labelled": setting.labelled,
        "rows": list(plan.rows),
        "parts": [part for part in setting.parts if part],
        "planned_seeds": plan.seeds,
        "choices": plan.choices(),
        "items": items,
        "tuning": tuning,
        "main": main,
    }


def _tuning(run: Run, result: Mapping[str, Any], items: dict[str, Any]) -> dict[str, Any]:
    each = _each(run, "test" if run.of.script == "summarise" else "validation")
    found = _described(run, result) | {"validation": round(run.validation(result), 3)}
    return found | _rounded(each, [run.of.validation], "validation", items)


def _main(run: Run, result: Mapping[str, Any], items: dict[str, Any]) -> dict[str, Any]:
    test = result["rouge_after"]["rouge_score"] if run.of.script == "summarise" else result["test"]
    names = list(run.of.figures.values())
    found = _described(run, result) | {"part": run.part, "test": {name: round(test[name], 3) for name in names}}
    if run.of.script != "summarise" and result.get("validation"):
        found["validation"] = round(run.validation(result), 3)
    return found | _rounded(_each(run, "test"), names, "test", items, has_parts=run.part is not None)


def _described(run: Run, result: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "folder": str(run.folder.relative_to(run.places.output)),
        "row": run.row,
        "arguments": run.method,
        "seed": run.seed,
        "trainable": result["trainable"],
        "parameters": result["parameters"],
        "seconds": round(result["seconds"]),
    }


def _each(run: Run, part: str) -> dict[str, Any]:
    """What the run has written about every query; of several folds one after the other."""
    joined: dict[str, Any] = {"ids": [], "sources": [], "figures": {}}
    for path in sorted(run.folder.rglob(f"each_{part}.json")):
        each = json.loads(path.read_text(encoding="utf-8"))
        joined["ids"] += each["ids"]
        joined["sources"] += each["sources"]
        for name, values in each["figures"].items():
            joined["figures"].setdefault(name, []).extend(values)
    return joined


def _rounded(
    each: Mapping[str, Any], names: Sequence[str], part: str, items: dict[str, Any], *, has_parts: bool = False
) -> dict[str, Any]:
    """The figures of every query as whole thousandths, and the queries where they are not those of other runs."""
    known = items.setdefault(part, {"ids": [], "sources": []})
    columns = {name: [round(PER_PERCENT * value) for value in each["figures"][name]] for name in names}
    seen = set(known["ids"])
    new = [index for index, item in enumerate(each["ids"]) if item not in seen]
    known["ids"] += [each["ids"][index] for index in new]
    known["sources"] += [each["sources"][index] for index in new]
    # A domain's videos are not those of the others: its runs say which theirs are.
    if each["ids"] == known["ids"] and not has_parts:
        return {"each": columns}
    return {"ids": each["ids"], "each": columns}
