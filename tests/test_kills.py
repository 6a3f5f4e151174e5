"""Runs that are killed at their writes, or whose disk is full, go on to what the uninterrupted run leaves."""

import difflib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from faults import KILLED, PHASES, Faults, at_a_fault
from processes import in_a_process

from peft_read.alignment import last_whole_checkpoint
from peft_read.data import generate_how2_mini, write_how2_mini

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = "--num_train_epochs 3 --per_device_train_batch_size 8 --generation_num_beams 1 --use_cpu --disable_tqdm true"
SMALL = f"{SMALL} --generation_max_length 4 --num_test_samples 2 --logging_steps 2 --num_train_samples 16".split()


@pytest.fixture(scope="module")
def how2(tmp_path_factory):
    splits = {"sum_train": (16, 1), "sum_val": (4, 2), "sum_test": (4, 3)}
    clips = {name: generate_how2_mini(count, seed=seed, prefix=name) for name, (count, seed) in splits.items()}
    return write_how2_mini(tmp_path_factory.mktemp("how2"), clips)


@pytest.fixture(scope="module")
def scripts(how2, tmp_path_factory):
    paths = [str(EXAMPLES / "reproduction"), str(EXAMPLES / "method_comparison")]
    sys.path[:0] = paths
    import summarise
    import summarization

    # What this run imports and compiles, the forks need not.
    folder = tmp_path_factory.mktemp("first")
    summarise.main(["--data_dir", str(how2), "--output_dir", str(folder), *SMALL, "--max_steps", "1"])
    yield summarise, summarization
    for path in paths:
        sys.path.remove(path)


def one_run(scripts, how2, folder):
    scripts[0].main(["--data_dir", str(how2), "--output_dir", str(folder), *SMALL])


def one_comparison(scripts, how2, folder):
    """Two runs and their table; a run is a part of the comparison's process, so that its writes are counted too."""
    summarise, summarization = scripts

    def in_process(command, **options):
        summarise.main(command[2:])
        return type("Done", (), {"returncode": 0})

    subprocess.run = in_process
    options = ["--output_dir", str(folder), "--suite", "main", "--only", "read", "--learning_rates", "0.01", "0.03"]
    summarization.main([*options, "--", "--data_dir", str(how2), *SMALL, "--num_train_epochs", "2"])


def outcome(folder):
    """What a run leaves, by file; the clock and the folder's own name left out."""
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or path.name in (".lock", "log.txt", "training_args.bin"):
            continue
        content = path.read_bytes().replace(str(folder).encode(), b"<folder>")
        if path.suffix == ".json":
            content = re.sub(rb'"(seconds|logging_dir)": [^\n]*', b"", content)
        files[name] = content
    return files


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, content in expected.items():
        if actual[name] != content:
            lines = (text.decode("utf-8", "replace").splitlines() for text in (content, actual[name]))
            raise AssertionError(f"{name}: " + "\n".join(list(difflib.unified_diff(*lines, lineterm="", n=0))[:20]))


@pytest.fixture(scope="module")
def uninterrupted(scripts, how2, tmp_path_factory):
    """What each kind of work leaves, and the names of its writes."""
    cache = {}

    def made(work):
        if work not in cache:
            folder = tmp_path_factory.mktemp(work.__name__) / "out"
            names = folder.with_name("writes.json")

            def counted():
                faults = Faults(folder)
                faults.install()
                work(scripts, how2, folder)
                names.write_text(json.dumps(faults.names))

            log = folder.with_name("log.txt")
            assert in_a_process(counted, log) == 0, log.read_text()
            cache[work] = outcome(folder), json.loads(names.read_text())
        return cache[work]

    return made


def kill_and_go_on(work, at, phase, scripts, how2, folder, expected):
    """Kills one write and starts again; whether the kill came to pass."""
    faults, log = Faults(folder, at, phase), folder.with_name("log.txt")

    code = in_a_process(at_a_fault(lambda: work(scripts, how2, folder), faults), log)
    assert code == (1 if phase in ("full", "read-only") else KILLED), log.read_text() if log.exists() else code
    for state in folder.rglob("run.json"):
        claimed = json.loads(state.read_text())["checkpoints"]
        if len(claimed) >= 2 and not (state.parent / "results.json").exists():
            assert last_whole_checkpoint(state.parent) is not None, "the checkpoint before the last one is whole"
    assert in_a_process(lambda: work(scripts, how2, folder), log) == 0, log.read_text()
    assert_same(outcome(folder), expected)


def spread(writes, count, phases=PHASES):
    """Kills spread evenly over all writes, the phases in turn."""
    return [((2 * i + 1) * len(writes) // (2 * count), phases[i % len(phases)]) for i in range(count)]


def test_a_run_survives_kills_at_its_last_checkpoint_and_at_its_results(uninterrupted, scripts, how2, tmp_path):
    expected, writes = uninterrupted(one_run)
    weights = max(i for i, name in enumerate(writes) if name.startswith("checkpoint-6/") and "model" in name)
    results = next(i for i, name in enumerate(writes) if name.startswith(".results.json"))
    for number, (at, phase) in enumerate([(weights, "half"), (results, "full")]):
        folder = tmp_path / str(number)
        kill_and_go_on(one_run, at, phase, scripts, how2, folder / "out", expected)
        shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("work", "count"), [(one_run, 30), (one_comparison, 20)])
def test_fifty_kills_end_as_the_uninterrupted_run(work, count, uninterrupted, scripts, how2, tmp_path):
    expected, writes = uninterrupted(work)
    points = spread(writes, count)
    assert len(points) == count and {phase for _, phase in points} == set(PHASES)
    failed = {}
    for at, phase in points:
        folder = tmp_path / f"{at}_{phase}"
        try:
            kill_and_go_on(work, at, phase, scripts, how2, folder / "out", expected)
        except AssertionError as error:
            failed[at, phase, writes[at]] = str(error)[-600:]
        shutil.rmtree(folder)
    assert not failed


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["full", "read-only"])
def test_a_disk_that_takes_no_more_leaves_the_last_checkpoint_whole(phase, uninterrupted, scripts, how2, tmp_path):
    expected, writes = uninterrupted(one_run)
    for at, _ in spread(writes, 8, phases=(phase,)):
        folder = tmp_path / str(at)
        if "/" in writes[at] or writes[at].startswith("."):  # renamings cannot run out of space
            kill_and_go_on(one_run, at, phase, scripts, how2, folder / "out", expected)
            shutil.rmtree(folder)
