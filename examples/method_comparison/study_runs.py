"""The runs of the study: what they are called with, where they lie, what they have found, and what was chosen."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from comparison import read_result
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
        return read_result(self.folder)

    def job(self) -> Job:
        """What a worker does."""
        self.folder.mkdir(parents=True, exist_ok=True)
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


def missing(runs: Sequence[Run]) -> Iterator[Run]:
    """Those without a result."""
    return (run for run in runs if run.result is None)
