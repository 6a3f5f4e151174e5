"""The Triton kernels: in the CPU interpreter the values and gradients of the plain loops; compiled for a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from test_transport_triton import NO_WAITS

SCANS = """
import torch
from torch import nn
from peft_read import use_backend
from peft_read.recurrence import build_cell
from peft_read.recurrence.naive import naive_recurrence
from peft_read.recurrence.triton_kernels import launch

torch.set_num_threads(1)
torch.manual_seed(0)
use_backend("triton")
launches = 0
def counted(*arguments, run=launch._launch_scan):
    global launches
    launches += 1
    return run(*arguments)

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

for size in (1, 4, 5):
    a_cell("rnn", size)(torch.zeros(1, 1, size))  # the trials
launch._launch_scan = counted
for kind in ("rnn",):
    cases = ((4, 9, True, True), (5, 8, False, True), (1, 5, True, False), (3, 2, True, True))
    for size, length, masked, bias in cases:
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
assert launches == 4 + 3 + 1 + 1, launches
x = torch.randn(2, 3, 4)
x[0, 1, 0], x[1, 1, 0] = torch.nan, torch.inf
with torch.no_grad():
    outputs, _ = a_cell("rnn", 4)(x)
assert outputs[0, 1:].isnan().all() and outputs[0, 0].isfinite().all() and outputs[1, 1].isfinite().all()
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
cell = a_cell("rnn", 4)
x = torch.randn(2, 3, 4, requires_grad=True)
both = []
for run in (cell, torch.compile(cell, backend="aot_eager", fullgraph=True)):
    outputs, _ = run(x)
    both.append((outputs, *torch.autograd.grad(outputs.square().sum(), [x, *cell.parameters()])))
assert launches == 2
for ours, theirs in zip(*both, strict=True):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
"""

ADAPTER = (
    NO_WAITS
    + """
import torch
from torch import nn
from torch.nn import functional as F
from peft_read import use_backend
from peft_read.recurrence import adapt_in_one, build_cell
from peft_read.recurrence.triton_kernels import launch

torch.set_num_threads(1)
torch.manual_seed(0)
use_backend("triton")
launches = 0

def an_adapter(size, width, bias=True):
    parts = nn.Linear(width, size, bias=bias), build_cell("rnn", size, bias=bias), nn.Linear(size, width, bias=bias)
    for part in parts:
        for parameter in part.parameters():
            nn.init.normal_(parameter, std=0.4)
    return parts

def in_one(output, down, cell, up, state, mask):
    found = adapt_in_one(output, down, cell, nn.Identity(), up, state=state, mask=mask)
    assert found is not None
    return found

def in_parts(output, down, cell, up, state, mask):
    hidden, _ = cell(down(output.to(down.weight.dtype)), state, mask)
    delta = up(F.gelu(hidden)).to(output.dtype)
    return output + (delta if mask is None else delta * mask[..., None]), hidden

def everything(run, parts, output, state, mask, probes, twice=False):
    out, hidden = run(output, *parts, state, mask)
    leaves = [output, *([] if state is None else [state]), *(p for part in parts for p in part.parameters())]
    total = (out * probes[0]).sum() + (hidden * probes[1]).sum()
    gradients = torch.autograd.grad(total, leaves, create_graph=twice)
    if twice:
        squares = sum(one.square().sum() for one in gradients)
        gradients = torch.autograd.grad(squares, leaves, materialize_grads=True)
    return out, hidden, *gradients

def compare(found, known, tolerance):
    for ours, theirs in zip(found, known, strict=True):
        error = (ours.double() - theirs).abs().max() / theirs.abs().max().clamp_min(1e-3)
        assert error < tolerance, error

for size, width, dtype in ((4, 24, torch.float32), (5, 16, torch.float32), (4, 16, torch.bfloat16)):
    in_one(torch.zeros(1, 1, width, dtype=dtype), *an_adapter(size, width), None, None)  # the trials
def counted(*arguments, run=launch._launch_scan):
    global launches
    launches += 1
    return run(*arguments)
launch._launch_scan = counted
for size, width, length, bias, masked, dtype in (
    (4, 24, 70, True, True, torch.float32), (5, 16, 5, False, False, torch.float32),  # of 70 tokens several parts
    (4, 16, 5, True, True, torch.bfloat16),
):
    parts = an_adapter(size, width, bias)
    output = torch.randn(2, length, width).to(dtype).requires_grad_()
    state = torch.randn(2, size).tanh().requires_grad_() if masked else None
    mask = torch.rand(2, length) > 0.3 if masked else None
    probes = torch.randn(2, length, width).to(dtype), torch.randn(2, length, size)
    with NoWaits():
        found = everything(in_one, parts, output, state, mask, probes)
    if masked:
        assert torch.equal(found[0][~mask], output[~mask])
    assert found[0].dtype == dtype and found[1].dtype == torch.float32
    assert launches == 1
    launches = 0
    with use_backend("torch"):
        if dtype == torch.bfloat16:  # rounded alike, but for a sum on the border
            compare(found, everything(in_parts, parts, output, state, mask, probes), 8e-3)
            continue
        for part in parts:
            part.double()
        leaves = [None if one is None else one.detach().double().requires_grad_() for one in (output, state)]
        compare(found, everything(in_parts, parts, *leaves, mask, probes), 2e-6)
parts, output = an_adapter(4, 16), torch.randn(1, 3, 16, requires_grad=True)
probes = torch.randn(1, 3, 16), torch.randn(1, 3, 4)
found = everything(in_one, parts, output, None, None, probes, twice=True)
with use_backend("torch"):
    compare(found, [one.double() for one in everything(in_parts, parts, output, None, None, probes, twice=True)], 1e-4)
down, cell, up = parts
for takes in (
    adapt_in_one(output.double(), down, cell, nn.Identity(), up),
    adapt_in_one(output, down, cell, nn.Dropout(0.5), up),
    adapt_in_one(output, down, build_cell("gru", 4), nn.Identity(), up),
    adapt_in_one(torch.randn(2, 3, 16).transpose(0, 1), down, cell, nn.Identity(), up),
    adapt_in_one(torch.randn(1, 2, 32), *(lambda d, c, u: (d, c, nn.Identity(), u))(*an_adapter(17, 32))),
):
    assert takes is None
"""
)


def run(script, **environment):
    # A process of its own: Triton reads TRITON_INTERPRET once, when it is imported.
    here = Path(__file__).parent
    paths = os.pathsep.join((str(here), str(here.parent / "src")))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_the_scan_agrees_with_the_plain_loops_and_with_torch():
    run(SCANS, TRITON_INTERPRET="1")


def test_the_adapter_agrees_with_its_parts_and_waits_for_nothing():
    run(ADAPTER, TRITON_INTERPRET="1")
