"""What the comparisons share: runs that are never repeated, the choice of the learning rates, the tables.

Each run has a folder named by what makes it different and is skipped where that folder has a result. The learning rate
of a row is the one with the best mean validation figure over the seeds, or over the first of them (`--select_seeds`);
then the other seeds are run at the chosen rate alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from peft_read.files import safe_name, write_whole

sys.path.insert(0, str(Path(__file__).parents[1] / "reproduction"))
from run_folder import ENDS_WITH_STDIN, clear_finished, lock_folder

Result = dict[str, Any]
Key = tuple[str, float, int, "str | None"]  # row, learning rate, seed, domain
Results = dict[Key, Result]
Score = Callable[[Result], "float | None"]  # of one result on the validation split, higher is better; None: no split


@dataclass(frozen=True)
class Experiment:
    """Arguments of one row of the table, and the learning rates to choose from; (0.0,) = nothing is trained."""

    arguments: str
    learning_rates: tuple[float, ...]


Suites = dict[str, dict[str, Experiment]]


@dataclass(frozen=True)
class Choice:
    """The runs of one row at its learning rate."""

    rate: float
    rates_tried: list[float]
    selected_on: list[int]  # the seeds that the choice rests on; empty where there was none
    seeds: dict[int, list[Result]]  # seed: one result a domain

    @property
    def results(self) -> list[Result]:
        """Of all seeds and domains."""
        return [result for found in self.seeds.values() for result in found]


def build_parser(description: str | None, suites: Suites, script: Path) -> argparse.ArgumentParser:
    """The options that every comparison has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--suite", default="main", choices=sorted(suites))
    parser.add_argument("--only", nargs="*", help="rows of the suite to run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--select_seeds", type=int, help="choose the learning rates with the first N seeds only")
    parser.add_argument("--learning_rates", type=float, nargs="*", help="replaces every row's own")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("rest", nargs="*", help=f"after --: arguments of {script.name}")
    return parser


class Comparison:
    """One suite with the options of `build_parser`.

    Args:
        parser, options: of the command line; bad options end here.
        suites: rows by suite.
        script: what is run.
        fixed: its arguments in every run, before those of the command line, which win.
        score: chooses the learning rates.
        domains: each row runs in each of them; None = the script has no `--domain`.
    """

    def __init__(
        self,
        parser: argparse.ArgumentParser,
        options: argparse.Namespace,
        suites: Suites,
        *,
        script: Path,
        score: Score,
        fixed: Sequence[str] = (),
        domains: Sequence[str | None] = (None,),
    ) -> None:
        rows = suites[options.suite]
        if unknown := set(options.only or ()) - set(rows):
            parser.error(f"--only {sorted(unknown)}: the rows of {options.suite} are {list(rows)}")
        if options.select_seeds is not None and not 0 < options.select_seeds <= len(options.seeds):
            parser.error(
                f"--select_seeds {options.select_seeds} is not between 1 and the {len(options.seeds)} --seeds"
            )
        if len(set(options.seeds)) != len(options.seeds) or min(options.seeds) < 0:
            parser.error(f"--seeds {options.seeds} must be different and not negative")
        if options.jobs < 1:
            parser.error(f"--jobs {options.jobs} must be at least 1")
        if wrong := [rate for rate in options.learning_rates or () if not 0 < rate < float("inf")]:
            parser.error(f"--learning_rates {wrong} must be finite and above 0")
        self.parser = parser
        self.rows = {name: row for name, row in rows.items() if not options.only or name in options.only}
        self.options, self.script, self.score = options, script, score
        self.fixed, self.domains, self.folder = fixed, domains, Path(options.output_dir)
        self.selection: list[int] = options.seeds[: options.select_seeds]

    def run(self) -> Results:
        """Runs what has no result yet; the results of all.

        A run ends when this process does: its standard input is a pipe that only this process holds open.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = lock_folder(self.folder)
        except (ValueError, OSError) as error:
            self.parser.error(f"--output_dir {self.folder}: {error}")
        self.child_input, parent_output = os.pipe()
        try:
            return self._run_all()
        finally:
            os.close(parent_output)
            os.close(self.child_input)
            lock.release()

    def _run_all(self) -> Results:
        results = self._run((name, rate, self.selection) for name in self.rows for rate in self._rates(name))
        chosen = []
        for name in self.rows:
            if choice := choose(name, results, self._seeds_and_domains(name, self.selection), self.score):
                chosen.append((name, choice.rate, self.options.seeds))
        return results | self._run(chosen)

    def wanted(self, name: str) -> int:
        """Runs of a complete row."""
        return self._seeds_and_domains(name, self.options.seeds)

    def write(self, rows: list[Result], table: str) -> list[Result]:
        """`<suite>.json`, and the table on the terminal."""
        with write_whole(self.folder / f"{self.options.suite}.json") as file:
            file.write(json.dumps(rows, indent=2) + "\n")
        print(table)
        return rows

    def _rates(self, name: str) -> Sequence[float]:
        own = self.rows[name].learning_rates
        return self.options.learning_rates if self.options.learning_rates and own[0] else own

    def _seeds_and_domains(self, name: str, seeds: list[int]) -> int:
        trained = bool(self._rates(name)[0])  # what is not trained has no seed
        return (len(seeds) if trained else 1) * len(self.domains)

    def _run(self, runs: Iterable[tuple[str, float, list[int]]]) -> Results:
        keys: dict[Key, Path] = {
            (name, rate, seed, domain): run_folder(self.folder, self.rows[name], rate, seed, domain)
            for name, rate, seeds in runs
            for seed in (seeds if rate else seeds[:1])
            for domain in self.domains
        }
        # Two rows can be the same run (READ + PVLA is in every suite): each folder is run once.
        jobs = {path: key for key, path in keys.items()}
        with ThreadPoolExecutor(self.options.jobs) as pool:
            for failed in pool.map(lambda job: self._run_one(*job), jobs.items()):
                if failed:
                    print(failed, file=sys.stderr)
        found = {key: read_result(path) for key, path in keys.items()}
        return {key: result for key, result in found.items() if result is not None}

    def _run_one(self, path: Path, key: Key) -> str | None:
        """Runs the script where there is no result yet; a message where it failed."""
        name, rate, seed, domain = key
        arguments = self.rows[name].arguments.split()
        arguments += ["--seed", str(seed), "--output_dir", str(path), "--disable_tqdm", "true"]
        arguments += ["--learning_rate", str(rate)] if rate else []
        arguments += ["--domain", domain] if domain else []
        arguments += [*self.fixed, *self.options.rest]
        if read_result(path) is not None:
            clear_finished(path)
            return _other_arguments(path, arguments)
        path.mkdir(parents=True, exist_ok=True)
        with write_whole(path / "command.json") as file:
            json.dump(arguments, file)
        with (path / "log.txt").open("w") as log:
            done = subprocess.run(
                [sys.executable, str(self.script), *arguments],
                env={"OMP_NUM_THREADS": "1", **os.environ, ENDS_WITH_STDIN: "1"},
                stdin=self.child_input,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        return f"{path} failed, see its log.txt" if done.returncode else None


def read_result(path: Path) -> Result | None:
    """What a run has written at its end; None where there is nothing, or nothing whole, so that it is run again."""
    try:
        result = json.loads((path / "results.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return result if isinstance(result, dict) else None


def _other_arguments(path: Path, arguments: Sequence[str]) -> str | None:
    """A finished run is taken as it is; a message where its arguments were others."""
    try:
        before = json.loads((path / "command.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None  # a run from before the arguments were written down
    where = arguments.index("--output_dir") + 1  # the folder may have been moved
    if [*arguments[:where], *arguments[where + 1 :]] == [*before[:where], *before[where + 1 :]]:
        return None
    return (
        f"{path} holds the result of other arguments, {' '.join(before)}, which is taken as it is; choose another "
        "--output_dir, or delete it"
    )


def run_folder(folder: Path, row: Experiment, rate: float, seed: int, domain: str | None = None) -> Path:
    """The folder of one run, named by what makes it different."""
    name = "_".join(part.removeprefix("--") for part in row.arguments.split())
    name = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in name)
    return folder / f"{name}_lr{rate:g}_seed{seed}{f'_{safe_name(domain)}' if domain else ''}"


def choose(
    name: str, results: Results, wanted: int, score: Score, *, selection: Sequence[int] | None = None
) -> Choice | None:
    """The learning rate of a row with the best mean validation figure.

    Domains are averaged within a seed. A rate that lacks a run takes no part.

    Args:
        name: of the row.
        results: of all runs.
        wanted: runs of a complete rate.
        score: of one result, higher is better.
        selection: the seeds to choose by; None = all.

    Returns:
        The choice, or None where the chosen rate lacks a run.

    Raises:
        ValueError: several rates, and no validation split to choose by.
    """
    by_rate: dict[float, dict[int, list[Result]]] = {}
    for (row, rate, seed, _), result in results.items():
        if row == name:
            by_rate.setdefault(rate, {}).setdefault(seed, []).append(result)
    if not by_rate:
        return None
    whole = max(len(found) for seeds in by_rate.values() for found in seeds.values())  # domains

    def is_candidate(seeds: dict[int, list[Result]]) -> bool:
        if selection is None:
            return sum(map(len, seeds.values())) == wanted
        return all(len(seeds.get(seed, ())) == whole for seed in selection)

    trained = any(by_rate)
    selection = selection if trained else None
    candidates = {rate: seeds for rate, seeds in by_rate.items() if is_candidate(seeds)}
    if not candidates:
        return None
    judged = sorted(next(iter(candidates.values())) if selection is None else selection)
    scores = {rate: [score(r) for seed in judged for r in seeds[seed]] for rate, seeds in candidates.items()}
    if len(scores) > 1 and None in next(iter(scores.values())):
        raise ValueError(f"{name}: several learning rates, but no validation split to choose by; pass one")
    rate = max(scores, key=lambda rate: mean(scores[rate])) if len(scores) > 1 else next(iter(scores))
    seeds = dict(sorted(candidates[rate].items()))
    if sum(map(len, seeds.values())) != wanted:
        return None
    return Choice(rate, sorted(candidates), judged if len(candidates) > 1 else [], seeds)


def described(name: str, chosen: Choice) -> Result:
    """What every comparison's table says of a row, whatever it measures."""
    first = chosen.results[0]
    return {
        "name": name,
        "learning_rate": chosen.rate,
        "rates_tried": chosen.rates_tried,
        "selected_on": chosen.selected_on,
        "trainable": first["trainable"],
        "share": first["trainable"] / first["parameters"],
        "seconds": mean(result["seconds"] for result in chosen.results),
        "seeds": sorted(chosen.seeds),
    }


def loss_cell(row: Result) -> str:
    """The validation loss, where there is one."""
    return f"{row['validation_loss']:.3f}" if row["validation_loss"] else "–"


def markdown(head: Sequence[str], rows: Sequence[Result], cells: Callable[[Result], Sequence[str]]) -> str:
    """The table, whose first columns every comparison has, and what the choice of the learning rates rests on."""
    if not rows:
        return "no method has all of its runs"
    head = ["method", "trainable", "share", "learning rate", *head]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        first = [
            row["name"],
            f"{row['trainable']:,}",
            f"{100 * row['share']:.2f} %",
            f"{row['learning_rate']:g}" if row["learning_rate"] else "–",
        ]
        lines.append("| " + " | ".join([*first, *cells(row)]) + " |")
    if chosen := next((row["selected_on"] for row in rows if row["selected_on"]), []):
        seeds = ", ".join(map(str, chosen))
        lines += ["", f"Learning rates chosen by validation on {len(chosen)} seed(s): {seeds}."]
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation."""
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")
