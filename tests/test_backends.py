"""One policy for compiled code: what is installed is used; what does not work is reported once, and torch is used."""

import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from peft_read import backends, show_backends, use_backend

SOURCES = Path(backends.__file__).parents[1]
PROGRAMS = Path(__file__).with_name("programs")


def run(program, **changes):
    environment = {**os.environ, "PYTHONPATH": str(SOURCES), "OMP_NUM_THREADS": "1"}
    environment.pop(backends.VARIABLE, None)
    for name, value in changes.items():
        if value is None:
            environment.pop(name, None)
        else:
            environment[name] = str(value)
    command = [sys.executable, PROGRAMS / program]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture
def undecided(monkeypatch):
    """A process in which no backend was chosen and no warning given yet."""
    for name, value in (("_forced", None), ("_settled_for", {}), ("trials", {}), ("_said", set())):
        monkeypatch.setattr(backends, name, value)
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    return monkeypatch


def test_a_backend_is_chosen_by_block_by_call_and_by_variable(undecided):
    with use_backend("torch"):
        assert backends.backend() == "torch" and backends.is_forced()
        with use_backend("auto"):
            assert backends.backend("meta") == "torch" and not backends.is_forced()
        assert backends.backend() == "torch"
    with pytest.raises(ValueError, match=r"'cuda'.*'auto', 'torch', 'numba'"):
        use_backend("cuda")
    undecided.setenv(backends.VARIABLE, "torch")
    assert backends.backend() == "torch" and backends.VARIABLE in show_backends()
    undecided.setenv(backends.VARIABLE, "nmuba")
    assert backends.backend() == "torch", "a process keeps its choice"
    undecided.setattr(backends, "_settled_for", {})
    with pytest.raises(ValueError, match="nmuba"):
        backends.backend()
    undecided.setenv("PEFT_READ_RECURRENCE", "torch")
    with pytest.raises(ValueError, match="is now PEFT_READ_BACKEND"):
        backends.backend()


def test_installed_means_used(undecided):
    undecided.setattr(backends, "is_installed", lambda package: True)
    undecided.setattr(backends, "_broken", lambda package: "")
    assert backends.backend("cpu") == "numba" and backends.backend("cuda") == "triton"
    undecided.setattr(backends, "_settled_for", {})
    undecided.setattr(backends, "is_installed", lambda package: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.backend("cpu") == backends.backend("cuda") == "torch"
    with pytest.raises(ImportError, match=r"not installed .*pip install numba"):
        use_backend("numba")


def test_a_trial_that_fails_is_reported_once(undecided):
    runs = []

    def explode():
        runs.append(1)
        raise OSError("no space left on device")

    with pytest.warns(RuntimeWarning, match="the loops 4 does not work here .*no space left"):
        assert not backends.passes(("the loops", 4), explode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not backends.passes(("the loops", 4), explode)
    assert runs == [1] and "the loops 4" in show_backends()
    with pytest.warns(RuntimeWarning, match="differ"):
        assert not backends.passes(("others",), lambda: "its values differ")


def test_a_trial_draws_no_random_numbers_and_sees_no_modes(undecided):
    pytest.importorskip("numba")
    from peft_read.recurrence import build_cell

    cell, before = build_cell("gru", 4), torch.get_rng_state()
    with torch.inference_mode():
        cell(torch.zeros(1, 2, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert all(backends.trials.values()) and backends.trials


def test_wrong_loops_are_detected(undecided):
    pytest.importorskip("numba")
    import dataclasses

    from peft_read.recurrence import build_cell
    from peft_read.recurrence.scan import SCANS

    loops = SCANS["rnn"].implementations["numba"]

    def wrong(arguments):
        results = loops.forward(arguments)
        return results._replace(outputs=results.outputs * 1.1)

    undecided.setitem(SCANS["rnn"].implementations, "numba", dataclasses.replace(loops, forward=wrong))
    cell, x = build_cell("rnn", 4), torch.randn(2, 5, 4)
    with pytest.warns(RuntimeWarning, match="numba scan_rnn .*differ from those of torch"):
        outputs, _ = cell(x)
    with use_backend("torch"):
        assert torch.equal(outputs, cell(x)[0])


def test_numba_that_cannot_be_imported_is_reported_once_and_torch_is_used(tmp_path, undecided, capsys):
    folder = tmp_path / "numba"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise ImportError('Numba needs NumPy 2.3 or less. Got NumPy 2.4.')")
    undecided.delitem(sys.modules, "numba", raising=False)
    undecided.syspath_prepend(tmp_path)
    for name in ("is_installed", "_broken"):  # asked anew
        undecided.setattr(backends, name, getattr(backends, name).__wrapped__)
    runpy.run_path(str(PROGRAMS / "read_and_pvla.py"))
    printed = capsys.readouterr().out
    assert printed.count("SAID") == 1 and "Numba needs NumPy 2.3" in printed and "CPU torch" in printed
    undecided.setenv(backends.VARIABLE, "numba")
    undecided.setattr(backends, "_settled_for", {})
    with pytest.raises(ImportError, match=r"cannot be imported \(ImportError: Numba needs NumPy 2.3"):
        runpy.run_path(str(PROGRAMS / "read_and_pvla.py"))


@pytest.mark.slow
def test_numba_without_its_compiler_is_reported_once():
    pytest.importorskip("numba")
    found = run("read_and_pvla.py", NUMBA_DISABLE_JIT="1")
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("SAID") == 1 and "NUMBA_DISABLE_JIT" in found.stdout and "CPU torch" in found.stdout


@pytest.mark.slow
def test_an_exception_of_the_compiler_is_reported_and_torch_is_used():
    pytest.importorskip("numba")
    found = run("compiler_that_fails.py")
    assert found.returncode == 0, found.stderr
    assert "LLVM has no idea" in found.stdout and found.stdout.count("SAID") == 1  # for every path


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs a folder that nobody may write to")
def test_without_a_folder_for_machine_code_it_stays_in_memory():
    pytest.importorskip("numba")
    found = run("no_cache_folder.py")
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("1 numba has no folder") and "NUMBA_CACHE_DIR" in found.stdout


@pytest.mark.slow
def test_one_process_of_a_machine_compiles(tmp_path):
    pytest.importorskip("numba")
    environment = {**os.environ, "PYTHONPATH": str(SOURCES), "NUMBA_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment.pop(backends.VARIABLE, None)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    running = [subprocess.Popen([sys.executable, PROGRAMS / "one_compilation.py"], **pipes) for _ in range(2)]
    found = [process.communicate(timeout=600) for process in running]
    assert sorted(out.split()[-1] for out, _ in found) == ["0", "1"], found
    assert sum(error.count("compiling the scan, once") for _, error in found) == 1
