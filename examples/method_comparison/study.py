"""The methods compared with enough runs to know: one command, resumable, all numbers in one file.

    python examples/method_comparison/study.py --data_dir data --output_dir outputs/study \
        --text_encoder sentence-transformers/all-MiniLM-L6-v2 --jobs 2 --dry_run
    python examples/method_comparison/study.py ... --limit_minutes 300    # starts no run after that time
    python examples/method_comparison/study.py --summarise outputs/study/results.json.xz --to docs/study
    python examples/method_comparison/study.py --restore docs/study/results.json.xz --output_dir outputs/study

`study_settings.py` holds what is fixed in advance, docs/study.md describes it. The first command says what there is to
do, without `--dry_run` it does it: pretrains the backbones, chooses a configuration of every method on validation
queries, runs the chosen ones with the main seeds, setting after setting, and writes `results.json.xz`. What has a
result is not run again, and an interrupted run goes on from its last checkpoint. `--summarise` makes every table and
picture from that file alone, `--restore` writes its runs' results into folders, so that a study that was begun on
another machine goes on. What follows `--` goes to every run, and makes it another run, which needs an output folder
of its own: `-- --use_cpu`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "reproduction"))
from run_folder import clear_finished, lock_folder, only_run_in
from study_identity import check_identity, identity, write_identity
from study_results import collect, read_results, restore, write_results
from study_runs import BackboneRun, Places, Plan, Run
from study_settings import BACKBONES, SETTINGS
from study_summary import summarise
from workers import Job, Workers

RESULTS = "results.json.xz"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, help="folder of the runs and of the results")
    parser.add_argument("--data_dir", type=Path, help="folder with qvhighlights, features, tvsum, moments")
    parser.add_argument("--text_encoder", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--rows", nargs="+", help="these methods only")
    parser.add_argument(
        "--configurations",
        type=int,
        help="of every method, the first so many; default: those that the reported "
        "runs of the folder were chosen from, or all",
    )
    parser.add_argument("--seeds", type=int, help="main seeds; default: those of the setting")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--limit_minutes", type=float, help="start no run after so many")
    parser.add_argument("--dry_run", action="store_true", help="say what there is to do, and how long it takes")
    parser.add_argument("--summarise", type=Path, metavar="RESULTS", help="tables and pictures of such a file")
    parser.add_argument("--restore", type=Path, metavar="RESULTS", help="write its runs' results into --output_dir")
    parser.add_argument("--to", type=Path, help="where they go; default: the folder of the file")
    parser.add_argument("rest", nargs="*", help="after --: arguments of every run")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 1 where a run has failed or is damaged."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if options.summarise is not None:
        try:
            print(summarise(read_results(options.summarise), options.to or options.summarise.parent))
        except (OSError, ValueError) as error:
            parser.error(f"--summarise: {error}")
        return 0
    if options.restore is not None:
        if options.output_dir is None:
            parser.error("--restore needs --output_dir")
        try:
            results = read_results(options.restore)
            with only_run_in(options.output_dir):
                written = restore(results, options.output_dir)
        except (OSError, ValueError) as error:
            parser.error(f"--restore: {error}")
        print(f"{written} results written into {options.output_dir}; those that were there are kept")
        return 0
    try:
        study = Study(parser, options)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if options.dry_run:
        print(study.describe())
        return 0
    return study.run()


class Study:
    """All settings, in their order.

    Args:
        parser: of the command line; bad options end here.
        options: its values.

    Raises:
        FileNotFoundError: data that a setting needs is absent.
        ValueError: another study is at work in the folder.
    """

    def __init__(self, parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
        if options.output_dir is None or options.data_dir is None:
            parser.error("--output_dir and --data_dir are needed (or --summarise RESULTS)")
        for name in ("jobs", "configurations", "seeds"):
            if getattr(options, name) is not None and getattr(options, name) < 1:
                parser.error(f"--{name} {getattr(options, name)} must be at least 1")
        if options.limit_minutes is not None and not 0 <= options.limit_minutes < float("inf"):
            parser.error(f"--limit_minutes {options.limit_minutes} must be finite and not negative")
        known = {row for name in options.settings for row in SETTINGS[name].rows}
        if unknown := set(options.rows or ()) - known:
            parser.error(f"--rows {sorted(unknown)}: the rows of these settings are {sorted(known)}")
        self.parser, self.options = parser, options
        # Runs are called from other folders than this one: their paths are whole.
        places = Places(
            options.data_dir.resolve(), options.output_dir.resolve(), options.text_encoder, tuple(options.rest)
        )
        self.places = places
        self.known = self._read_known()
        self.collected()  # what would be lost is an error before a run is made
        self._check_folder()
        plans = self._plans(configurations=options.configurations, seeds=options.seeds, rows=options.rows)
        self.plans = {name: plans[name] for name in SETTINGS if name in options.settings}
        for name, plan in self.plans.items():
            if plan.setting.choices_of and plan.setting.choices_of not in self.plans and not plan.choices():
                print(
                    f"{name}: nothing is chosen yet by {plan.setting.choices_of}, whose choices it takes",
                    file=sys.stderr,
                )
        for plan in self.plans.values():
            places.fill(f"{plan.setting.arguments} {plan.setting.tune} {plan.setting.main}")
        for backbone in self._backbones():
            if not backbone.is_done:
                places.fill(BACKBONES[backbone.name].arguments)
        self.identity = identity(places, self._arguments())
        check_identity(places.output, self.identity)

    def _arguments(self) -> list[str]:
        """Of all runs and backbones of this call, with the names of their places."""
        settings = [plan.setting for plan in self.plans.values()]
        own = [f"{setting.arguments} {setting.tune} {setting.main}" for setting in settings]
        return own + [BACKBONES[setting.backbone].arguments for setting in settings]

    def _read_known(self) -> dict[str, Any] | None:
        path = self.places.output / RESULTS
        if not path.exists():
            return None
        try:
            return read_results(path)
        except ValueError as error:
            raise ValueError(f"{error}; move it away, and it is made again of the folders beside it") from error

    def _plans(
        self, *, configurations: int | None = None, seeds: int | None = None, rows: Sequence[str] | None = None
    ) -> dict[str, Plan]:
        """Of all settings; without a number of configurations each has those that its reported runs come from."""
        plans: dict[str, Plan] = {}
        for name, setting in SETTINGS.items():
            source, chooses = setting.choices_of, None
            if source is not None:
                number = configurations or self._chosen_with(source)
                chooses = Plan(source, SETTINGS[source], self.places, configurations=number)
            number = configurations or self._chosen_with(source or name)
            plans[name] = Plan(
                name, setting, self.places, configurations=number, seeds=seeds, rows=rows, chooses=chooses
            )
        return plans

    def _chosen_with(self, name: str) -> int | None:
        known = (self.known or {"settings": {}})["settings"].get(name, {})
        return Plan(name, SETTINGS[name], self.places).chosen_with() or known.get("configurations")

    def collected(self) -> dict[str, Any]:
        """The results of all settings: the file holds what the folder does, whatever this call is restricted to.

        Raises:
            ValueError: the file in the folder holds runs that would be lost.
        """
        results, self.damaged = collect(self._plans(), self.known)
        return results

    def _check_folder(self) -> None:
        """Names finished runs that are none of this study's; alone in the folder they are another study."""
        output = self.places.output
        finished = {path.parent for name in SETTINGS for path in (output / name).glob("*/*/results.json")}
        others = sorted(finished - {run.folder for plan in self._plans().values() for run in plan.recorded()})
        if not others:
            return
        what = (
            f"{len(others)} finished runs in {output}, such as {others[0].relative_to(output)}, have other arguments "
            "after -- or are of another version of the settings"
        )
        if len(others) == len(finished):
            raise ValueError(f"{what}; choose another --output_dir, or call it with theirs")
        print(f"{what}: they are left out", file=sys.stderr)

    def _save(self) -> None:
        self.known = self.collected()
        write_results(self.places.output / RESULTS, self.known)

    def _damage(self) -> list[str]:
        return [
            f"{folder} is damaged: {what}. Its numbers are those of {RESULTS}, where it has any; the same command "
            "runs it anew, where it is not restricted to others, and so does deleting the folder"
            for folder, what in self.damaged.items()
        ]

    def describe(self) -> str:
        """What there is to do, in the order in which it is done."""
        lines = ["| | runs | done | to do | minutes a run | core-minutes to do |", "|---|---|---|---|---|---|"]
        total = 0.0
        for run in self._backbones():
            minutes = 0.0 if run.is_done else BACKBONES[run.name].minutes
            total += minutes
            lines.append(
                f"| backbone {run.name} | 1 | {int(run.is_done)} | {int(not run.is_done)} | "
                f"{BACKBONES[run.name].minutes:g} | {minutes:.0f} |"
            )
        for name, plan in self.plans.items():
            results = [result for run in plan.tuning_runs() + plan.main_runs() if (result := run.whole)]
            trained = [result["seconds"] / 60 for result in results if result["trainable"]]
            each = mean(trained) if trained else plan.setting.minutes
            left = plan.count() - len(results)
            total += left * each
            source = "measured" if trained else "estimated"
            lines.append(
                f"| {name} | {plan.count()} | {len(results)} | {left} | {each:.1f} ({source}) | {left * each:.0f} |"
            )
        jobs = self.options.jobs
        lines += [
            "",
            f"{total:.0f} core-minutes, {total / 60:.1f} core-hours; {total / jobs:.0f} minutes with --jobs {jobs}",
        ]
        return "\n".join(lines)

    def run(self) -> int:
        """Does it; the exit status."""
        options, output = self.options, self.places.output
        try:
            output.mkdir(parents=True, exist_ok=True)
            lock = lock_folder(output)
            write_identity(output, check_identity(output, self.identity))
        except (OSError, ValueError) as error:
            self.parser.error(f"--output_dir: {error}")
        limit = options.limit_minutes
        ends = None if limit is None else time.monotonic() + 60 * limit
        try:
            self.known = self._read_known()  # another call may have ended since
            with Workers(options.jobs, ends=ends, say=_say) as workers:
                failed = self._run(workers)
                over = workers.time_is_over
        finally:
            try:
                self._save()
            finally:
                lock.release()
        print(self.describe())
        print(
            f"{output / RESULTS} holds all results"
            + ("; the time is over, go on with the same command" if over else "")
        )
        failed += self._damage()
        for message in failed:
            print(message, file=sys.stderr)
        return 1 if failed else 0

    def _run(self, workers: Workers) -> list[str]:
        """Messages of what failed; the other settings go on."""
        failed: list[str] = []
        tried: set[str] = set()  # backbones: several settings share one
        for name, plan in self.plans.items():
            if workers.time_is_over:
                break
            backbone = BackboneRun(plan.setting.backbone, self.places)
            try:
                self._prepare(plan)
                if not backbone.is_done and backbone.name not in tried:
                    tried.add(backbone.name)
                    failed += workers.run([backbone.job()])
            except (OSError, ValueError) as error:
                failed.append(f"{name}: {error}")
                continue
            if not backbone.is_done:
                continue
            for runs in (plan.first_round, plan.second_round, plan.main_runs):
                _say(f"{name}, {runs.__name__.replace('_', ' ')}")
                failed += workers.run(self._jobs(runs(), failed))
            self._save()
        return failed

    def _jobs(self, runs: Sequence[Run], failed: list[str]) -> Iterator[Job]:
        for run in self._left(runs):
            try:
                yield run.job()
            except (OSError, ValueError) as error:
                failed.append(f"{run.folder}: {error}")

    def _prepare(self, plan: Plan) -> None:
        """Data that is made of the data."""
        if "{moments_by_source}" not in plan.setting.arguments:
            return
        folder = self.places.output / "moments_by_source"
        if not all((folder / name).exists() for name in ("sources.json", "sum_val/tran.tok.txt")):  # first and last
            from moments_by_source import write_moments_by_source

            annotations = self.places.fill(
                "{qvhighlights/highlight_val_release.jsonl} {qvhighlights/highlight_test_with_gt.jsonl}"
            )
            write_moments_by_source(self.places.data / "moments", *map(Path, annotations), folder)

    def _backbones(self) -> list[BackboneRun]:
        names = dict.fromkeys(plan.setting.backbone for plan in self.plans.values())
        return [BackboneRun(name, self.places) for name in names]

    def _left(self, runs: Sequence[Run]) -> Iterator[Run]:
        seen = set()
        for run in runs:
            if run.whole is not None:
                clear_finished(run.folder)
            elif run.folder not in seen:
                seen.add(run.folder)
                yield run


def _say(line: str) -> None:
    print(time.strftime("%H:%M:%S"), line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
