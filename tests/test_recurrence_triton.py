"""The Triton kernels: in the CPU interpreter the values and gradients of the plain loops; compiled for a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

SCANS = """
import torch
from torch import nn
from peft_read.recurrence import build_cell, operators, use_backend
from peft_read.recurrence.naive import naive_recurrence

torch.set_num_threads(1)
torch.manual_seed(0)
use_backend("triton")
launches = 0
def counted(*arguments, run=operators._by_kernels):
    global launches
    launches += 1
    return run(*arguments)
operators._by_kernels = counted

def a_cell(kind, size, bias=True):
    cell = build_cell(kind, size, bias=bias)
    for parameter in cell.parameters():
        nn.init.normal_(parameter, std=0.4)
    return cell

def in_float64(cell, x, state, mask):
    weights = dict.fromkeys(("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    weights |= {name: p.detach().double().requires_grad_() for name, p in cell.named_parameters()}
    x, state = (tensor.detach().double().requires_grad_() for tensor in (x, state))
    outputs, states = naive_recurrence(cell.kind, x, weights, state, mask)
    return outputs, states, [x, state, *(weights[name] for name, _ in cell.named_parameters())]

def close(ours, known):
    error = (ours.double() - known).abs().max() / known.abs().max().clamp_min(1e-3)
    assert error < 2e-6, error

for kind in ("rnn", "gru", "lstm"):
    for size, length, masked, bias in ((4, 7, True, True), (5, 5, False, True), (1, 5, True, False)):
        cell = a_cell(kind, size, bias)
        x = torch.randn(3, length, size, requires_grad=True)
        state = torch.randn(3, cell.state_size, requires_grad=True)
        mask = None
        if masked:
            mask = torch.rand(3, length) > 0.3
            mask[1], mask[2, :2] = False, False
        outputs, states = cell(x, state, mask, keep_states=True)
        known_outputs, known_states, known_leaves = in_float64(cell, x, state, mask)
        close(outputs, known_outputs)
        close(states, known_states)
        probe = torch.randn(states.shape)
        losses = {"all": lambda o, s: (s * probe).sum() + o.square().sum(), "last": lambda o, s: o[:, -1].sum()}
        for loss in losses.values():
            found = torch.autograd.grad(loss(outputs, states), [x, state, *cell.parameters()], retain_graph=True)
            known = torch.autograd.grad(loss(known_outputs, known_states), known_leaves, retain_graph=True)
            for ours, theirs in zip(found, known, strict=True):
                close(ours, theirs)
    # In pieces, in bfloat16, backward in time, and differentiated twice.
    cell, x = a_cell(kind, 4), torch.randn(2, 6, 4)
    with torch.no_grad():
        whole, states = cell(x, keep_states=True)
        first, before = cell(x[:, :2], keep_states=True)
        second, _ = cell(x[:, 2:], before[:, -1])
        assert torch.equal(torch.cat((first, second), dim=1), whole)
    half = a_cell(kind, 4).bfloat16()
    outputs, _ = half(x.bfloat16())
    assert outputs.dtype == torch.float32
    close(outputs, in_float64(half, x.bfloat16(), torch.zeros(2, half.state_size), None)[0])
    x = x[:, :3].requires_grad_()
    twice = []
    for name in ("triton", "torch"):
        with use_backend(name):
            (gradient,) = torch.autograd.grad(cell(x)[0].square().sum(), x, create_graph=True)
            twice.append((gradient, *torch.autograd.grad(gradient.square().sum(), [x, *cell.parameters()])))
    for ours, theirs in zip(*twice, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
assert launches == 3 * (3 + 3 + 1 + 1), launches
x = torch.randn(2, 3, 4)
x[0, 1, 0], x[1, 1, 0] = torch.nan, torch.inf
with torch.no_grad():
    outputs, _ = a_cell("rnn", 4)(x)
assert outputs[0, 1:].isnan().any() and outputs[0, 0].isfinite().all() and outputs[1, 1].isfinite().all()
# What does not fit goes to torch.
launches = 0
a_cell("rnn", 4).double()(torch.randn(2, 3, 4).double())
a_cell("rnn", 65)(torch.randn(1, 2, 65))
weights = dict(cell.named_parameters())
torch.func.grad(lambda one: torch.func.functional_call(cell, weights, (one,))[0].sum())(torch.randn(2, 3, 4))
with use_backend("torch"):
    cell(torch.randn(2, 3, 4))
assert launches == 0
# Inside a compiled graph.
cell = a_cell("gru", 4)
x = torch.randn(2, 3, 4, requires_grad=True)
both = []
for run in (cell, torch.compile(cell, backend="aot_eager", fullgraph=True)):
    outputs, _ = run(x)
    both.append((outputs, *torch.autograd.grad(outputs.square().sum(), [x, *cell.parameters()])))
assert launches == 2
for ours, theirs in zip(*both, strict=True):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
"""

COMPILATION = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from peft_read.recurrence import triton_scan

for kind in ("rnn", "gru", "lstm"):
    for kernel in (getattr(triton_scan, f"_{kind}_forward"), getattr(triton_scan, f"_{kind}_backward")):
        fixed = {"MASKED": True, "K": 4, "REMEMBERED": True}
        fixed = {name: value for name, value in fixed.items() if name in kernel.arg_names}
        types = {"real": "*u8", "length": "i32", "k": "i32"}
        signature = {name: "constexpr" if name in fixed else types.get(name, "*fp32") for name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=fixed)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1})
        assert "async_copy_global" in compiled.asm["ttgir"], f"{kernel.__name__} waits for every load"
        assert "cubin" in compiled.asm
"""


def run(script, **environment):
    # A process of its own: Triton reads TRITON_INTERPRET once, when it is imported.
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1", **environment}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_scans_agree_with_the_plain_loops():
    run(SCANS, TRITON_INTERPRET="1")


def test_the_scans_compile_for_a_gpu_and_load_ahead(tmp_path):
    run(COMPILATION, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
