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

ADAPTER = """
import torch
from torch import nn
from torch.nn import functional as F
from peft_read.recurrence import adapter_fits, adapter_in_one_pass, adapter_operator, build_cell, use_backend

torch.set_num_threads(1)
torch.manual_seed(0)
use_backend("triton")
launches = 0
def counted(*arguments, run=adapter_operator._by_kernel):
    global launches
    launches += 1
    return run(*arguments)
adapter_operator._by_kernel = counted

def an_adapter(size, width, bias=True):
    parts = nn.Linear(width, size, bias=bias), build_cell("rnn", size, bias=bias), nn.Linear(size, width, bias=bias)
    for parameter in parts[1].parameters():
        nn.init.normal_(parameter, std=0.4)
    return parts

def in_parts(output, down, cell, up, state, mask):
    hidden, _ = cell(down(output.to(down.weight.dtype)), state, mask)
    return output + up(F.gelu(hidden)).to(output.dtype), hidden

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

for size, width, length, bias, masked, dtype in (
    (4, 24, 7, True, True, torch.float32), (5, 16, 5, False, False, torch.float32),
    (4, 16, 5, True, True, torch.bfloat16),
):
    parts = an_adapter(size, width, bias)
    output = torch.randn(2, length, width).to(dtype).requires_grad_()
    state = torch.randn(2, size).tanh().requires_grad_() if masked else None
    mask = torch.rand(2, length) > 0.3 if masked else None
    probes = torch.randn(2, length, width).to(dtype), torch.randn(2, length, size)
    assert adapter_fits(output, mask, parts[0], parts[1], nn.Identity(), parts[2])
    found = everything(adapter_in_one_pass, parts, output, state, mask, probes)
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
found = everything(adapter_in_one_pass, parts, output, None, None, probes, twice=True)
with use_backend("torch"):
    compare(found, [one.double() for one in everything(in_parts, parts, output, None, None, probes, twice=True)], 1e-4)
down, cell, up = parts
assert not adapter_fits(output.double(), None, down, cell, nn.Identity(), up)
assert not adapter_fits(output, None, down, cell, nn.Dropout(0.5), up)
assert not adapter_fits(output, None, down, build_cell("gru", 4), nn.Identity(), up)
assert not adapter_fits(torch.randn(2, 3, 16).transpose(0, 1), None, down, cell, nn.Identity(), up)
big = an_adapter(16, 2048)
assert not adapter_fits(torch.randn(1, 2, 2048), None, big[0], big[1], nn.Identity(), big[2])
"""

TRIAL = """
import warnings
from peft_read.recurrence import trial, triton_adapter, triton_scan

before = torch.get_rng_state()
assert trial.kernels_work("cpu")
assert torch.equal(before, torch.get_rng_state())

def spoiled(function, which):
    def run(*arguments):
        results = list(function(*arguments))
        results[which] = results[which] * 1.1
        return tuple(results)
    return run

for module, name, which, message in (
    (triton_scan, "scan_forward", 0, "the scan of the RNN is wrong"),
    (triton_scan, "scan_backward", 2, "the scan of the RNN is wrong"),
    (triton_adapter, "adapter_forward", 0, "the pass over the whole adapter is wrong"),
    (triton_adapter, "adapter_gradients", 3, "the pass over the whole adapter is wrong"),
    (triton_scan, "scan_forward", 9, "IndexError"),
):
    function = getattr(module, name)
    setattr(module, name, spoiled(function, which))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert not trial.kernels_work.__wrapped__("cpu")
    assert message in str(caught[-1].message), caught[-1].message
    setattr(module, name, function)
"""

COMPILATION = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from peft_read.recurrence import triton_adapter, triton_scan

def built(kernel, fixed, types, aligned=()):
    fixed = {name: value for name, value in fixed.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in fixed else types.get(name, "*fp32") for name in kernel.arg_names}
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert "async_copy_global" in compiled.asm["ttgir"], f"{kernel.__name__} waits for every load"
    assert "cubin" in compiled.asm

sizes = {"real": "*u8", "length": "i32", "k": "i32", "d": "i32"}
built(
    triton_adapter._adapter_forward, {"MASKED": True, "K": 4, "D": 1024}, {**sizes, "x": "*bf16", "out": "*bf16"},
    ("x", "out", "d"),
)
for kind in ("rnn", "gru", "lstm"):
    for kernel in (getattr(triton_scan, f"_{kind}_forward"), getattr(triton_scan, f"_{kind}_backward")):
        built(kernel, {"MASKED": True, "K": 4, "REMEMBERED": True}, sizes)
"""


def run(script, **environment):
    # A process of its own: Triton reads TRITON_INTERPRET once, when it is imported.
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1", **environment}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_kernels_agree_with_the_plain_loops_and_with_torch():
    run(SCANS + ADAPTER + TRIAL, TRITON_INTERPRET="1")


def test_the_kernels_compile_for_a_gpu_and_load_ahead(tmp_path):
    run(COMPILATION, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
