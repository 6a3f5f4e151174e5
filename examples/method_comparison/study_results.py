"""One file with the numbers of all runs, from which every table and picture is made, and its reader.

Figures of single queries are kept in thousandths, as whole numbers: the file is small enough to be committed, and
`.xz` at the end of its name makes it smaller.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from comparison import read_result
from numpy.typing import NDArray
from run_folder import write_json
from study_machine import MACHINE, read_machine, read_versions
from study_runs import FROZEN, Plan, Run, each_of

from peft_read.files import write_whole

FORMAT = 2
PER_PERCENT = 10  # thousandths in a percent
KINDS = ("tuning", "main", "others")  # lists of runs; the last: main runs of configurations that are not the choice
OF_A_SETTING = ("title", "script", "figures", "validation", "labelled", "rows", "parts", "planned_seeds", "choices")
OF_A_RUN = ("folder", "row", "arguments", "seed", "trainable", "parameters", "seconds", "each")


def collect(
    plans: Mapping[str, Plan], known: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[Path, str]]:
    """The numbers of the runs that have ended, by setting; settings without any are left out.

    Args:
        plans: of all settings, each with as many configurations as its reported runs were chosen from.
        known: of `read_results`, what was collected before. A run whose folder is gone or damaged keeps its numbers.

    Returns:
        The results, and by folder what is wrong with damaged runs.

    Raises:
        ValueError: `known` holds runs that are none of these plans: they would be lost.
    """
    known = known or {"machines": [], "settings": {}}
    damaged: dict[Path, str] = {}
    machines: list[dict[str, Any]] = []
    found = {}
    for name, plan in plans.items():
        numbers = _Collector(plan, known["settings"].get(name, {}), known["machines"], machines, damaged).setting()
        if any(numbers[kind] for kind in KINDS):
            found[name] = numbers
    results = {"format": FORMAT, "machines": machines, "settings": found}
    if lost := sorted(_folders(known) - _folders(results)):
        raise ValueError(
            f"{len(lost)} runs that were recorded here, such as {lost[0]}, were made with other arguments after -- or "
            "by another version of the settings, and would be lost; choose another --output_dir"
        )
    return results, damaged


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Writes them, compressed where the name ends in .xz."""
    text = (json.dumps(results, separators=(",", ":")) + "\n").encode()
    with write_whole(path, "wb") as file:
        file.write(lzma.compress(text) if path.suffix == ".xz" else text)


def read_results(path: Path) -> dict[str, Any]:
    """Reads them; those of an earlier format as this one's.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another kind.
    """
    content = path.read_bytes()
    try:
        results = json.loads(lzma.decompress(content) if path.suffix == ".xz" else content)
        if (known := results["format"]) not in (1, FORMAT):
            raise _UnknownFormatError(f"{path} has the format {known!r}, this reads {FORMAT}")
        return _complete(_of_format_1(results) if known == 1 else results)
    except _UnknownFormatError:
        raise
    except (ValueError, lzma.LZMAError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no results of the study: {error!r}") from error


class _UnknownFormatError(ValueError):
    pass


def _of_format_1(results: Mapping[str, Any]) -> dict[str, Any]:
    """The first format had one machine for all runs, and the runs of the choice alone."""
    machine = {"versions": results["versions"], "hardware": results["hardware"], "arguments": None}
    settings = {
        name: {"configurations": None, "others": []}
        | setting
        | {kind: [{**run, "machine": 0} for run in setting[kind]] for kind in ("tuning", "main")}
        for name, setting in results["settings"].items()
    }
    return {"format": FORMAT, "machines": [machine], "settings": settings}


def _complete(results: dict[str, Any]) -> dict[str, Any]:
    """The results, where nothing that is read of them is missing.

    Raises:
        LookupError, TypeError: something is.
    """
    machines = [machine["versions"] and machine["hardware"] for machine in results["machines"]]
    for setting in results["settings"].values():
        for name in (*OF_A_SETTING, "items", "configurations"):
            setting[name]
        for kind in KINDS:
            for run in setting[kind]:
                for name in OF_A_RUN:
                    run[name]
                machines[run["machine"]]
                setting["items"]["test" if run.get("test") else "validation"]["ids"]
    return results


def _folders(results: Mapping[str, Any]) -> set[str]:
    return {run["folder"] for setting in results["settings"].values() for kind in KINDS for run in setting[kind]}


def restore(results: Mapping[str, Any], output: Path) -> int:
    """Writes the results of runs back into folders, so that a study goes on from its file on another machine.

    A folder that has a whole result stays as it is. What was trained is not in the file: it cannot be loaded from
    there.

    Args:
        results: of `read_results`.
        output: folder of the runs.

    Returns:
        How many were written.
    """
    written = 0
    for setting in results["settings"].values():
        for run in (run for kind in KINDS for run in setting[kind]):
            folder = output / run["folder"]
            part, each, found = _files(setting, run)
            if _is_whole(folder, part):
                continue
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / f"each_{part}.json", each, indent=None)
            machine = results["machines"][run["machine"]]
            # Last: with it the run has ended.
            write_json(folder / "results.json", {**found, "restored": True, MACHINE: machine})
            written += 1
    return written


def _is_whole(folder: Path, part: str) -> bool:
    try:
        return read_result(folder) is not None and bool(each_of(folder, part))
    except (OSError, ValueError):
        return False


def _files(setting: Mapping[str, Any], run: Mapping[str, Any]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """What a recorded run had written: the measured part, the figures of its queries, and its result."""
    summarises, test = setting["script"] == "summarise", run.get("test", {})
    chosen_by = {setting["validation"]: run["validation"]} if "validation" in run else {}
    part = "test" if summarises or test else "validation"
    items = setting["items"]["test" if test else "validation"]
    source_of = dict(zip(items["ids"], items["sources"], strict=True))
    ids = run.get("ids", items["ids"])
    columns = {figure: [value / PER_PERCENT for value in values] for figure, values in run["each"].items()}
    each = {"ids": ids, "sources": [source_of[item] for item in ids], "figures": columns}
    found = {"rouge_after": {"rouge_score": chosen_by | test}} if summarises else {}
    found = found or {"validation": chosen_by, "test": test}
    return part, each, found | {key: run[key] for key in ("seconds", "trainable", "parameters")}


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


class _Collector:
    """The numbers of one setting, of the folders of its runs, or of what is known of a run without one.

    Args:
        plan: of the setting.
        before: what was collected of the setting before, {} = nothing.
        known_machines: those that runs in `before` name.
        machines: of the new results; it grows.
        damaged: by folder, what is wrong with a run; it grows.
    """

    def __init__(
        self,
        plan: Plan,
        before: Mapping[str, Any],
        known_machines: Sequence[Mapping[str, Any]],
        machines: list[dict[str, Any]],
        damaged: dict[Path, str],
    ) -> None:
        self.plan, self.before, self.known_machines = plan, before, known_machines
        self.machines, self.damaged = machines, damaged
        self.known = {run["folder"]: run for kind in KINDS for run in before.get(kind, ())}
        self.items: dict[str, Any] = {}

    def setting(self) -> dict[str, Any]:
        """All of it."""
        plan, setting = self.plan, self.plan.setting
        choices = plan.choices()
        if self.before.get("configurations") in (None, plan.configurations):
            choices = {**self.before.get("choices", {}), **choices}
        every = plan.recorded({Path(folder).name for folder in self.known})
        tuning = _unique([*plan.tuning_runs(), *(run for run in every if run.stage == "tune")])
        main = _unique([*plan.main_runs(), *(run for run in every if run.stage == "main")])
        is_chosen = {run.folder: run.row == FROZEN or choices.get(run.row) == run.method for run in main}
        numbers = {
            "tuning": self._numbers(tuning),
            "main": self._numbers(run for run in main if is_chosen[run.folder]),
            "others": self._numbers(run for run in main if not is_chosen[run.folder]),
        }
        for known in self.items.values():
            places = {source: index for index, source in enumerate(dict.fromkeys(known["sources"]))}
            known["sources"] = [places[source] for source in known["sources"]]
        return {
            "title": setting.title,
            "script": setting.script,
            "figures": dict(setting.figures),
            "validation": setting.validation,
            "labelled": setting.labelled,
            "rows": list(plan.rows),
            "parts": [part for part in setting.parts if part],
            "planned_seeds": setting.seeds,
            "configurations": plan.configurations,
            "choices": {row: choices[row] for row in plan.rows if row in choices},
            "items": self.items,
            **numbers,
        }

    def _numbers(self, runs: Iterable[Run]) -> list[dict[str, Any]]:
        return [numbers for run in runs if (numbers := self._run(run)) is not None]

    def _run(self, run: Run) -> dict[str, Any] | None:
        name = run.folder.relative_to(run.places.output).as_posix()
        known, damage = self.known.get(name), run.damage
        if damage is not None:
            self.damaged[run.folder] = damage
        result = None if damage else run.result
        if result is not None:
            each = each_of(run.folder, run.measured_part)
        elif known is not None:
            _, each, result = _files(self.before, known)
        else:
            return None
        numbers = {
            "folder": name,
            "row": run.row,
            "arguments": run.method,
            "seed": run.seed,
            "trainable": result["trainable"],
            "parameters": result["parameters"],
            "seconds": round(result["seconds"]),
            "machine": self._machine(run, result, known),
        }
        items_of = "validation" if run.stage == "tune" else "test"
        if run.stage == "tune":
            numbers["validation"] = round(run.validation(result), 3)
        else:
            numbers |= {"part": run.part, "test": {n: round(run.test(result)[n], 3) for n in run.figures}}
            if run.of.script != "summarise" and result.get("validation"):
                numbers["validation"] = round(run.validation(result), 3)
        return numbers | _rounded(each, run.figures, items_of, self.items, has_parts=run.part is not None)

    def _machine(self, run: Run, result: Mapping[str, Any], known: Mapping[str, Any] | None) -> int:
        """The place of what the run was made with among all such; runs of before it was written down have theirs."""
        machine = result.get(MACHINE) or read_machine(run.folder)
        if machine is None and known is not None:
            machine = self.known_machines[known["machine"]]
        machine = machine or read_versions(run.folder) or {}
        # That it is a run of this plan says what followed its arguments.
        machine = {"versions": None, "hardware": None} | machine | {"arguments": list(run.places.rest)}
        if machine not in self.machines:
            self.machines.append(machine)
        return self.machines.index(machine)


def _unique(runs: Iterable[Run]) -> list[Run]:
    return list({run.folder: run for run in runs}.values())


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
