"""The cells against torch's own recurrences and against plain loops: values, gradients, masks and states."""

import pytest
import torch
from torch import nn

from peft_read.recurrence import CELLS, build_cell
from peft_read.recurrence.naive import naive_recurrence

RECURRENT = ("rnn", "gru", "lstm")
TORCH = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
MASKS = {
    "left": [[0, 0, 1, 1, 1, 1, 1], [1] * 7, [0, 0, 0, 0, 0, 1, 1]],
    "right": [[1, 1, 1, 0, 0, 0, 0], [1] * 7, [1, 0, 0, 0, 0, 0, 0]],
    "holes": [[1, 0, 1, 0, 0, 1, 1], [0, 1, 0, 1, 0, 1, 0], [1, 1, 0, 0, 0, 0, 1]],
    "an empty row": [[0] * 7, [1] * 7, [0, 1, 1, 1, 0, 0, 0]],
}


def make_cell(name, size=4, *, dtype=torch.float64, **settings):
    cell = build_cell(name, size, **settings).to(dtype)
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.uniform_(-0.9, 0.9)
    return cell


def weights_of(cell, suffix=""):
    return {name: getattr(cell, name + suffix) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}


def torch_twin(name, cell, bidirectional=False):
    """torch's module with the same weights."""
    bias = cell.bias_ih is not None
    twin = TORCH[name](
        cell.size, cell.weight_hh.shape[1], bias=bias, batch_first=True, bidirectional=bidirectional
    ).to(cell.weight_ih.dtype)
    with torch.no_grad():
        for key, value in cell.state_dict().items():
            base, reverse = key.removesuffix("_reverse"), key.endswith("_reverse")
            getattr(twin, f"{base}_l0{'_reverse' if reverse else ''}").copy_(value)
    return twin


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", RECURRENT)
def test_a_cell_is_torchs_recurrence(name, bias, bidirectional):
    cell = make_cell(name, bias=bias, bidirectional=bidirectional)
    twin = torch_twin(name, cell, bidirectional)
    x = torch.randn(3, 6, 4, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    ours, theirs = cell(x)[0], twin(y)[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)
    probe = torch.randn_like(ours)
    (ours * probe).sum().backward()
    (theirs * probe).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-13)
    torch.testing.assert_close(cell.weight_hh.grad, twin.weight_hh_l0.grad, rtol=0, atol=1e-13)


@pytest.mark.parametrize("pattern", MASKS)
@pytest.mark.parametrize("name", RECURRENT)
def test_masked_values_states_and_gradients_are_those_of_the_loop(name, pattern):
    cell = make_cell(name)
    mask = torch.tensor(MASKS[pattern], dtype=torch.bool)
    x = torch.randn(3, 7, 4, dtype=torch.float64, requires_grad=True)
    start = torch.randn(3, cell.state_size, dtype=torch.float64).tanh()
    outputs, states = cell(x, start, mask, keep_states=True)
    expected, expected_states = naive_recurrence(name, x, weights_of(cell), start, mask)
    torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(states, expected_states, rtol=0, atol=1e-14)
    probe = torch.randn_like(states)
    tensors = [x, *cell.parameters()]
    ours = torch.autograd.grad((states * probe).sum(), tensors)
    theirs = torch.autograd.grad((expected_states * probe).sum(), tensors)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


LAYOUTS = {
    "contiguous": lambda tensor: tensor,
    "transposed": lambda tensor: tensor.transpose(0, 1).contiguous().transpose(0, 1),
    "strided": lambda tensor: tensor.repeat_interleave(2, dim=1)[:, ::2],
    "expanded": lambda tensor: tensor[:1].expand(tensor.shape),
}


@pytest.mark.parametrize("of_mask", LAYOUTS)
@pytest.mark.parametrize("of_x", LAYOUTS)
@pytest.mark.parametrize("size", [4, 20])
@pytest.mark.parametrize("name", RECURRENT)
def test_it_does_not_matter_how_tensors_lie_in_memory(name, size, of_x, of_mask):
    """In float32, which the compiled loops take; they read addresses."""
    cell = make_cell(name, size, dtype=torch.float32)
    mask = LAYOUTS[of_mask](torch.tensor(MASKS["holes"], dtype=torch.bool))
    x = LAYOUTS[of_x](torch.randn(3, 7, size)).requires_grad_()
    probe = LAYOUTS[of_x](torch.randn(3, 7, size))
    parameters = [x, *cell.parameters()]
    outputs, _ = cell(x, None, mask)
    found = outputs, *torch.autograd.grad(outputs, parameters, probe)
    exact = [parameter.detach().double().requires_grad_() for parameter in parameters]
    weights = dict(zip([key for key, _ in cell.named_parameters()], exact[1:], strict=True))
    outputs, _ = naive_recurrence(name, exact[0], weights, None, mask)
    expected = outputs, *torch.autograd.grad(outputs, exact, probe.double())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=1e-5 * max(1, other.abs().max().item()))


@pytest.mark.parametrize("pattern", MASKS)
@pytest.mark.parametrize("name", RECURRENT)
def test_padding_between_tokens_does_not_change_them(name, pattern):
    cell = make_cell(name)
    mask = torch.tensor(MASKS[pattern], dtype=torch.bool)
    x = torch.randn(3, 7, 4, dtype=torch.float64)
    outputs, _ = cell(x, None, mask)
    for row in range(3):
        if mask[row].any():
            alone, _ = cell(x[row, mask[row]][None])
            torch.testing.assert_close(outputs[row, mask[row]], alone[0], rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", RECURRENT)
def test_a_sequence_in_two_pieces_is_the_sequence(name):
    cell = make_cell(name)
    x = torch.randn(2, 9, 4, dtype=torch.float64)
    whole, _ = cell(x)
    for cut in (1, 4, 8):
        first, states = cell(x[:, :cut], keep_states=True)
        second, _ = cell(x[:, cut:], states[:, -1])
        torch.testing.assert_close(torch.cat((first, second), dim=1), whole, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", RECURRENT)
def test_both_directions_skip_the_padding(name):
    cell = make_cell(name, bidirectional=True)
    mask = torch.tensor(MASKS["holes"], dtype=torch.bool)
    x = torch.randn(3, 7, 4, dtype=torch.float64)
    outputs, states = cell(x, None, mask)
    assert states is None
    for row in range(3):
        alone, _ = cell(x[row, mask[row]][None])
        torch.testing.assert_close(outputs[row, mask[row]], alone[0], rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match="cannot continue from a state"):
        cell(x, torch.zeros(3, 2))


@pytest.mark.parametrize("name", RECURRENT)
def test_half_precision_is_computed_in_float32_outside_autocast(name):
    cell = make_cell(name, dtype=torch.bfloat16)
    x = torch.randn(2, 5, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, _ = cell(x)
    assert outputs.dtype == torch.float32
    exact = naive_recurrence(name, x.double(), {k: v.double() for k, v in weights_of(cell).items()})[0]
    torch.testing.assert_close(outputs.double(), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", RECURRENT)
def test_initialisation_is_torchs_uniform_with_zero_biases(name):
    cell = build_cell(name, 64)
    for weight in (cell.weight_ih, cell.weight_hh):
        assert weight.abs().max() <= 1 / 8
        assert weight.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.05)
    assert not cell.bias_ih.any() and not cell.bias_hh.any()
    assert set(cell.state_dict()) == {"weight_ih", "weight_hh", "bias_ih", "bias_hh"}
    assert not list(cell.children()) and cell.weight is cell.weight_hh
    cell.reset_parameters(zero=True)
    assert not any(parameter.any() for parameter in cell.parameters())


@pytest.mark.parametrize("name", RECURRENT)
def test_a_cell_compiles_to_one_graph(name):
    cell = make_cell(name, dtype=torch.float32)
    x, mask = torch.randn(3, 7, 4), torch.tensor(MASKS["holes"], dtype=torch.bool)
    compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, None, mask)[0], cell(x, None, mask)[0])


def test_no_recurrence_is_the_identity():
    cell = build_cell("none", 4)
    x = torch.randn(2, 3, 4)
    assert cell(x)[0] is x and not list(cell.parameters())


def test_bad_cells_are_refused():
    with pytest.raises(ValueError, match="Unknown cell 'elman'; choose one of 'rnn', 'gru', 'lstm', 'none'"):
        build_cell("elman", 4)
    for name in ("rnn", "gru", "lstm"):
        for shape in ((5, 4), (2, 3, 5, 4)):
            with pytest.raises(ValueError, match="values to unpack"):
                build_cell(name, 4)(torch.randn(shape))
    with pytest.raises(ValueError, match="must be even, got 3"):
        build_cell("rnn", 3, bidirectional=True)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        build_cell("rnn", 0)
    assert set(CELLS) == {*RECURRENT, "none"}
