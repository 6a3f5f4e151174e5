"""READ in training steps in half precision with a gradient scaler, how often paths are tried, and what they refuse."""

import pytest
import torch
from tiny_models import adapted, padded_batch
from torch import nn

pytest.importorskip("numba", reason="numba is not installed")

from peft_read import backends, use_backend
from peft_read.recurrence import adapt_in_one, build_cell, operation
from peft_read.recurrence.arguments import AdapterArguments, ScanArguments
from peft_read.recurrence.fused_adapter import OPERATION as ADAPTER
from peft_read.recurrence.scan import SCANS


def loss_of(model, family):
    ids, mask = padded_batch(family)
    return model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["bart", "llama"])
def test_a_step_in_half_precision_with_a_gradient_scaler(family):
    model = adapted(family)
    loss_of(model, family).backward()
    exact = gradients(model)
    model.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = loss_of(model, family)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    found, before = gradients(model), [p.clone() for p in model.parameters() if p.requires_grad]
    assert found.keys() == exact.keys()
    for name, gradient in found.items():
        assert (gradient - exact[name]).abs().max() <= 2e-2 * exact[name].abs().max() + 1e-5, name
    scaler.step(optimizer)
    scaler.update()
    moved = [p for p in model.parameters() if p.requires_grad]
    assert any(not torch.equal(one, other) for one, other in zip(before, moved, strict=True))


def test_a_scaler_skips_the_step_whose_gradients_overflow():
    model = adapted("llama")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = [p.clone() for p in model.parameters() if p.requires_grad]
    with torch.autocast("cpu", dtype=torch.float16):
        loss = loss_of(model, "llama")
    scaler.scale(loss).backward()
    assert not all(gradient.isfinite().all() for gradient in gradients(model).values())
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**126
    for one, other in zip(before, (p for p in model.parameters() if p.requires_grad), strict=True):
        assert torch.equal(one, other)


def test_a_path_is_tried_once_and_not_per_call(monkeypatch):
    monkeypatch.setattr(backends, "trials", {})
    tried, trial = [], operation.Operation.trial

    def counted(self, *arguments):
        tried.append(self.name)
        return trial(self, *arguments)

    monkeypatch.setattr(operation.Operation, "trial", counted)
    with use_backend("numba"):
        for size, length in ((4, 3), (4, 9), (5, 3), (8, 2)):
            for kind in ("rnn", "gru"):
                cell = build_cell(kind, size)
                cell(torch.randn(2, length, size, requires_grad=True))[0].sum().backward()
            down, cell, up = nn.Linear(32, size), build_cell("rnn", size), nn.Linear(size, 32)
            assert adapt_in_one(torch.randn(2, length, 32), down, cell, nn.Identity(), up) is not None
    assert sorted(tried) == ["adapter", "scan_gru", "scan_rnn"]


class Subclass(torch.Tensor):
    """A tensor that is more than one."""


UNFIT = {
    "a tensor is of a subclass": torch.zeros(4, 4).as_subclass(Subclass),
    "a tensor is not float32": torch.zeros(4, 4, dtype=torch.float64),
    "its tensors are not dense ones on one device": torch.zeros(4, 4).to_sparse(),
}


@pytest.mark.parametrize("reason", [*UNFIT, "the mask is not boolean, one entry per token"])
@pytest.mark.parametrize("backend", ["numba", "triton"])
def test_loops_and_kernels_refuse_the_same_tensors_in_the_same_words(backend, reason, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    weight = UNFIT.get(reason, torch.zeros(4, 4))
    mask = None if reason in UNFIT else torch.ones(2, 3)
    x, vector, square = torch.zeros(2, 3, 4), torch.zeros(4), torch.zeros(4, 4)
    scan = ScanArguments(x, None, mask, square, weight, vector, vector)
    assert SCANS["rnn"].implementations[backend].refusal(scan) == reason
    wide = torch.zeros(2, 3, 16)
    adapter = AdapterArguments(
        wide, None, mask, torch.zeros(4, 16), vector, square, weight, vector, vector, torch.zeros(16, 4), None
    )
    assert ADAPTER.implementations[backend].refusal(adapter) == reason


MISFITS = {
    "state": torch.zeros(1, 4),
    "weight_ih": torch.zeros(4, 3),
    "weight_hh": torch.zeros(3, 4),
    "bias_ih": torch.zeros(3),
    "bias_hh": torch.zeros(3),
}


@pytest.mark.parametrize("name", MISFITS)
@pytest.mark.parametrize("backend", ["numba", "triton"])
def test_shapes_that_do_not_fit_together_are_left_to_torch_which_refuses_them(backend, name, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    vector, square = torch.zeros(4), torch.zeros(4, 4)
    fitting = ScanArguments(torch.zeros(2, 3, 4), torch.zeros(2, 4), None, square, square, vector, vector)
    refusal = SCANS["rnn"].implementations[backend].refusal
    assert refusal(fitting) == ""
    assert refusal(fitting._replace(**{name: MISFITS[name]})) == "its tensors do not fit together"


def test_a_state_of_another_batch_is_an_error_of_torch():
    down, cell, up = nn.Linear(32, 4), build_cell("rnn", 4), nn.Linear(4, 32)
    with use_backend("numba"):
        assert adapt_in_one(torch.randn(2, 3, 32), down, cell, nn.Identity(), up, state=torch.zeros(1, 4)) is None
        with pytest.raises(RuntimeError):
            cell(torch.randn(2, 3, 4), torch.zeros(1, 4))
