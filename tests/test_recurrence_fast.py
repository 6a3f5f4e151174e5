"""The compiled loops: the same values and gradients as torch and as the plain loops, and which path a case takes."""

import dataclasses
import runpy
import sys
import warnings
from pathlib import Path

import pytest
import torch
from tiny_models import adapted, padded_batch, read_layers
from torch import nn
from torch.nn import functional as F

pytest.importorskip("numba", reason="numba is not installed")

from peft_read import backends, use_backend
from peft_read.recurrence import RNN, adapt_in_one, build_cell, scan
from peft_read.recurrence.arguments import GATES, ScanArguments
from peft_read.recurrence.fused_adapter import OPERATION as ADAPTER
from peft_read.recurrence.naive import naive_recurrence

KINDS = ("rnn", "gru")  # an LSTM runs on torch


@pytest.fixture(autouse=True)
def compiled_loops():
    with use_backend("numba"):
        yield


def a_cell(kind, size, *, bias=True, recurrent="random"):
    cell = build_cell(kind, size, bias=bias)
    for parameter in cell.parameters():
        nn.init.normal_(parameter, std=min(0.4, size**-0.5))
    with torch.no_grad():
        for gate in cell.weight_hh.chunk(GATES[cell.kind]):
            if recurrent == "orthogonal":  # rounding errors do not die out
                nn.init.orthogonal_(gate)
            if recurrent == "contractive":
                gate.mul_(0.5 / torch.linalg.matrix_norm(gate, 2))
    return cell


def run(cell, x, state, mask, weights):
    """Outputs, states, and the gradients of a weighted sum of both with respect to everything."""
    outputs, states = cell(x, state, mask, keep_states=True)
    total = (outputs * weights[0]).sum() + (states * weights[1]).sum()
    return outputs, states, *torch.autograd.grad(total, [x, state, *cell.parameters()])


def in_float64(cell, x, state, mask, weights):
    """The plain loops in float64."""
    parameters = dict.fromkeys(("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    parameters |= {name: p.detach().double().requires_grad_() for name, p in cell.named_parameters()}
    x, state = (tensor.detach().double().requires_grad_() for tensor in (x, state))
    outputs, states = naive_recurrence(cell.kind, x, parameters, state, mask)
    total = (outputs * weights[0]).sum() + (states * weights[1]).sum()
    leaves = [x, state, *(parameters[name] for name, _ in cell.named_parameters())]
    return outputs, states, *torch.autograd.grad(total, leaves)


def error(found, expected):
    """The largest error, relative to the largest value."""
    return ((found.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-3)).item()


def random_mask(*shape):
    mask = torch.rand(shape) > 0.3
    mask[1] = False
    mask[2, :3] = False
    return mask


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [1, 3, 4, 8, 17, 64])
def test_scans_agree_with_the_plain_loops(kind, masked, bias, size):
    cell, shape = a_cell(kind, size, bias=bias), (3, 19, size)
    x, state = torch.randn(shape, requires_grad=True), torch.randn(3, cell.state_size, requires_grad=True)
    mask = random_mask(3, 19) if masked else None
    weights = torch.randn(shape), torch.randn(3, 19, cell.state_size)
    expected = in_float64(cell, x, state, mask, weights)
    for found, known in zip(run(cell, x, state, mask, weights), expected, strict=True):
        assert error(found, known) < 5e-6
    biases = (cell.bias_ih, cell.bias_hh)
    assert scan.SCANS[kind].choose(ScanArguments(x, state, mask, cell.weight_ih, cell.weight_hh, *biases)) is not None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 7, 8, 9, 16, 17, 25])
@pytest.mark.parametrize(("length", "size"), [(1, 4), (5, 4), (16, 4), (33, 4), (33, 5), (33, 20)])
def test_any_number_of_sequences_fills_the_lanes(kind, batch, length, size):
    """Eight sequences go side by side, an RNN's sixteen; gradients take eighths of all tokens, and those left."""
    cell, shape = a_cell(kind, size), (batch, length, size)
    x, state = torch.randn(shape, requires_grad=True), torch.randn(batch, size, requires_grad=True)
    mask = torch.rand(shape[:2]) > 0.3
    weights = torch.randn(shape), torch.randn(shape)
    expected = in_float64(cell, x, state, mask, weights)
    for found, known in zip(run(cell, x, state, mask, weights), expected, strict=True):
        assert error(found, known) < 5e-6
    alone, _ = cell(x[-1:], state[-1:], mask[-1:])
    assert torch.equal(cell(x, state, mask)[0][-1:], alone)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recurrent", ["contractive", "orthogonal"])
@pytest.mark.parametrize("shape", [(4, 512, 4), (32, 75, 4), (1, 1024, 8), (4, 128, 64)])
def test_errors_are_at_most_twice_those_of_torch(kind, recurrent, shape):
    cell = a_cell(kind, shape[-1], recurrent=recurrent)
    x, state = torch.randn(shape, requires_grad=True), torch.zeros(shape[0], cell.state_size, requires_grad=True)
    weights = torch.randn(shape), torch.randn(*shape[:2], cell.state_size)
    found = run(cell, x, state, None, weights)
    with use_backend("torch"):
        torchs = run(cell, x, state, None, weights)
        exact = run(cell.double(), *(t.detach().double().requires_grad_() for t in (x, state)), None, weights)
    assert (found[0] - torchs[0]).abs().max() < 2e-6
    for ours, theirs, known in zip(found, torchs, exact, strict=True):
        assert error(ours, known) <= max(2 * error(theirs, known), 2.5e-7)


def test_the_forward_pass_is_within_a_millionth_of_nn_rnn():
    module, cell = nn.RNN(4, 4, batch_first=True), RNN(4)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in module.state_dict().items()})
    x = torch.randn(8, 300, 4)
    with torch.no_grad():
        torch.testing.assert_close(cell(x)[0], module(x)[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_the_whole_to_the_last_bit(kind):
    cell, x = a_cell(kind, 4), torch.randn(2, 30, 4)
    with torch.no_grad():
        outputs, states = cell(x, keep_states=True)
        first, before = cell(x[:, :13], keep_states=True)
        second, _ = cell(x[:, 13:], before[:, -1], keep_states=True)
    assert torch.equal(torch.cat((first, second), dim=1), outputs)
    assert torch.equal(before[:, -1], states[:, 12])


def test_nan_stays_nan():
    cell, x = a_cell("rnn", 4), torch.randn(2, 6, 4)
    x[0, 2, 1], x[1, 1, 0] = torch.nan, torch.inf
    with torch.no_grad():
        outputs, _ = cell(x)
    assert outputs[0, 2:].isnan().all() and outputs[0, :2].isfinite().all()
    assert outputs[1, 1].abs().max() <= 1


@pytest.mark.parametrize("enabled", [True, False])
def test_second_derivatives_are_not_those_of_cudnn(enabled, monkeypatch):
    """On CUDA torch's recurrences are cuDNN's, whose backward pass cannot be differentiated."""
    seen, reference = [], scan.SCANS["rnn"].reference

    def looking(arguments):
        seen.append(torch.backends.cudnn.enabled)
        return reference(arguments)

    cell, x = a_cell("rnn", 3), torch.randn(2, 5, 3, requires_grad=True)
    cell(x)  # the trial calls the definition too
    monkeypatch.setattr(scan.SCANS["rnn"], "reference", looking)
    monkeypatch.setattr(torch.backends.cudnn, "enabled", enabled)
    torch.autograd.grad(cell(x)[0].square().sum(), x, create_graph=True)
    assert seen == [False] and torch.backends.cudnn.enabled is enabled


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_go_through_torch(kind):
    cell, x = a_cell(kind, 3), torch.randn(2, 5, 3, requires_grad=True)
    found = []
    for name in ("numba", "torch"):
        with use_backend(name):
            (gradient,) = torch.autograd.grad(cell(x)[0].square().sum(), x, create_graph=True)
            found.append((gradient, *torch.autograd.grad(gradient.square().sum(), [x, *cell.parameters()])))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def an_adapter(size, *, width=48, bias=True):
    down, up = nn.Linear(width, size, bias=bias), nn.Linear(size, width, bias=bias)
    return down, a_cell("rnn", size, bias=bias), up


def in_parts(output, down, cell, up, state, mask):
    hidden, _ = cell(down(output), state, mask)
    delta = up(F.gelu(hidden))
    return output + (delta if mask is None else delta * mask[..., None]), hidden


def in_one(output, down, cell, up, state, mask):
    found = adapt_in_one(output, down, cell, nn.Identity(), up, state=state, mask=mask)
    assert found is not None
    return found


@pytest.mark.parametrize("size", [1, 3, 4, 6, 8])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_one_pass_agrees_with_the_parts(size, masked, bias):
    parts = an_adapter(size, bias=bias)
    output, state = torch.randn(3, 22, 48, requires_grad=True), torch.randn(3, size).tanh().requires_grad_()
    mask = random_mask(3, 22) if masked else None
    weights = torch.randn(3, 22, 48), torch.randn(3, 22, size)

    def everything(function, *tensors):
        results = function(tensors[0], *parts, tensors[1], mask)
        total = sum((result * weight).sum() for result, weight in zip(results, weights, strict=True))
        leaves = [*tensors, *(p for part in parts for p in part.parameters())]
        return *results, *torch.autograd.grad(total, leaves)

    found = everything(in_one, output, state)
    with use_backend("torch"):
        torchs = everything(in_parts, output, state)
        for part in parts:
            part.double()
        exact = everything(
            in_parts, output.detach().double().requires_grad_(), state.detach().double().requires_grad_()
        )
    for ours, theirs, known in zip(found, torchs, exact, strict=True):
        assert error(ours, known) <= max(2 * error(theirs, known), 1e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_states_alone_have_gradients(compiled):
    parts = an_adapter(4)
    output = torch.randn(2, 7, 48, requires_grad=True)
    leaves = [output, *parts[0].parameters(), *parts[1].parameters()]

    def loss(function):
        return function(output, *parts, None, None)[1].square().sum()

    run = torch.compile(loss, backend="aot_eager") if compiled else loss
    found = torch.autograd.grad(run(in_one), leaves)
    for one, known in zip(found, torch.autograd.grad(loss(in_parts), leaves), strict=True):
        torch.testing.assert_close(one, known)


def test_one_pass_gives_only_the_gradients_that_are_wanted():
    parts = an_adapter(4)
    output = torch.randn(2, 7, 48)
    leaves = [p for part in parts for p in part.parameters()]
    out, _ = in_one(output, *parts, None, None)
    everything = torch.autograd.grad(out.square().sum(), leaves)
    for kept in range(len(leaves)):
        for number, leaf in enumerate(leaves):
            leaf.requires_grad_(number == kept)
        out, _ = in_one(output, *parts, None, None)
        (gradient,) = torch.autograd.grad(out.square().sum(), leaves[kept])
        assert torch.equal(gradient, everything[kept])


def test_one_pass_has_second_derivatives():
    parts = an_adapter(3)
    output = torch.randn(2, 5, 48, requires_grad=True)
    found = []
    for function in (in_one, in_parts):
        (gradient,) = torch.autograd.grad(
            function(output, *parts, None, None)[0].square().sum(), output, create_graph=True
        )
        found.append(torch.autograd.grad(gradient.square().sum(), [output, parts[0].weight]))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["bart", "llama", "t5", "opt"])
def test_a_model_learns_the_same_on_both_paths(family, monkeypatch):
    passes = []
    loops = ADAPTER.implementations["numba"]
    counted = dataclasses.replace(loops, forward=lambda arguments: passes.append(1) or loops.forward(arguments))
    monkeypatch.setitem(ADAPTER.implementations, "numba", counted)
    model = adapted(family)
    ids, mask = padded_batch(family)
    found = []
    for name in ("numba", "torch"):
        with use_backend(name):
            model.zero_grad()
            loss = model(input_ids=ids, attention_mask=mask, labels=ids).loss
            loss.backward()
            found.append((loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)))
        if name == "numba":
            assert len(passes) == len(read_layers(model))
    assert len(passes) == len(read_layers(model))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_goes_to_torch(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("the compiled loops were called")

    cell, x = a_cell("rnn", 4), torch.randn(2, 5, 4)
    cell(x)
    loops = scan.SCANS["rnn"].implementations
    monkeypatch.setitem(loops, "numba", dataclasses.replace(loops["numba"], forward=refuse))
    with pytest.raises(AssertionError, match="compiled loops"):
        cell(x)
    cell.double()(x.double())
    cell.float()
    a_cell("rnn", 65)(torch.randn(2, 3, 65))
    weights = dict(cell.named_parameters())
    torch.func.grad(lambda one: torch.func.functional_call(cell, weights, (one,))[0].sum())(x)
    with torch.autograd.forward_ad.dual_level():
        cell(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        cell(mode.from_tensor(x))
    with use_backend("torch"):
        cell(x)
        torch.compile(cell, backend="eager", fullgraph=True)(x)


def test_modules_that_something_watches_are_called():
    down, cell, up = an_adapter(4)
    output = torch.randn(2, 7, 48)

    def fits():
        return adapt_in_one(output, down, cell, nn.Identity(), up) is not None

    assert fits()
    handle = down.register_forward_hook(lambda *_: None)
    assert not fits()
    handle.remove()
    assert fits()
    up.forward = up.forward  # as accelerate's hooks do
    assert not fits()
    del up.forward
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not fits()
    handle.remove()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not fits()
    assert adapt_in_one(output, down, cell, nn.Dropout(0.5), up) is None
    assert adapt_in_one(output, down, cell, nn.Dropout(0.5).eval(), up) is not None
    assert adapt_in_one(output.transpose(0, 1), down, cell, nn.Identity(), up) is None
    assert adapt_in_one(output, down, build_cell("gru", 4), nn.Identity(), up) is None
    assert adapt_in_one(output, down, build_cell("rnn", 4, bidirectional=True), nn.Identity(), up) is None
    torch.set_num_threads(5)
    try:
        assert not fits()
    finally:
        torch.set_num_threads(1)


def test_weights_can_be_resized_afterwards():
    """FSDP frees gathered weights by resizing their storage, which numpy forbids for what it has seen."""
    parts = an_adapter(4)
    in_one(torch.randn(1, 5, 48), *parts, None, None)[0].sum().backward()
    parts[1](torch.randn(1, 5, 4))[0].sum().backward()
    for parameter in (p for part in parts for p in part.parameters()):
        parameter.untyped_storage().resize_(0)


def test_freed_weights_are_an_error_not_a_crash():
    cell = a_cell("rnn", 4)
    cell.weight_hh.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"shape \(4, 4\), has no memory"):
        cell(torch.randn(1, 5, 4))


@pytest.mark.parametrize("freed", ["weight_ih", "weight_hh", "bias_hh"])
def test_freed_views_of_one_flat_tensor_are_an_error_too(freed):
    """The address of such a view is its offset, and only that of the first one is 0."""
    cell, flat = a_cell("rnn", 4), torch.randn(64)
    setattr(cell, freed, nn.Parameter(flat[: getattr(cell, freed).numel()].view_as(getattr(cell, freed))))
    shifted = nn.Parameter(flat[32:36])
    cell.bias_ih = shifted
    flat.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="has no memory"):
        cell(torch.randn(1, 5, 4))
    setattr(cell, freed, nn.Parameter(torch.zeros_like(getattr(a_cell("rnn", 4), freed))))
    with pytest.raises(RuntimeError, match=r"shape \(4,\), has no memory"):
        cell(torch.randn(1, 5, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_views_that_negate_are_read_as_they_are(kind):
    cell = a_cell(kind, 4)
    x, gradient = (torch.randn(2, 5, 4, dtype=torch.complex64).conj().imag for _ in range(2))
    assert x.is_neg() and gradient.is_neg()
    found = []
    for name in ("numba", "torch"):
        with use_backend(name):
            outputs, _ = cell(x)
            found.append((outputs, *torch.autograd.grad(outputs, list(cell.parameters()), gradient)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_padding_stays_as_it_is():
    down, cell, up = an_adapter(4)
    nn.init.ones_(up.bias)
    output, mask = torch.randn(3, 21, 48, requires_grad=True), random_mask(3, 21)
    for function in (in_one, in_parts):
        out, _ = function(output, down, cell, up, None, mask)
        assert torch.equal(out[~mask], output[~mask]) and (out[mask] != output[mask]).any(-1).all()
        (gradient,) = torch.autograd.grad(out[~mask].sum(), output)
        assert torch.equal(gradient, (~mask)[..., None].expand_as(gradient).float())
    loud = torch.where(mask[..., None], output.detach(), 100.0)
    found = [
        torch.autograd.grad((in_one(o, down, cell, up, None, mask)[0] * mask[..., None]).square().sum(), up.bias)[0]
        for o in (output, loud)
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("rnn", "a tensor is not float32"), ("gru", "a tensor is not float32"), ("lstm", "it has no loop or kernel")],
)
def test_a_forced_backend_says_what_it_cannot_take(kind, reason, monkeypatch):
    monkeypatch.setattr(backends, "_said", set())
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match=f'"numba" cannot take this scan_{kind}: {reason}.*Torch'):
        a_cell(kind, 4).double()(x, keep_states=True)
    with warnings.catch_warnings(), use_backend("auto"):
        warnings.simplefilter("error")
        monkeypatch.setattr(backends, "_said", set())
        a_cell(kind, 4).double()(x, keep_states=True)


@pytest.mark.parametrize(("script", "row"), [("recurrence", "| rnn 4x64x4 |"), ("training_step", "| READ-PVLA k=4 |")])
def test_the_benchmarks_run(script, row, tmp_path, monkeypatch, capsys):
    path = Path(__file__).parents[1] / "examples" / "benchmarks" / f"{script}.py"
    arguments = ["--quick", "--repeats", "1", "--output", str(tmp_path / "report")]
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    monkeypatch.syspath_prepend(str(path.parent))  # as Python does for a script
    runpy.run_path(str(path), run_name="__main__")
    assert row in capsys.readouterr().out
    assert (tmp_path / "report.json").exists() and row in (tmp_path / "report.md").read_text()
