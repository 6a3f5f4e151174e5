"""The runs of the study: what they are called with, where they lie, what they have found, and what was chosen."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from comparison import read_result
from study_machine import write_machine
from study_settings import BACKBONES, FINALISTS, TUNING_SEEDS, Setting
from workers import Job

FROZEN = "no adaptation"


@dataclass(frozen=True)
class Places:
    """Where data is found and results go; `{name}` in the arguments of a setting is one of them.

    Args:
        data: folder of the data; a file may lie there as `.xz`.
        output: folder of the runs.
        text_encoder: folder or Hub name.
        rest: arguments that follow those of every run; they are a part of what a run is.
    """

    data: Path
    output: Path
    text_encoder: str
    rest: tuple[str, ...] = ()

    def fill(self, arguments: str) -> list[str]:
        """The arguments as a list.

        Raises:
            FileNotFoundError: a file of the data is absent.
        """
        return [re.sub(r"\{([^}]+)\}", lambda match: self._place(match[1]), part) for part in arguments.split()]

    def _place(self, name: str) -> str:
        if name == "text_encoder":
            return self.text_encoder
        if name == "text_cache":
            return str(self.output / "text_cache.npz")
        if name == "moments_by_source":
            return str(self.output / "moments_by_source")
        for path in (self.data / name, self.data / f"{name}.xz"):
            if path.exists():
                return str(path)
        raise FileNotFoundError(f"{self.data / name} does not exist, plain or as .xz; docs/data.md says where it is")


def fingerprint(*parts: Any) -> str:
    """Eight letters that change with what a run is."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class BackboneRun:
    """The pretraining of one backbone."""

    name: str
    places: Places

    @property
    def folder(self) -> Path:
        return self.places.output / "backbones" / f"{self.name}_{fingerprint(self._what, self.places.rest)}"

    @property
    def _what(self) -> str:
        return BACKBONES[self.name].arguments

    @property
    def is_done(self) -> bool:
        """Whether the backbone is there, with the record that is written last."""
        return (self.folder / "pretraining.json").is_file() and (self.folder / "config.json").is_file()

    def job(self) -> Job:
        """What a worker does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        arguments = [*self.places.fill(self._what), *self.places.rest, "--output_dir", str(self.folder)]
        name = f"backbone {self.name}"
        return Job(name, BACKBONES[self.name].script, (*arguments, "--disable_tqdm", "true"), self.folder / "log.txt")


@dataclass(frozen=True)
class Run:
    """One training of one method.

    Args:
        setting: its name.
        of: the setting.
        stage: "tune" or "main".
        row: of the table.
        method: the arguments of its configuration.
        seed: of the training.
        part: the domain, None where there is none.
        places: where everything is.
    """

    setting: str
    of: Setting
    stage: str
    row: str
    method: str
    seed: int
    part: str | None
    places: Places

    @property
    def folder(self) -> Path:
        protocol = (self.of.arguments, self.of.tune if self.stage == "tune" else self.of.main)
        what = fingerprint(*protocol, self.method, BACKBONES[self.of.backbone].arguments, self.places.rest)
        row = re.sub(r"[^A-Za-z0-9-]+", "_", self.row).strip("_")
        part = f"_{self.part}" if self.part else ""
        return self.places.output / self.setting / self.stage / f"{row}_{what}{part}_seed{self.seed}"

    @property
    def result(self) -> dict[str, Any] | None:
        """What it has found, None where it has not ended."""
        result = read_result(self.folder)
        try:
            return result if result is not None and self._numbers(result) else None
        except (KeyError, TypeError, ValueError):
            return None

    @property
    def whole(self) -> dict[str, Any] | None:
        """What it has found, None where it has not ended or where a file of it is damaged: it is to be run again."""
        return None if self.damage else self.result

    @property
    def damage(self) -> str | None:
        """What is wrong with the files of a run that has ended, None where nothing is."""
        if not (self.folder / "results.json").exists():
            return None
        if self.result is None:
            return "results.json is torn, or lacks figures"
        try:
            each = each_of(self.folder, self.measured_part)
        except (OSError, ValueError) as error:
            return str(error)
        lacking = [name for name in self.figures if len(each["figures"].get(name, ())) != len(each["ids"])]
        return f"each_{self.measured_part}.json lacks {', '.join(lacking)}" if lacking else None

    @property
    def measured_part(self) -> str:
        """The part whose queries it is compared on: a summariser's "test" is the validation part where it tunes."""
        return "validation" if self.stage == "tune" and self.of.script != "summarise" else "test"

    @property
    def figures(self) -> list[str]:
        """Those that it is there for."""
        return [self.of.validation] if self.stage == "tune" else list(self.of.figures.values())

    def job(self) -> Job:
        """What a worker does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_machine(self.folder)
        stage = self.of.tune if self.stage == "tune" else self.of.main
        arguments = self.places.fill(f"{self.of.arguments} {stage} {self.method}")
        arguments += ["--domain", self.part] if self.part else []
        arguments += ["--model_name_or_path", str(BackboneRun(self.of.backbone, self.places).folder)]
        arguments += [*self.places.rest, "--seed", str(self.seed), "--disable_tqdm", "true"]
        arguments += ["--output_dir", str(self.folder)]
        name = f"{self.setting}, {self.stage}: {self.row}, {self.part or ''} seed {self.seed}"
        return Job(name, self.of.script, tuple(arguments), self.folder / "log.txt")

    def validation(self, result: Mapping[str, Any]) -> float:
        """The figure that configurations are chosen by."""
        found = result["rouge_after"]["rouge_score"] if self.of.script == "summarise" else result["validation"]
        return float(found[self.of.validation])

    def test(self, result: Mapping[str, Any]) -> Mapping[str, float]:
        """The figures that are reported."""
        return result["rouge_after"]["rouge_score"] if self.of.script == "summarise" else result["test"]

    def _numbers(self, result: Mapping[str, Any]) -> list[float]:
        """All that the study takes from a result.

        Raises:
            KeyError, TypeError, ValueError: something is not there, or no number.
        """
        figures = [self.validation(result)] if self.stage == "tune" else [self.test(result)[n] for n in self.figures]
        return [float(number) for number in (*figures, *(result[n] for n in ("seconds", "trainable", "parameters")))]


def each_of(folder: Path, part: str) -> dict[str, Any]:
    """What a run has written about every query; of several folds one after the other.

    Args:
        folder: of the run.
        part: "validation" or "test".

    Returns:
        `ids` and `sources`, lists of one entry per query, and `figures`, such lists by name, in percent.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file is damaged.
    """
    joined: dict[str, Any] = {"ids": [], "sources": [], "figures": {}}
    paths = sorted(folder.rglob(f"each_{part}.json"))
    if not paths:
        raise FileNotFoundError(f"each_{part}.json does not exist")
    for path in paths:
        try:
            each = json.loads(path.read_text(encoding="utf-8"))
            joined["ids"] += each["ids"]
            joined["sources"] += each["sources"]
            for name, values in each["figures"].items():
                joined["figures"].setdefault(name, []).extend(values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path.name} is damaged ({type(error).__name__})") from error
    return joined


class Plan:
    """The runs of one setting.

    Args:
        name: of the setting.
        setting: what it fixes.
        places: where everything is.
        configurations: of every row, the first so many; None = all.
        seeds: main seeds; None = the setting's own.
        rows: those to run; None = all.
        chooses: the plan whose choices are taken over.
    """

    def __init__(
        self,
        name: str,
        setting: Setting,
        places: Places,
        *,
        configurations: int | None = None,
        seeds: int | None = None,
        rows: Sequence[str] | None = None,
        chooses: Plan | None = None,
    ) -> None:
        self.name, self.setting, self.places, self.chooses = name, setting, places, chooses
        self.configurations = configurations
        self.seeds = setting.seeds if seeds is None else seeds
        self.rows = {row: given[:configurations] for row, given in setting.rows.items() if not rows or row in rows}

    @property
    def tunes(self) -> bool:
        """Whether it chooses configurations of its own."""
        return self.setting.choices_of is None

    def first_round(self) -> list[Run]:
        """Every configuration with the first tuning seed, row after row."""
        if not self.tunes:
            return []
        return [self._tuning(row, method, 0) for row, methods in self.rows.items() for method in methods]

    def second_round(self) -> list[Run]:
        """The best configurations once more, of the rows whose first round is complete."""
        return [
            self._tuning(row, method, 1)
            for row, methods in (self.rows.items() if self.tunes and FINALISTS > 1 else ())
            if len(methods) > 1
            for method in self._finalists(row, methods)
        ]

    def choices(self) -> dict[str, str]:
        """The arguments of the rows that can be run."""
        if not self.tunes:
            assert self.chooses is not None
            chosen = self.chooses.choices()
            followed = {row: chosen.get(self._follows(row)) for row in self.rows}
            return {row: f"{c} {self.rows[row][0]}".strip() for row, c in followed.items() if c is not None}
        found = {row: self._choice(row, methods) for row, methods in self.rows.items()}
        return {row: method for row, method in found.items() if method is not None}

    def main_runs(self) -> list[Run]:
        """The runs that are reported, seed after seed, of the rows that are chosen."""
        chosen = self.choices()
        runs = [
            Run(self.name, self.setting, "main", row, method, seed, part, self.places)
            for seed in range(self.seeds)
            for row, method in chosen.items()
            for part in self.setting.parts
        ]
        frozen = [
            Run(self.name, self.setting, "main", FROZEN, self._frozen, 0, part, self.places)
            for part in self.setting.parts
        ]
        return frozen + runs

    def tuning_runs(self) -> list[Run]:
        """Both rounds, as far as they are known."""
        return self.first_round() + self.second_round()

    def recorded(self, names: Set[str] = frozenset()) -> list[Run]:
        """The runs of the setting that have a folder, of whatever configurations and seeds they were called for.

        Args:
            names: of folders that are taken to exist.
        """
        there = {path.name for stage in ("tune", "main") for path in (self._folder / stage).glob("*")} | names
        numbers = (re.search(r"_seed(\d+)$", name) for name in there)
        # Tuning seeds are among them: they are few, and no main run has one.
        seeds = sorted({int(match[1]) for match in numbers if match})
        rows = self.setting.rows
        tuning = [
            self._tuning(row, method, round_)
            for round_ in range(len(TUNING_SEEDS) if self.tunes else 0)
            for row, methods in rows.items()
            for method in methods
        ]
        methods_of = {row: self._methods(row) for row in rows} | {FROZEN: [self._frozen]}
        main = [
            Run(self.name, self.setting, "main", row, method, seed, part, self.places)
            for seed in seeds
            for row, methods in methods_of.items()
            for method in methods
            for part in self.setting.parts
        ]
        return [run for run in (*tuning, *main) if run.folder.name in there]

    def chosen_with(self) -> int | None:
        """How many configurations of every row the reported runs were chosen from, None where none is reported.

        The most with which every row that has main runs has a choice, and main runs of that choice. A larger budget
        whose tuning or whose runs are under way does not count yet.
        """
        if not self.tunes:
            assert self.chooses is not None
            return self.chooses.chosen_with()
        done = {(run.row, run.method) for run in self.recorded() if run.stage == "main" and run.result is not None}
        reported = {row for row, _ in done} - {FROZEN}
        most = max(map(len, self.setting.rows.values()), default=0) if reported else 0
        for number in range(most, 0, -1):
            choices = Plan(self.name, self.setting, self.places, configurations=number).choices()
            if all((row, choices.get(row)) in done for row in reported):
                return number
        return None

    def count(self) -> int:
        """All runs, those that are not known yet included."""
        main = (len(self.rows) * self.seeds + 1) * len(self.setting.parts)
        if not self.tunes:
            return main
        finals = sum(min(FINALISTS, len(methods)) for methods in self.rows.values() if len(methods) > 1)
        return main + sum(map(len, self.rows.values())) + finals

    @property
    def _frozen(self) -> str:
        return "--method none" + (" --no_pvla" if self.setting.script == "summarise" else "")

    def _tuning(self, row: str, method: str, round_: int) -> Run:
        part = self.setting.parts[0]
        return Run(self.name, self.setting, "tune", row, method, TUNING_SEEDS[round_], part, self.places)

    @property
    def _folder(self) -> Path:
        return self.places.output / self.name

    def _methods(self, row: str) -> list[str]:
        """All that its main runs could be called with."""
        given = self.setting.rows[row]
        if self.chooses is None:
            return list(given)
        return [f"{c} {given[0]}".strip() for c in self.chooses.setting.rows.get(self._follows(row), ())]

    def _follows(self, row: str) -> str:
        return self.setting.row_of.get(row, self.setting.row_of.get("", row))

    def _scores(self, row: str, methods: Sequence[str], round_: int) -> dict[str, float] | None:
        runs = {method: self._tuning(row, method, round_) for method in methods}
        results = {method: run.result for method, run in runs.items()}
        if any(result is None for result in results.values()):
            return None
        return {method: runs[method].validation(result) for method, result in results.items() if result is not None}

    def _finalists(self, row: str, methods: Sequence[str]) -> list[str]:
        scores = self._scores(row, methods, 0)
        # `sorted` keeps the order of the table among equals.
        return [] if scores is None else sorted(methods, key=lambda method: -scores[method])[:FINALISTS]

    def _choice(self, row: str, methods: Sequence[str]) -> str | None:
        if len(methods) == 1:
            return methods[0]
        first, finalists = self._scores(row, methods, 0), self._finalists(row, methods)
        second = self._scores(row, finalists, 1) if finalists else None
        if first is None or second is None:
            return None
        return max(finalists, key=lambda method: mean((first[method], second[method])))
