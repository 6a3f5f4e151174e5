"""The recurrence inside torch.compile: one operator, the results of eager mode, one graph for all lengths."""

import pytest
import torch
from tiny_models import adapted, padded_batch
from torch import nn

pytest.importorskip("numba", reason="numba is not installed")

from peft_read import use_backend
from peft_read.recurrence import adapt_in_one, build_cell

KINDS = ("rnn", "gru", "lstm")


@pytest.fixture(autouse=True)
def compiled_loops():
    torch._dynamo.reset()
    with use_backend("numba"):
        yield
    torch._dynamo.reset()


class Graphs:
    """A backend for torch.compile that keeps the code of what it was given."""

    def __init__(self):
        self.seen = []

    def __call__(self, graph, inputs):
        self.seen.append(graph.code)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def compile(self, function):
        return torch.compile(function, backend=self, fullgraph=True)


def a_cell(kind, size=4):
    cell = build_cell(kind, size)
    for parameter in cell.parameters():
        nn.init.normal_(parameter, std=0.4)
    return cell


def inputs_of(cell, length=9):
    x = torch.randn(3, length, cell.size, requires_grad=True)
    mask = torch.rand(3, length) > 0.3
    mask[1] = False
    return x, torch.randn(3, cell.state_size, requires_grad=True), mask


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_cell_is_the_eager_one(kind):
    cell, graphs = a_cell(kind), Graphs()
    x, state, mask = inputs_of(cell)
    found = []
    for run in (cell, graphs.compile(cell)):
        outputs, states = run(x, state, mask, keep_states=True)
        total = outputs[:, -1].sum() + states.square().sum()
        found.append((outputs, states, *torch.autograd.grad(total, [x, state, *cell.parameters()])))
    assert ("peft_read.scan" in graphs.seen[0]) is (kind != "lstm")
    for number, (eager, compiled) in enumerate(zip(*found, strict=True)):
        torch.testing.assert_close(compiled, eager, rtol=1e-6 if number < 2 else 1e-5, atol=1e-6)
    with torch.no_grad():  # goes on from a state
        run = graphs.compile(cell)
        first, states = run(x[:, :4], None, None, keep_states=True)
        second, _ = run(x[:, 4:], states[:, -1], None)
        whole, _ = cell(x, keep_states=True)
        torch.testing.assert_close(torch.cat((first, second), dim=1), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("kind", "masked"), [("rnn", False), ("gru", True)])
def test_the_operator_keeps_torchs_rules(kind, masked):
    cell = a_cell(kind)
    x, state, mask = inputs_of(cell)
    arguments = (x, state, mask if masked else None, *cell.parameters())
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(torch.ops.peft_read, f"scan_{kind}").default, arguments, test_utils=checks)


def test_one_graph_serves_all_lengths():
    cell, graphs = a_cell("gru"), Graphs()
    compiled = graphs.compile(cell)
    for length in (9, 6, 13):
        x, _, mask = inputs_of(cell, length)
        torch._dynamo.mark_dynamic(x, 1)
        torch._dynamo.mark_dynamic(mask, 1)
        outputs, _ = compiled(x, None, mask)
        torch.testing.assert_close(outputs, cell(x, None, mask)[0], rtol=1e-6, atol=1e-6)
        outputs.sum().backward()
    assert len(graphs.seen) == 1


def test_the_backend_of_a_graph_is_the_one_in_use():
    cell, graphs = a_cell("rnn"), Graphs()
    compiled = graphs.compile(cell)
    x = torch.randn(2, 5, 4)
    for name, expected in (("numba", True), ("torch", False), ("numba", True)):
        with use_backend(name):
            compiled(x)
        assert ("peft_read.scan" in graphs.seen[-1]) is (expected and len(graphs.seen) == 1)
    assert len(graphs.seen) == 2
    graphs.compile(a_cell("rnn").double())(x.double())
    graphs.compile(a_cell("rnn", 65))(torch.randn(2, 5, 65))
    assert not any("peft_read" in code for code in graphs.seen[2:])


def test_exported_programs_need_nothing_of_this_package():
    program = torch.export.export(a_cell("rnn"), (torch.randn(2, 5, 4),))
    assert "peft_read" not in program.graph_module.code


def test_a_compiled_adapter_is_the_eager_one():
    graphs, no_dropout = Graphs(), nn.Identity()
    down, cell, up = nn.Linear(32, 4), a_cell("rnn"), nn.Linear(4, 32)
    mask = inputs_of(cell)[2]
    output, state = torch.randn(3, 9, 32, requires_grad=True), torch.randn(3, 4).tanh().requires_grad_()
    leaves = [output, state, *down.parameters(), *cell.parameters(), *up.parameters()]

    def adapter(output, state):
        found = adapt_in_one(output, down, cell, no_dropout, up, state=state, mask=mask)
        if found is not None:
            return found
        hidden, _ = cell(down(output), state, mask)
        return output + up(nn.functional.gelu(hidden)) * mask[..., None], hidden

    found = []
    for run in (adapter, graphs.compile(adapter)):
        out, hidden = run(output, state)
        total = out.square().sum() + hidden[:, -1].sum()
        found.append((out, hidden, *torch.autograd.grad(total, leaves)))
    assert "peft_read.adapter" in graphs.seen[0]
    for number, (eager, compiled) in enumerate(zip(*found, strict=True)):
        torch.testing.assert_close(compiled, eager, rtol=1e-6 if number < 2 else 1e-5, atol=1e-6)
    arguments = (output, state, mask, *down.parameters(), *cell.parameters(), *up.parameters())
    torch.library.opcheck(torch.ops.peft_read.adapter.default, arguments)
    down.register_forward_hook(lambda *_: None)
    torch._dynamo.reset()  # graphs do not notice hooks that come later
    graphs.compile(adapter)(output, state)
    assert "peft_read.adapter" not in graphs.seen[-1] and "peft_read.scan" in graphs.seen[-1]


def test_an_adapted_model_compiles_to_one_graph_and_learns_the_same():
    model, graphs = adapted("llama", changes={"num_hidden_layers": 1}), Graphs()
    ids, mask = padded_batch("llama")
    found = []
    for run in (model, graphs.compile(model)):
        model.zero_grad()
        loss = run(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(graphs.seen) == 1 and "peft_read.adapter" in graphs.seen[0]
    for number, (eager, compiled) in enumerate(zip(*found, strict=True)):
        torch.testing.assert_close(compiled, eager, rtol=1e-5 if number else 1e-6, atol=1e-6)


def test_a_compiled_model_trains_for_several_steps_as_the_eager_one():
    ids, mask = padded_batch("llama")
    graphs, found = Graphs(), []
    for compiled in (False, True):
        model = adapted("llama", changes={"num_hidden_layers": 1}).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        run, losses = graphs.compile(model) if compiled else model, []
        for step in range(4):
            optimizer.zero_grad()
            batch = ids.roll(step, dims=0)
            loss = run(input_ids=batch, attention_mask=mask.roll(step, dims=0), labels=batch, use_cache=False).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        found.append((torch.stack(losses), [p.detach() for p in model.parameters()]))
    (eager, weights), (compiled_losses, compiled_weights) = found
    assert len(graphs.seen) == 1  # no step but the first one compiles
    assert eager[-1] < eager[0]
    torch.testing.assert_close(compiled_losses, eager, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(compiled_weights, weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
