"""Launches of Triton kernels: what is asked of Triton once, and what goes to the compiled kernel, with a stand-in."""

import pytest
import torch

from peft_read import kernel_launch
from peft_read.kernel_launch import launch


class Compiled:
    """What a call of a kernel returns; its own calls take all arguments, compile-time ones too."""

    def __init__(self, calls):
        self.calls = calls

    def __getitem__(self, grid):
        return lambda *arguments: self.calls.append((grid, arguments))


class Kernel:
    """A kernel of two tensors, a size, and two settings."""

    arg_names = ("x", "mask", "size", "FIRST", "SECOND")

    def __init__(self):
        self.asked, self.calls = [], []

    def __getitem__(self, grid):
        def run(*arguments, **settings):
            self.asked.append((grid, arguments, settings))
            return Compiled(self.calls)

        return run


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(kernel_launch, "LAUNCHERS", {})
    monkeypatch.setattr(kernel_launch, "_compiled_kernel", lambda: Compiled)
    monkeypatch.setattr(kernel_launch, "_version", lambda: (3, 6))
    return Kernel()


def test_a_launch_that_was_made_goes_to_its_compiled_kernel(kernel):
    x, mask = torch.randn(4, 4), torch.ones(4, dtype=torch.bool)
    launch(kernel, (2,), x, mask, 5, SECOND=True, FIRST=7, num_warps=1)
    [(grid, arguments, settings)] = kernel.asked
    assert grid == (2,) and arguments[0] is x and arguments[1].dtype == torch.uint8 and arguments[2] == 5
    assert settings == {"SECOND": True, "FIRST": 7, "num_warps": 1, "enable_fp_fusion": True}
    assert not kernel.calls
    launch(kernel, (2,), x.clone(), None, 5, SECOND=True, FIRST=7, num_warps=1)  # absent: any tensor, of another dtype
    launch(kernel, (2,), x, mask, 5, SECOND=True, FIRST=7, num_warps=1)
    assert len(kernel.asked) == 2
    [(grid, (first, second, size, *constants))] = kernel.calls
    assert grid == (2, 1, 1) and first is x and second.dtype == torch.uint8 and size == 5
    assert constants == [7, True]  # in the order of the kernel's arguments


@pytest.mark.parametrize("change", ["size", "dtype", "grid", "setting", "kernel"])
def test_triton_is_asked_about_other_launches(kernel, change):
    given = {"grid": (2,), "x": torch.randn(4, 4), "size": 5, "FIRST": 7}
    other = {"size": {"size": 16}, "dtype": {"x": torch.randn(4, 4).half()}, "grid": {"grid": (3,)},
             "setting": {"FIRST": 8}}.get(change, {})  # fmt: skip
    kernels = [kernel, Kernel() if change == "kernel" else kernel]
    for number, one in ((0, given), (1, given | other)):
        launch(kernels[number], one["grid"], one["x"], None, one["size"], FIRST=one["FIRST"], SECOND=1)
    assert sum(len(one.asked) for one in dict.fromkeys(kernels)) == 2
    assert not kernel.calls


def test_addresses_that_triton_compiles_another_kernel_for_are_not_kept(kernel):
    odd = torch.randn(17)[1:]
    assert odd.data_ptr() % 16
    for _ in range(2):
        launch(kernel, (1,), odd, None, 5, FIRST=7, SECOND=1)
    assert len(kernel.asked) == 2 and not kernel_launch.LAUNCHERS


def test_launches_that_are_kept_do_not_grow_for_ever(kernel, monkeypatch):
    monkeypatch.setattr(kernel_launch, "MOST", 3)
    for size in range(2, 9):
        launch(kernel, (1,), torch.randn(4), None, size, FIRST=7, SECOND=1)
        assert 1 <= len(kernel_launch.LAUNCHERS) <= 3


def test_old_versions_and_the_interpreter_are_asked_every_time(kernel, monkeypatch):
    monkeypatch.setattr(kernel_launch, "_version", lambda: (3, 2))
    for _ in range(2):
        launch(kernel, (1,), torch.randn(4), None, 5, FIRST=7, SECOND=1)
    monkeypatch.setattr(kernel_launch, "_version", lambda: (3, 6))
    monkeypatch.setattr(Kernel, "__getitem__", lambda self, grid: lambda *a, **k: self.asked.append(grid))
    for _ in range(2):
        launch(kernel, (1,), torch.randn(4), None, 5, FIRST=7, SECOND=1)
    assert len(kernel.asked) == 4 and not kernel_launch.LAUNCHERS
