"""Caches of fixed size: a compiled step of decoding is one graph for all tokens, also after a rollback or reset."""

import pytest
import torch
from test_adapter_generation import MODES, TOLERANCE, generate
from tiny_models import adapted, padded_batch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import StaticCache

from peft_read.adapter.cache import FixedStates, saved_states

LENGTH = 24


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Decoding:
    """Greedy decoding with one static cache, prompt eager and every further token by `step`."""

    def __init__(self, model, ids, mask, step):
        self.model, self.ids, self.step = model, ids, step
        self.mask = torch.nn.functional.pad(mask, (0, LENGTH - mask.shape[1]), value=1)
        self.cache = StaticCache(config=model.config, max_cache_len=LENGTH)

    def begin(self):
        self.tokens = self.ids
        return self._append(self.model, self.ids)

    def go_on(self):
        return self._append(self.step, self.tokens[:, -1:].contiguous())

    def _append(self, forward, ids):
        done = self.tokens.shape[1]
        # A mask over the whole cache, as transformers gives it to compiled steps: which keys a query may see.
        places = torch.arange(done - ids.shape[1], done)
        seen = (self.mask[:, None] > 0) & (torch.arange(LENGTH) <= places[:, None])
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, places]
        seen = seen | (torch.arange(LENGTH) == places[:, None]) & (self.mask[:, places, None] > 0)
        with torch.no_grad():
            output = forward(
                input_ids=ids, attention_mask=seen[:, None], position_ids=positions, past_key_values=self.cache
            )
        self.tokens = torch.cat((self.tokens, output.logits[:, -1:].argmax(-1)), dim=1)
        return output.logits


def uncached(model, ids, mask, new):
    return generate(model, ids, mask, use_cache=False, max_new_tokens=new, min_new_tokens=new).sequences


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_a_compiled_step_is_one_graph_for_all_tokens(cell):
    model = adapted("llama", cell=cell, changes={"num_hidden_layers": 1})
    ids, mask = padded_batch("llama")
    counter = CompileCounterWithBackend("eager")
    decoding = Decoding(model, ids, mask, torch.compile(model.forward, backend=counter, fullgraph=True))
    expected = uncached(model, ids, mask, 8)
    for _ in range(2):  # the second time on the cache of the first
        decoding.begin()
        for _ in range(7):
            decoding.go_on()
        assert torch.equal(decoding.tokens, expected)
        decoding.cache.crop(-3)  # the keys of the last tokens are let go of, and computed again
        decoding.tokens = decoding.tokens[:, :-3]
        for _ in range(3):
            decoding.go_on()
        assert torch.equal(decoding.tokens, expected)
        decoding.cache.reset()
    assert counter.frame_count == 1
    states = saved_states(decoding.cache)
    assert states and all(isinstance(entry, FixedStates) for entry in states.values())


def test_states_stay_where_they_are():
    model = adapted("llama")
    decoding = Decoding(model, *padded_batch("llama"), model)
    decoding.begin()
    places = [entry.trajectory.data_ptr() for entry in saved_states(decoding.cache).values()]
    decoding.go_on()
    decoding.cache.reorder_cache(torch.tensor([2, 0, 0]))
    decoding.cache.reset()
    decoding.begin()
    assert [entry.trajectory.data_ptr() for entry in saved_states(decoding.cache).values()] == places
    assert {entry.trajectory.shape[1] for entry in saved_states(decoding.cache).values()} == {LENGTH + 1}


def test_tokens_that_the_adapter_did_not_see_are_an_error():
    model = adapted("llama")
    for step in (model, torch.compile(model.forward, backend="eager", fullgraph=True)):
        decoding = Decoding(model, *padded_batch("llama"), step)
        decoding.begin()
        decoding.go_on()
        with model.disable_adapter():
            decoding.go_on()
        with pytest.raises(RuntimeError, match="Recompute the prompt with the adapter active"):
            decoding.go_on()


def test_a_sliding_window_lets_go_of_old_states():
    model = adapted("mistral")
    ids, mask = padded_batch("mistral")
    expected = uncached(model, ids, mask, 12)
    result = generate(model, ids, mask, **MODES["static cache"], max_new_tokens=12, min_new_tokens=12)
    assert torch.equal(result.sequences, expected)
    (entry, *_) = saved_states(result.past_key_values).values()
    assert isinstance(entry, FixedStates) and entry.trajectory.shape[1] < ids.shape[1] + 12


@pytest.mark.parametrize("family", ["llama", "bart", "t5"])
def test_generate_reuses_its_static_cache(family):
    model = adapted(family)
    ids, mask = padded_batch(family)
    first = generate(model, ids, mask, **MODES["static cache"])
    other = generate(model, ids.flip(0), mask.flip(0), **MODES["static cache"])
    again = generate(model, ids, mask, **MODES["static cache"])
    assert torch.equal(again.sequences, first.sequences)
    torch.testing.assert_close(torch.stack(again.logits), torch.stack(first.logits), rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(torch.stack(other.logits).flip(1), torch.stack(first.logits), rtol=0, atol=TOLERANCE)
