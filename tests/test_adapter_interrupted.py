"""Exports that fail and compiled passes that are interrupted leave other models as they were."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import get_peft_model
from tiny_models import adapted, padded_batch
from torch import nn

from peft_read import READConfig


class Blocks(nn.Module):
    """A model of one's own whose blocks READ knows no stack of: what scope it sees is somebody else's."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(2)])

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.fixture
def other():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield get_peft_model(Blocks(), READConfig(r=4, init_weights=False, target_modules=r"layers\.\d\.2")).eval()
    torch._dynamo.reset()


class Stop(Exception):
    pass


def stop(module, args):
    raise Stop


def broken(**settings):
    model = adapted("llama", changes={"use_cache": False}, **settings)
    model.get_base_model().model.layers[1].mlp.register_forward_pre_hook(stop)
    ids, mask = padded_batch("llama")
    return model, {"input_ids": ids, "attention_mask": mask}


def test_an_export_that_fails_leaves_no_scope_behind(other):
    x = torch.randn(3, 8, 8)
    expected = other(x)
    model, inputs = broken()
    with pytest.raises(Stop):
        torch.export.export(model, (), inputs, strict=False)
    torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
    with pytest.raises(Stop):
        torch.export.export(model, (), inputs, strict=False)
    compiled = torch.compile(other, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=0, atol=1e-6)
    with pytest.raises(Stop):
        torch.export.export(model, (), inputs, strict=False)
    exported = torch.export.export(other, (x,), strict=False).module()
    torch.testing.assert_close(exported(x), expected, rtol=0, atol=1e-6)


def test_an_interrupted_pass_between_two_graphs_is_not_seen_by_eager_code(other):
    x = torch.randn(3, 8, 8)
    expected = other(x)
    model, inputs = broken()
    stack = model.get_base_model().model
    stack.layers[1].mlp._forward_pre_hooks.clear()
    stack.layers[1].mlp.register_forward_pre_hook(torch.compiler.disable(stop))
    with pytest.raises(Stop), torch.no_grad():
        torch.compile(model, backend="eager")(**inputs)
    torch.testing.assert_close(other(x), expected, rtol=0, atol=0)


def test_another_thread_does_not_see_the_scope_between_two_graphs(other):
    x = torch.randn(3, 8, 8)
    expected = other(x)
    model, inputs = broken()
    mlp = model.get_base_model().model.layers[1].mlp
    mlp._forward_pre_hooks.clear()
    plain = model(**inputs).logits
    seen = []

    @torch.compiler.disable
    def elsewhere(module, args):
        with ThreadPoolExecutor(1) as pool:
            seen.append(pool.submit(other, x).result())

    mlp.register_forward_pre_hook(elsewhere)
    found = torch.compile(model, backend="eager")(**inputs).logits
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-5)
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=0)
