"""Generation with a cache gives what one pass over the finished sequence gives, in every mode."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from peft import get_peft_model
from tiny_models import DECODERS, FAMILIES, adapted, build, padded_batch, read_layers
from transformers import DynamicCache, EncoderDecoderCache, RwkvConfig, RwkvForCausalLM, StaticCache

from peft_read import READConfig
from peft_read.adapter import cache as cache_room
from peft_read.adapter.cache import given_cache, returned_cache
from peft_read.adapter.scope import Scope

TOLERANCE = 1e-5
NEW_TOKENS = 8
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4},
    "several beams": {"num_beams": 4, "num_return_sequences": 3},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "static cache with beams": {"cache_implementation": "static", "disable_compile": True, "num_beams": 3},
    "chunked prefill": {"prefill_chunk_size": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assisted": {},
}


def generate(model, ids, mask, **settings):
    """Tokens, raw logits and beams, with no end of sequence and a fixed seed."""
    model.generation_config.eos_token_id = None
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, **settings}
    torch.manual_seed(9)
    return model.generate(
        input_ids=ids,
        attention_mask=mask,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
        **settings,
    )


def full_logits(model, family, ids, mask, sequences):
    """The logits (B, T_new, V) of one pass, without a cache, over the prompts and what was generated after them."""
    copies = sequences.shape[0] // ids.shape[0]
    ids, mask = ids.repeat_interleave(copies, 0), mask.repeat_interleave(copies, 0)
    with torch.no_grad():
        if family not in DECODERS:
            decoder_ids = sequences[:, :-1]
            return model(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder_ids, use_cache=False).logits
        new = sequences.shape[1] - ids.shape[1]
        mask = torch.cat((mask, mask.new_ones(len(mask), new)), dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=sequences, attention_mask=mask, position_ids=positions, use_cache=False).logits
        return logits[:, -new - 1 : -1]


def check_against_full_pass(model, family, mode, **settings):
    """Compare a mode of generation with one full pass; returns the largest difference."""
    single = mode in ("prompt lookup", "assisted")
    ids, mask = padded_batch(family, pads=(2,) if single and family not in DECODERS else (0,) if single else (0, 3, 5))
    if mode == "prompt lookup":
        ids = ids.repeat(1, 2)[:, :12] if family in DECODERS else ids
        mask = torch.ones_like(ids) if family in DECODERS else mask
    if mode == "assisted":
        settings["assistant_model"] = adapted(family, cell=model.peft_config["default"].cell, seed=5)
        settings["assistant_model"].generation_config.eos_token_id = None
    result = generate(model, ids, mask, **MODES[mode], **settings)
    full = full_logits(model, family, ids, mask, result.sequences)
    if "num_beams" in MODES[mode]:
        new = result.sequences[:, -full.shape[1] :]
        scores = full.log_softmax(-1).gather(-1, new[..., None])[..., 0].sum(-1) / new.shape[1]
        difference = (scores - result.sequences_scores).abs().max()
        uncached = {k: v for k, v in MODES[mode].items() if k not in ("cache_implementation", "disable_compile")}
        again = generate(model, ids, mask, **uncached, use_cache=False)
        assert torch.equal(again.sequences, result.sequences)
    else:
        difference = (torch.stack(result.logits, dim=1) - full).abs().max()
    assert difference <= TOLERANCE
    return difference.item()


# An encoder-decoder has no prompt in its decoder that could come in chunks.
CASES = [(family, mode) for family in FAMILIES for mode in MODES if family in DECODERS or mode != "chunked prefill"]


@pytest.mark.parametrize(("family", "mode"), CASES)
def test_cached_generation_is_the_full_pass(family, mode):
    check_against_full_pass(adapted(family), family, mode)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("mode", ["greedy", "beams", "static cache", "prompt lookup", "assisted"])
@pytest.mark.parametrize("family", ["llama", "opt", "bart"])
def test_cached_generation_of_gated_cells_is_the_full_pass(family, mode, cell):
    check_against_full_pass(adapted(family, cell=cell), family, mode)


@pytest.mark.parametrize("family", FAMILIES)
def test_dropping_the_state_is_detected(family, monkeypatch):
    """The control: without the carried state the comparison must fail."""
    model = adapted(family)
    monkeypatch.setattr(Scope, "state_before", lambda *_: None)
    with pytest.raises(AssertionError):
        check_against_full_pass(model, family, "greedy")


@pytest.mark.parametrize("family", ["llama", "opt", "bart"])
def test_states_that_are_not_reordered_with_the_beams_are_detected(family, monkeypatch):
    """The control: with states that do not follow their beams the comparison must fail."""
    model = adapted(family)
    monkeypatch.setattr(cache_room.States, "map_rows", lambda self, function: self)
    with pytest.raises((AssertionError, RuntimeError)):
        check_against_full_pass(model, family, "beams")


def step(model, family, ids, cache, encoder=None):
    """One pass with a cache: the logits of the new tokens and the cache."""
    with torch.no_grad():
        if family in DECODERS:
            result = model(input_ids=ids, past_key_values=cache, use_cache=True)
        else:
            result = model(encoder_outputs=encoder, decoder_input_ids=ids, past_key_values=cache, use_cache=True)
    return result.logits, result.past_key_values


def prompt(model, family, batch=2, length=9):
    ids, _ = padded_batch(family, pads=(0,) * batch, length=length)
    if family in DECODERS:
        return ids, None
    with torch.no_grad():
        return ids, model.get_base_model().get_encoder()(input_ids=ids)


def self_attention(cache):
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cell", ["rnn", "lstm"])
def test_operations_on_a_cache_apply_to_the_states(family, cell):
    model = adapted(family, cell=cell)
    ids, encoder = prompt(model, family)
    whole, _ = step(model, family, ids, None, encoder)
    logits, cache = step(model, family, ids[:, :6], None, encoder)
    torch.testing.assert_close(logits, whole[:, :6], rtol=0, atol=TOLERANCE)
    kind, size = type(self_attention(cache)), len(self_attention(cache).layers)

    # copies and pickles go on from the same prefix, each on its own
    for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        after, twin = step(model, family, ids[:, 6:], twin, encoder)
        torch.testing.assert_close(after, whole[:, 6:], rtol=0, atol=TOLERANCE)
        assert type(self_attention(twin)) is kind and len(self_attention(twin).layers) == size

    # reordering, selecting, repeating
    moved = copy.deepcopy(cache)
    moved.reorder_cache(torch.tensor([1, 0]))
    after, _ = step(model, family, ids[[1, 0], 6:], moved, flip(encoder))
    torch.testing.assert_close(after, whole[[1, 0], 6:], rtol=0, atol=TOLERANCE)
    chosen = copy.deepcopy(cache)
    chosen.batch_select_indices(torch.tensor([1]))
    after, _ = step(model, family, ids[1:, 6:], chosen, pick(encoder, [1]))
    torch.testing.assert_close(after, whole[1:, 6:], rtol=0, atol=TOLERANCE)
    more = copy.deepcopy(cache)
    more.batch_repeat_interleave(2)
    after, _ = step(model, family, ids[[0, 0, 1, 1], 6:], more, pick(encoder, [0, 0, 1, 1]))
    torch.testing.assert_close(after, whole[[0, 0, 1, 1], 6:], rtol=0, atol=TOLERANCE)

    # rolling back, and starting again with another batch
    if family != "mistral":  # a full sliding window does not roll back, with or without READ
        self_attention(cache).crop(-2)
        after, _ = step(model, family, ids[:, 4:], cache, encoder)
        torch.testing.assert_close(after, whole[:, 4:], rtol=0, atol=TOLERANCE)
    if family in DECODERS:
        cache.reset()
        after, _ = step(model, family, ids[:1], cache)
        torch.testing.assert_close(after, whole[:1], rtol=0, atol=TOLERANCE)


def pick(encoder, rows):
    if encoder is None:
        return None
    return type(encoder)(last_hidden_state=encoder.last_hidden_state[rows])


def flip(encoder):
    return pick(encoder, [1, 0])


def test_a_static_cache_is_reset():
    model = adapted("llama")
    ids, _ = prompt(model, "llama")
    cache = StaticCache(config=model.config, max_cache_len=16)
    first, _ = step(model, "llama", ids, cache)
    cache.reset()
    again, _ = step(model, "llama", ids, cache)
    torch.testing.assert_close(again, first, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_a_prefix_cache_serves_generate(family):
    model = adapted(family)
    ids, mask = padded_batch(family, pads=(0, 0))
    if family in DECODERS:
        _, cache = step(model, family, ids[:, :5], DynamicCache(config=model.config))
        result = generate(model, ids, mask, past_key_values=copy.deepcopy(cache))
        again = generate(model, ids, mask, past_key_values=cache)
        assert torch.equal(result.sequences, again.sequences)
    else:
        result = generate(model, ids, mask)
    expected = generate(model, ids, mask, use_cache=False)
    assert torch.equal(result.sequences, expected.sequences)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_training_between_two_steps_does_not_disturb_the_cache(family):
    model = adapted(family)
    ids, encoder = prompt(model, family)
    whole, _ = step(model, family, ids, None, encoder)
    _, cache = step(model, family, ids[:, :5], None, encoder)
    model.train()
    model(input_ids=ids.flip(0), labels=ids).loss.backward()
    model.eval()
    after, _ = step(model, family, ids[:, 5:], cache, encoder)
    torch.testing.assert_close(after, whole[:, 5:], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_threads_do_not_mix_their_sequences(family):
    model = adapted(family)
    batches = [padded_batch(family, pads=(0, pad)) for pad in (1, 2, 3, 4)]
    expected = [generate(model, *batch).sequences for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda batch: model.generate(
            input_ids=batch[0], attention_mask=batch[1], do_sample=False, max_new_tokens=NEW_TOKENS
        ), batches * 2))  # fmt: skip
    for result, one in zip(results, expected * 2, strict=True):
        assert torch.equal(result, one)


def test_switching_the_adapter_while_a_cache_is_in_use_is_an_error():
    model = adapted("llama")
    from peft_read import READConfig

    model.add_adapter("b", READConfig(init_weights=False))
    ids, _ = prompt(model, "llama")
    _, cache = step(model, "llama", ids[:, :6], None)
    model.set_adapter("b")
    message = (
        r"READ layer 'model.layers.0.mlp.down_proj' \(adapter 'b'\) has recurrent states for 0 tokens but the KV "
        r"cache already holds 6\..*Recompute the prompt with the adapter active, or use use_cache=False."
    )
    with pytest.raises(RuntimeError, match=message):
        step(model, "llama", ids[:, 6:], copy.deepcopy(cache))
    model.set_adapter("default")
    with model.disable_adapter():
        _, cache = step(model, "llama", ids[:, 6:7], cache)
    with pytest.raises(RuntimeError, match="states for 6 tokens but the KV cache already holds 7"):
        step(model, "llama", ids[:, 7:], cache)


def test_a_cache_rebuilt_from_its_tensors_is_an_error():
    model = adapted("llama")
    ids, _ = prompt(model, "llama")
    _, cache = step(model, "llama", ids[:, :6], None)
    bare = DynamicCache([(layer.keys, layer.values) for layer in cache.layers])
    with pytest.raises(RuntimeError, match="rebuilt from its tensors"):
        step(model, "llama", ids[:, 6:], bare)
    wide = copy.deepcopy(cache)
    cache_room.saved_states(wide)  # states of two sequences, keys of four
    for layer in wide.layers:
        layer.keys, layer.values = layer.keys.repeat(2, 1, 1, 1), layer.values.repeat(2, 1, 1, 1)
    with pytest.raises(RuntimeError, match="states for 2 sequences but is given 4"):
        step(model, "llama", ids[:, 6:].repeat(2, 1), wide)


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm", "none"])
def test_keys_that_are_evicted_by_hand_are_an_error_where_something_recurs(cell):
    model = adapted("llama", cell=cell)
    ids, _ = padded_batch("llama", pads=(0, 0, 0))
    cache, kept = DynamicCache(config=model.config), torch.tensor([0, 1, 5, 6])
    with torch.no_grad():
        model(input_ids=ids[:, :7], past_key_values=cache)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]
        step = {"input_ids": ids[:, 7:], "position_ids": torch.tensor([[7]]), "past_key_values": cache}
        if cell != "none":
            with pytest.raises(RuntimeError, match=r"states for 7 tokens but the KV cache holds 4\..*cell='none'"):
                model(**step)
            return
        seen = torch.zeros(8, dtype=torch.bool).index_fill(0, torch.cat((kept, torch.tensor([7]))), True)
        hidden = torch.ones(8, 8, dtype=torch.bool).tril()
        hidden[7] &= seen
        expected = model(input_ids=ids, attention_mask=hidden[None, None], use_cache=False).logits[:, -1:]
        torch.testing.assert_close(model(**step).logits, expected, rtol=0, atol=TOLERANCE)


def test_disabling_the_adapter_for_a_whole_generation_is_the_base_model():
    model, base = adapted("bart"), build("bart")
    ids, mask = padded_batch("bart")
    with model.disable_adapter():
        disabled = generate(model, ids, mask).sequences
    assert torch.equal(disabled, generate(base, ids, mask).sequences)


def test_no_scope_stays_open_after_a_pass_or_an_exception():
    from peft_read.adapter.running import current_scope

    model = adapted("llama")
    ids, mask = padded_batch("llama")
    model(input_ids=ids, attention_mask=mask)
    assert current_scope() is None
    with pytest.raises(Exception):  # noqa: B017 - the model's own error, whatever it is
        model(input_ids=ids + 1000, attention_mask=mask)
    assert current_scope() is None
    with pytest.raises(ValueError, match="fits neither"):  # the scope itself refuses
        model(input_ids=ids, attention_mask=mask[:, :5])
    assert current_scope() is None


def test_an_interrupted_pass_is_forgotten_by_the_next():
    from peft_read.adapter import running
    from peft_read.adapter.running import current_scope

    def interrupt(module, args):
        raise KeyboardInterrupt

    model = adapted("llama")
    ids, mask = padded_batch("llama")
    hook = model.get_base_model().model.layers[1].mlp.register_forward_pre_hook(interrupt)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            model(input_ids=ids, attention_mask=mask)
    hook.remove()
    model(input_ids=ids, attention_mask=mask)
    assert current_scope() is None
    assert not running._ANY_OPEN  # compiled graphs would be left for nothing


@pytest.mark.parametrize("name", ["mems", "state", "past_buckets_states", "block_table"])
def test_other_states_of_decoding_are_refused(name):
    stack = adapted("llama").get_base_model().model
    with pytest.raises(
        NotImplementedError, match=f"incremental decoding with `{name}`; generate with use_cache=False"
    ):
        stack(input_ids=torch.ones(1, 3, dtype=torch.long), **{name: object()})


@pytest.mark.parametrize("name", ["cache", "past_key_values", "cache_params", "layer_past"])
def test_other_objects_than_caches_are_refused_under_every_name(name):
    stack = adapted("llama").get_base_model().model
    with pytest.raises(NotImplementedError, match=f"passed a tuple as `{name}`; generate with use_cache=False"):
        stack(input_ids=torch.ones(1, 3, dtype=torch.long), **{name: ((1, 2),)})


def test_a_cache_is_known_by_what_it_is_and_not_by_its_name():
    for name in ("cache", "past_key_values", "cache_params"):
        cache = DynamicCache()
        assert given_cache({name: cache, "input_ids": None}) is cache
        assert returned_cache({name: cache}) is cache
        assert returned_cache((torch.zeros(1), cache)) is cache
    assert given_cache({"cache": None}) is None and returned_cache(torch.zeros(1)) is None


def tiny_mamba(kind):
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "initializer_range": 0.3}
    heads = {"num_heads": 8, "head_dim": 8, "n_groups": 1} if kind == "Mamba2" else {}
    config = getattr(transformers, f"{kind}Config")(**sizes, **heads, pad_token_id=0)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@pytest.mark.parametrize("kind", ["Mamba", "Mamba2", "FalconMamba"])
def test_a_cache_of_state_space_layers_carries_the_recurrence(kind):
    base = tiny_mamba(kind)
    ids = torch.randint(2, 60, (2, 6))
    begun = base(input_ids=ids, use_cache=True)
    model = get_peft_model(base, READConfig(r=4, target_modules=["out_proj"], init_weights=False)).eval()
    for parameter in (p for n, p in model.named_parameters() if "readapter_" in n):
        torch.nn.init.uniform_(parameter, -0.5, 0.5)
    settings = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    cached = model.generate(input_ids=ids, **settings)
    full = model(input_ids=cached.sequences, use_cache=False).logits[:, 5:-1]
    torch.testing.assert_close(torch.stack(cached.logits, dim=1), full, rtol=0, atol=2e-5)
    beams = [
        model.generate(input_ids=ids, max_new_tokens=5, num_beams=3, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert torch.equal(*beams)
    name = next(name for name in ("cache", "cache_params") if name in begun)
    with pytest.raises(RuntimeError, match="was begun without READ"):
        model(input_ids=ids[:, :1], **{name: begun[name]})


def test_rwkv_decodes_without_its_state_only():
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2}
    base = RwkvForCausalLM(RwkvConfig(**sizes, context_length=32)).eval()
    model = get_peft_model(base, READConfig(r=4, target_modules=["feed_forward.value"], init_weights=False)).eval()
    with pytest.raises(NotImplementedError, match="incremental decoding with `state`"):
        model.generate(input_ids=torch.arange(3, 9)[None], max_new_tokens=4)
    assert model.generate(input_ids=torch.arange(3, 9)[None], max_new_tokens=4, use_cache=False).shape == (1, 10)


def test_blocks_that_share_their_weights_have_states_of_their_own():
    model = adapted("llama")
    blocks = model.get_base_model().model.layers
    blocks[1].mlp = blocks[0].mlp  # one READ layer, called twice in a pass
    ids, _ = prompt(model, "llama")
    whole, _ = step(model, "llama", ids, None)
    _, cache = step(model, "llama", ids[:, :6], None)
    after, _ = step(model, "llama", ids[:, 6:], cache)
    torch.testing.assert_close(after, whole[:, 6:], rtol=0, atol=TOLERANCE)
    assert len(read_layers(model)) == 1
