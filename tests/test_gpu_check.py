"""The check of the GPU itself: that it runs, on the CPU, and notices what is wrong."""

import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_check

    yield gpu_check
    for name in ("gpu_check", "free_layer", "benchmark_report", "topics"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_the_smoke_test_runs_every_part(gpu_check, tmp_path, capsys):
    assert gpu_check.main(["--smoke", "--repeats", "1", "--output", str(tmp_path / "check")]) == 0
    printed = capsys.readouterr().out
    for part in ("largest relative error", "a compiled step: READ", "DDP:", "waits for the device", "static cache"):
        assert part in printed
    assert (tmp_path / "check.json").exists() and (tmp_path / "check.md").exists()


def test_without_a_gpu_it_says_so(gpu_check, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu_check.main([]) == 2
    assert "--smoke runs the script on the CPU" in capsys.readouterr().out


def test_a_wrong_kernel_is_missed(gpu_check, monkeypatch):
    monkeypatch.setattr(gpu_check, "DEVICE", "cpu")
    assert gpu_check.scan_error("rnn", 4, 37, True, True) < 1e-4
    right = gpu_check.naive_recurrence
    monkeypatch.setattr(gpu_check, "naive_recurrence", lambda *args: (right(*args)[0] * 1.01, None))
    assert gpu_check.scan_error("rnn", 4, 37, True, True) > 1e-3
    assert not gpu_check.Check("a limit", float("nan"), 1.0).passed


def test_a_part_that_ends_by_an_error_is_missed_and_the_others_go_on(gpu_check, monkeypatch, capsys):
    def broken(repeats):
        yield gpu_check.Check("before", 1.0, 2.0)
        raise RuntimeError("no such kernel")

    def sound(repeats):
        yield gpu_check.Check("after", 1.0)

    monkeypatch.setattr(gpu_check, "PARTS", (broken, sound))
    assert gpu_check.main(["--smoke"]) == 1
    report = capsys.readouterr()
    assert "| broken: ended by an error | 1 | 0 | **missed** |" in report.out
    assert "| before | 1 | 2 | passed |" in report.out and "| after | 1 |  |  |" in report.out
    assert "no such kernel" in report.err
