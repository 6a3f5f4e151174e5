"""Which masks and positions keep the sequences of a row apart, and which are refused because no chain follows them."""

import pytest
import torch
from tiny_models import VOCABULARY, adapted, read_layers
from transformers import DynamicCache, StaticCache

from peft_read.adapter import sequence_scope
from peft_read.adapter.openings import StackOpening

TOLERANCE = 1e-5
CAUSAL = torch.ones(12, 12, dtype=torch.bool).tril()
BRANCH = torch.tensor([0] * 6 + [1] * 3 + [2] * 3)  # a beginning of 6 tokens and two branches of 3
TREE = CAUSAL & ((BRANCH[:, None] == BRANCH) | (BRANCH == 0))
DEPTH = torch.cat((torch.arange(9), torch.arange(6, 9)))[None]
WIDTH = 15
HALVES = torch.arange(12) // 6
PACKED = CAUSAL & (HALVES[:, None] == HALVES)
IDS = torch.randint(3, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(0))
CACHES = {
    "growing": lambda model: DynamicCache(config=model.config),
    "fixed": lambda model: StaticCache(config=model.config, max_cache_len=WIDTH),
}


def logits(model, ids, mask=None, positions=None, cache=None):
    four = None if mask is None else mask[None, None]
    with torch.no_grad():
        output = model(
            input_ids=ids, attention_mask=four, position_ids=positions, past_key_values=cache,
            use_cache=cache is not None,
        )  # fmt: skip
    return output.logits[0]


def in_parts(model, cache, mask, positions, ends):
    """The logits of the tokens after the first part, each part given with the cache of those before."""
    width = WIDTH if isinstance(cache, StaticCache) else None
    found, first = [], 0
    for last in ends:
        rows = mask[first:last, :last]
        rows = rows if width is None else torch.nn.functional.pad(rows, (0, width - last))
        found.append(logits(model, IDS[:, first:last], rows, positions[:, first:last], cache))
        first = last
    return torch.cat(found)


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm", "none"])
@pytest.mark.parametrize("kind", [None, *CACHES])
def test_branches_that_share_a_beginning_are_refused_where_something_recurs(cell, kind):
    model = adapted("llama", cell=cell)

    def run():
        if kind is None:
            return logits(model, IDS, TREE, DEPTH)
        return in_parts(model, CACHES[kind](model), TREE, DEPTH, (6, 12))

    if cell != "none":
        with pytest.raises(ValueError, match=r"READ layer '.*down_proj' sees 1 rows .* cell='none'"):
            run()
        return
    found = run()
    torch.testing.assert_close(found[:9], logits(model, IDS[:, :9]), rtol=0, atol=TOLERANCE)
    second = torch.cat((IDS[:, :6], IDS[:, 9:]), dim=1)
    torch.testing.assert_close(found[9:], logits(model, second)[6:], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("additive", [False, True])
def test_a_tree_is_found_in_every_form_of_a_mask(additive):
    model = adapted("llama")
    mask = torch.zeros(12, 12).masked_fill(~TREE, torch.finfo(torch.float32).min) if additive else TREE
    with pytest.raises(ValueError, match="several branches share a beginning"):
        logits(model, IDS.expand(2, 12), mask, DEPTH)


BLOCK = torch.zeros(12, 12, dtype=torch.bool)
BLOCK[3:7, 3:7] = True  # an image, whose patches attend to each other
CHAINS = {
    "causal": CAUSAL,
    "window": CAUSAL.triu(-3),
    "image": CAUSAL | BLOCK,
    "prefix": CAUSAL | (torch.arange(12) < 4),
    "both directions": torch.ones(12, 12, dtype=torch.bool),
    "evicted": CAUSAL & ~((torch.arange(12) > 2) & (torch.arange(12) < 6) & (torch.arange(12)[:, None] > 8)),
}


def outputs(model, **inputs):
    """What the first READ layer was given by its base layer, and what it made of it."""
    layer, seen = read_layers(model)[0], {}
    hooks = [
        layer.base_layer.register_forward_hook(lambda module, args, output: seen.update(base=output)),
        layer.register_forward_hook(lambda module, args, output: seen.update(adapted=output)),
    ]
    logits(model, **inputs)
    for hook in hooks:
        hook.remove()
    return seen["base"], seen["adapted"]


@pytest.mark.parametrize("name", CHAINS)
def test_masks_of_one_chain_are_one_sequence(name):
    model = adapted("llama")
    base, found = outputs(model, ids=IDS, mask=CHAINS[name])
    with sequence_scope(segment_ids=torch.zeros(1, 12, dtype=torch.long)):
        _, expected = outputs(model, ids=IDS, mask=CHAINS[name])
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    assert (found - base).abs().max() > 0.01


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("name", ["causal", "window", "evicted"])
def test_masks_of_one_chain_continue_a_cache(name, kind):
    model = adapted("llama")
    positions = torch.arange(12)[None]
    found = in_parts(model, CACHES[kind](model), CHAINS[name], positions, (5, 7, 11, 12))
    torch.testing.assert_close(found, logits(model, IDS, CHAINS[name], positions), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("padding", [[0, 1], [4, 5], [7, 8], [11]])
def test_padding_does_not_break_a_chain(padding, kind):
    model = adapted("llama")
    real = torch.ones(12, dtype=torch.bool)
    real[padding] = False
    mask, positions = CAUSAL & real & real[:, None], (real.cumsum(0) - 1).clamp(min=0)[None]
    alone = logits(model, IDS[:, real])
    for found in (
        logits(model, IDS, mask, positions),
        in_parts(model, CACHES[kind](model), mask, positions, (6, 9, 12)),
    ):
        torch.testing.assert_close(found[real], alone, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", [None, *CACHES])
def test_block_diagonal_masks_keep_sequences_apart_also_as_they_begin_a_cache(kind):
    model = adapted("llama")
    positions = torch.arange(6).repeat(2)[None]
    cache = None if kind is None else CACHES[kind](model)
    found = logits(model, IDS, PACKED, positions) if kind is None else in_parts(model, cache, PACKED, positions, (12,))
    for half in (slice(0, 6), slice(6, 12)):
        torch.testing.assert_close(found[half], logits(model, IDS[:, half]), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", CACHES)
def test_several_sequences_in_a_row_do_not_continue_a_cache(kind):
    """By their mask, or as the user tells: there is one state, of the tokens before."""
    model = adapted("llama")
    positions = torch.arange(12)[None]
    with pytest.raises(ValueError, match=r"continue a KV cache.*attention mask.*one state"):
        in_parts(model, CACHES[kind](model), PACKED, positions, (4, 12))
    cache = CACHES[kind](model)
    logits(model, IDS[:, :4], cache=cache)
    told = sequence_scope(segment_ids=HALVES[None, 4:])
    with told, pytest.raises(ValueError, match=r"continue a KV cache.*several sequences.*use_cache=False"):
        logits(model, IDS[:, 4:], cache=cache)


RESTARTING = torch.arange(6).repeat(2)[None]
POSITIONS = {
    "a decoder without a cache": ("llama", {"use_cache": False}, True),
    "a decoder without a cache in training": ("llama", {"use_cache": False, "train": True}, True),
    "another decoder without a cache": ("gpt2", {"use_cache": False}, True),
    "a decoder that makes a cache": ("llama", {}, False),
    "a decoder that makes a cache in training": ("llama", {"train": True}, False),
    "a decoder with an empty cache": ("llama", {"cache": "growing", "use_cache": True}, False),
    "a decoder that sees both directions": ("llama", {"use_cache": False, "is_causal": False}, False),
    "a causal mask without positions": ("opt", {"use_cache": False}, False),
    "an encoder": ("bert", {}, False),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_positions_that_restart_cut_where_they_cut_the_attention(name):
    family, settings, cuts = POSITIONS[name]
    settings = dict(settings)
    model = adapted(family)
    model.train(settings.pop("train", False))
    if "is_causal" in settings:
        model.config.is_causal = settings.pop("is_causal")
    kind = settings.pop("cache", None)

    def run(ids, **given):
        if kind is not None:
            given["past_key_values"] = CACHES[kind](model)
        with torch.no_grad():
            output = model(input_ids=ids, **settings, **given)
        return output.last_hidden_state if family == "bert" else output.logits

    whole = {"position_ids": RESTARTING, "attention_mask": torch.ones_like(IDS)}  # with a mask, it is one sequence
    with model.disable_adapter():
        base_cuts = (run(IDS, position_ids=RESTARTING) - run(IDS, **whole)).abs().max() > 1e-3
    assert bool(base_cuts) == cuts
    expected = torch.cat([run(IDS[:, :6]), run(IDS[:, 6:])], dim=1) if cuts else run(IDS, **whole)
    torch.testing.assert_close(run(IDS, position_ids=RESTARTING), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("rows", "cuts"), [(1, True), (2, False)])
def test_flash_attention_cuts_one_row_by_its_positions_also_with_a_cache(rows, cuts):
    """By what the hook decides, since flash attention itself needs a GPU."""
    stack = adapted("llama").get_base_model().model
    opening = next(hook for hook in stack._forward_pre_hooks.values() if isinstance(hook, StackOpening))
    given = {"input_ids": IDS.expand(rows, 12), "position_ids": RESTARTING, "use_cache": True}
    assert opening.scope_of(stack, given, None).segment_ids is None
    stack.config._attn_implementation = "flash_attention_2"
    assert (opening.scope_of(stack, given, None).segment_ids is not None) == cuts
