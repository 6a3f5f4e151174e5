"""Which tokens follow which: padding, packing, segments, layouts, cross-attention and checkpointing."""

import contextvars
import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import DECODERS, FAMILIES, VOCABULARY, adapted, build, padded_batch, read_layers
from torch import nn
from transformers import (
    FunnelConfig,
    FunnelModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from peft_read import READConfig
from peft_read.adapter import masks, sequence_scope
from peft_read.adapter.masks import as_mask
from peft_read.adapter.packing import packed_segments, segments_of_lengths
from peft_read.adapter.running import current_scope
from peft_read.adapter.scope import Scope, Tower
from peft_read.adapter.segments import Segments
from peft_read.adapter.sequences import Notice, as_sequences
from peft_read.recurrence import LSTM, build_cell

TOLERANCE = 1e-5
PADDING = {
    "left": [[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8, [0, 0, 0, 0, 0, 0, 1, 1]],
    "right": [[1, 1, 1, 1, 1, 0, 0, 0], [1] * 8, [1, 1, 0, 0, 0, 0, 0, 0]],
    "holes": [[1, 0, 1, 1, 0, 0, 1, 1], [1] * 8, [0, 1, 0, 1, 0, 1, 1, 0]],
    "an empty row": [[1, 1, 1, 1, 1, 1, 0, 0], [0] * 8, [0, 0, 1, 1, 1, 1, 1, 1]],
}


def run(model, family, ids, mask, positions=None):
    """The last hidden states or logits (B, T, ·) that belong to the tokens `ids`, which the mask describes."""
    with torch.no_grad():
        if family in DECODERS:
            return model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        if family == "bert":
            return model(input_ids=ids, attention_mask=mask, position_ids=positions).last_hidden_state
        return model.get_base_model().get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state


def positions_of(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


def alone(model, family, ids, mask, row):
    """The same for one row without its padding, each token keeping the position it has in the batch."""
    real = mask[row].bool()
    return run(model, family, ids[row, real][None], None, None)[0]


# Mistral's window and the positions of BART and T5 count padding too, so that with some patterns the base models
# themselves give other numbers; the test after this one compares READ's own share in all families.
CASES = [
    (family, pattern)
    for family in ("gpt2", "llama", "qwen2", "opt", "bert", "bart", "t5")
    for pattern in PADDING
    if family not in ("bart", "t5") or pattern == "right"
]


@pytest.mark.parametrize(("family", "pattern"), CASES)
@pytest.mark.parametrize("cell", ["rnn", "lstm"])
def test_padded_is_unpadded(family, cell, pattern):
    model = adapted(family, cell=cell)
    mask = torch.tensor(PADDING[pattern])
    ids, _ = padded_batch(family, pads=(0, 0, 0))
    ids = ids * mask
    padded = run(model, family, ids, mask, positions_of(mask))
    for row in range(3):
        if mask[row].any():
            expected = alone(model, family, ids, mask, row)
            torch.testing.assert_close(padded[row, mask[row].bool()], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("pattern", PADDING)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapter_alone_is_untouched_by_padding(family, pattern):
    """READ's own share, given the hidden states it was given in the padded batch."""
    model = adapted(family)
    mask = torch.tensor(PADDING[pattern])
    ids, _ = padded_batch(family, pads=(0, 0, 0))
    seen = {}
    layer = read_layers(model)[0]
    layer.base_layer.register_forward_hook(lambda module, args, output: seen.update(output=output))
    layer.register_forward_hook(lambda module, args, output: seen.update(result=output))
    run(model, family, ids, mask, positions_of(mask))
    output, result = (seen[key].reshape(3, 8, -1) for key in ("output", "result"))
    down, cell, up = (getattr(layer, f"readapter_{part}")["default"] for part in ("down", "cell", "up"))
    for row in range(3):
        real = mask[row].bool()
        if real.any():
            with torch.no_grad():
                expected = output[row, real] + up(nn.functional.gelu(cell(down(output[row, real])[None])[0]))[0]
            torch.testing.assert_close(result[row, real], expected, rtol=0, atol=TOLERANCE)


def test_ignoring_the_mask_is_detected(monkeypatch):
    """The control: without the mask, left padding changes the real tokens."""
    from peft_read.adapter import openings

    model = adapted("llama")
    ids, mask = padded_batch("llama")
    expected = alone(model, "llama", ids, mask, 1)
    monkeypatch.setattr(openings, "as_mask", lambda *_, **__: None)
    padded = run(model, "llama", ids, mask, positions_of(mask))
    assert (padded[1, mask[1].bool()] - expected).abs().max() > 1e-3


def test_masks_are_read_in_all_their_forms():
    two = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    expected = two.bool()
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    four = (two[:, None, None, :].bool() & causal).contiguous()
    additive = torch.zeros(four.shape).masked_fill(~four, torch.finfo(torch.float32).min)
    for mask in (two, two.float(), two.bool(), two.to(torch.uint8), four, additive, {"full_attention": four}):
        assert torch.equal(as_mask(mask, 2, 4), expected)
    extended = (1 - two[:, None, None, :].float()) * torch.finfo(torch.float32).min
    assert torch.equal(as_mask(extended, 2, 4), expected)  # (B, 1, 1, T), as encoders make it
    assert torch.equal(as_mask({"sliding_attention": four}, 2, 4), expected)
    assert torch.equal(as_mask(four[:, :, 1:3], 2, 2, past=1), expected[:, 1:3])  # the rows of new tokens only
    assert as_mask(torch.ones(2, 4), 2, 4) is None and as_mask(None, 2, 4) is None
    assert torch.equal(as_mask(two, 2, 2, past=0), expected[:, :2])  # wider than the tokens: a static cache
    assert as_mask(two[:, 2:], 2, 2, past=5) is None
    with pytest.raises(ValueError, match="width 4 fits neither the 6 new tokens nor the 6 tokens so far"):
        as_mask(two, 2, 6)
    assert torch.equal(as_mask(four[:, 0], 2, 4), expected)  # (B, T, T): a token's own entry
    assert torch.equal(as_mask(additive[:, 0], 2, 4), expected)
    assert torch.equal(as_mask((1 - two.float()) * -1e9, 2, 4), expected)  # additive, one entry per token
    assert torch.equal(as_mask(four.float(), 2, 4), expected)  # 0 and 1 for each pair of tokens
    with pytest.raises(ValueError, match="2 to 4 dimensions"):
        as_mask(torch.ones(2, 1, 1, 1, 4), 2, 4)
    with pytest.raises(ValueError, match="masks of 2 sequences here, got \\(64, 4, 4\\)"):
        as_mask(torch.ones(64, 4, 4), 2, 4)
    with pytest.raises(NotImplementedError, match="READ cannot read the padding from a BlockMask"):
        as_mask(type("BlockMask", (), {})(), 2, 4)


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_the_type_of_a_mask_does_not_matter(dtype):
    model = adapted("llama")
    ids, mask = padded_batch("llama")
    expected = run(model, "llama", ids, mask, positions_of(mask))
    assert torch.equal(run(model, "llama", ids, mask.to(dtype), positions_of(mask)), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_four_dimensional_mask(family):
    model = adapted(family)
    ids, mask = padded_batch(family)
    expected = run(model, family, ids, mask, positions_of(mask))
    four = mask[:, None, None, :].bool() & torch.ones(8, 8, dtype=torch.bool).tril()
    four = torch.zeros(four.shape).masked_fill(~four, torch.finfo(torch.float32).min)
    result = run(model, family, ids, four, positions_of(mask))
    torch.testing.assert_close(result[mask.bool()], expected[mask.bool()], rtol=0, atol=TOLERANCE)


LENGTHS = (3, 5, 1, 4)


def pack(sequences):
    return torch.cat(sequences)[None], torch.cat([torch.arange(len(s)) for s in sequences])[None]


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_packed_is_separate(family, cell):
    model = adapted(family, cell=cell)
    sequences = [torch.randint(3, VOCABULARY, (length,)) for length in LENGTHS]
    ids, positions = pack(sequences)
    packed = run(model, family, ids, None, positions)[0].split(LENGTHS)
    for one, sequence in zip(packed, sequences, strict=True):
        torch.testing.assert_close(one, run(model, family, sequence[None], None)[0], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kinds", [("full_attention", "sliding_attention"), ("sliding_attention",)])
def test_packed_by_a_dictionary_of_masks(kinds):
    """One for each kind of attention, as Gemma 2 and 3 and gpt-oss take them."""
    text = Gemma3TextConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, sliding_window=6, initializer_range=0.2,
        layer_types=[kinds[0], kinds[-1]],
    )  # fmt: skip
    model = get_peft_model(Gemma3ForCausalLM(text), READConfig(init_weights=False)).eval()
    sequences = [torch.randint(3, VOCABULARY, (length,)) for length in LENGTHS]
    ids, positions = pack(sequences)
    numbers = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
    packed = (numbers[:, None] == numbers) & torch.ones(13, 13, dtype=torch.bool).tril()
    masks = {"full_attention": packed, "sliding_attention": packed & torch.ones(13, 13, dtype=torch.bool).triu(-5)}
    with torch.no_grad():
        given = {kind: masks[kind][None, None] for kind in kinds}
        found = model(input_ids=ids, position_ids=positions, attention_mask=given, use_cache=False).logits[0]
        for one, sequence in zip(found.split(LENGTHS), sequences, strict=True):
            alone = model(input_ids=sequence[None], use_cache=False).logits[0]
            torch.testing.assert_close(one, alone, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_the_last_of_packed_sequences_goes_on_after_padding(cell):
    """On a cache, with padding behind the prompt: the new tokens follow the last real one."""
    model = adapted("llama", cell=cell)
    numbers = torch.tensor([0, 0, 0, 1, 1, 1, 1, -1, 1, -1, 1, 1])  # of the sequences, -1 at padding
    real = numbers == 1
    four = (numbers[:, None] == numbers) & (numbers >= 0) & torch.ones(12, 12, dtype=torch.bool).tril()
    four = torch.zeros(four.shape).masked_fill(~four, torch.finfo(torch.float32).min)[None, None]
    ids, positions = torch.randint(3, VOCABULARY, (1, 12)), torch.zeros(1, 12, dtype=torch.long)
    positions[:, :3], positions[:, real] = torch.arange(3), torch.arange(7)
    found, cache = [], None
    with torch.no_grad():
        for first, last in ((0, 10), (10, 11), (11, 12)):
            result = model(
                input_ids=ids[:, first:last], attention_mask=four[:, :, first:last, :last],
                position_ids=positions[:, first:last], past_key_values=cache, use_cache=True,
            )  # fmt: skip
            cache = result.past_key_values
            found.append(result.logits)
    alone = run(model, "llama", ids[:, real], None)
    torch.testing.assert_close(torch.cat(found, dim=1)[:, real], alone, rtol=0, atol=TOLERANCE)


def test_packed_by_the_text_row_of_multimodal_positions():
    """Positions (4, B, T): in the text, by which transformers separates the sequences, then time, height, width."""
    text = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2}
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision))
    model = get_peft_model(model, READConfig(init_weights=False)).eval()
    sequences = [torch.randint(3, 30, (length,)) for length in LENGTHS]
    ids, positions = pack(sequences)
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions.expand(4, 1, -1), use_cache=False).logits[0]
        for one, sequence in zip(packed.split(LENGTHS), sequences, strict=True):
            alone = model(input_ids=sequence[None], use_cache=False).logits[0]
            torch.testing.assert_close(one, alone, rtol=0, atol=TOLERANCE)


def test_which_positions_tell_of_packed_rows():
    _, positions = pack([torch.zeros(length) for length in LENGTHS])
    ids, expected = positions[None], [[0] * 3 + [1] * 5 + [2] + [3] * 4]
    straight = torch.arange(13).expand(4, 1, -1)
    for told in (positions, ids, ids.expand(4, 1, -1), torch.cat((ids, straight[:3]))):
        assert packed_segments(told, 1, 13).tolist() == expected
        assert packed_segments(told, 2, 13).tolist() == expected * 2
    assert packed_segments(ids.expand(5, 1, -1), 1, 13, axes=4).tolist() == expected
    # The axes alone: those of an image repeat and jump within one sequence.
    assert packed_segments(ids.expand(3, 1, -1), 1, 13) is None
    assert packed_segments(ids.expand(4, 1, -1), 1, 13, axes=4) is None
    for told in (None, straight[0], straight, torch.cat((straight[:1], ids.expand(3, 1, -1)))):
        assert packed_segments(told, 1, 13) is None


def test_packed_by_the_numbers_of_the_sequences():
    """`seq_idx`, by which the state-space and convolution layers of hybrid models separate them."""
    stack = adapted("llama").get_base_model().model
    layer = read_layers(stack)[0]
    seen = {}
    layer.base_layer.register_forward_hook(lambda module, args, output: seen.update(output=output))
    layer.register_forward_hook(lambda module, args, output: seen.update(result=output))
    numbers = torch.tensor([[0] * 3 + [1] * 5 + [2] + [3] * 4], dtype=torch.int32)
    with torch.no_grad():
        stack(input_ids=torch.randint(3, VOCABULARY, (2, 13)), seq_idx=numbers, use_cache=False)
        for row, base in zip(seen["result"], seen["output"], strict=True):
            for one, output in zip(row.split(LENGTHS), base.split(LENGTHS), strict=True):
                torch.testing.assert_close(one, layer_alone(layer, output), rtol=0, atol=TOLERANCE)


def test_packed_by_cumulative_lengths():
    """The adapter's own share: attention by lengths needs kernels that a CPU does not have."""
    model = adapted("llama")
    stack, layer = model.get_base_model().model, read_layers(model)[0]
    seen = {}
    layer.base_layer.register_forward_hook(lambda module, args, output: seen.update(output=output))
    layer.register_forward_hook(lambda module, args, output: seen.update(result=output))
    lengths = torch.tensor([0, 3, 8, 9, 13], dtype=torch.int32)
    with torch.no_grad():
        stack(input_ids=torch.randint(3, VOCABULARY, (1, 13)), cu_seq_lens_q=lengths, use_cache=False)
        for one, output in zip(seen["result"][0].split(LENGTHS), seen["output"][0].split(LENGTHS), strict=True):
            torch.testing.assert_close(one, layer_alone(layer, output), rtol=0, atol=TOLERANCE)
    assert segments_of_lengths(lengths, 1, 13).tolist() == [[0] * 3 + [1] * 5 + [2] + [3] * 4]
    with pytest.raises(ValueError, match="one row of packed sequences, but the batch has 2"):
        segments_of_lengths(lengths, 2, 13)


def layer_alone(layer, output):
    """READ of one sequence (T, d) by its parts."""
    down, cell, up = (getattr(layer, f"readapter_{part}")["default"] for part in ("down", "cell", "up"))
    return output + up(nn.functional.gelu(cell(down(output)[None])[0]))[0]


class Blocks(nn.Module):
    """An encoder of our own kind: hidden states first, a mask, segments; blocks in a list."""

    class Block(nn.Module):
        def __init__(self, width, flatten):
            super().__init__()
            self.fc1, self.fc2, self.flatten = nn.Linear(width, 12), nn.Linear(12, width), flatten

        def forward(self, x):
            inner = self.fc2(self.fc1(x.flatten(0, 1) if self.flatten else x).relu())
            return x + inner.reshape(x.shape)

    def __init__(self, width=6, flatten=False):
        super().__init__()
        self.layers = nn.ModuleList(self.Block(width, flatten) for _ in range(2))

    def forward(self, inputs_embeds, attention_mask=None, segment_ids=None):
        for layer in self.layers:
            inputs_embeds = layer(inputs_embeds)
        return inputs_embeds


def adapted_blocks(**settings):
    flatten = settings.pop("flatten", False)
    torch.manual_seed(2)
    model = Blocks(flatten=flatten).double()
    return get_peft_model(model, READConfig(target_modules=["fc2"], init_weights=False, **settings)).eval()


@pytest.mark.parametrize("settings", [{}, {"bidirectional": True}, {"cell": "gru"}, {"flatten": True}])
def test_segments_of_a_row_are_sequences_of_their_own(settings):
    """The joint [video; text] sequence of Moment-DETR: two segments, each with its padding."""
    model = adapted_blocks(**settings)
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 0, 1, 1, 0, 0], [1, 1, 1, 0, 0, 1, 1, 1, 1]])
    segment_ids = torch.tensor([[0] * 5 + [1] * 4] * 2)
    joint = model(x, attention_mask=mask, segment_ids=segment_ids)
    video = model(x[:, :5], attention_mask=mask[:, :5])
    text = model(x[:, 5:], attention_mask=mask[:, 5:])
    expected, real = torch.cat((video, text), dim=1), mask.bool()
    torch.testing.assert_close(joint[real], expected[real], rtol=0, atol=1e-12)
    assert (model(x, attention_mask=mask)[real] - expected[real]).abs().max() > 1e-3  # without the ids: one sequence


def test_sequence_scope_tells_what_a_model_does_not():
    model = adapted_blocks()
    x = torch.randn(2, 6, 6, dtype=torch.float64)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    segments = torch.tensor([[0, 0, 0, 1, 1, 1]] * 2)
    expected = model(x, attention_mask=mask, segment_ids=segments)
    with sequence_scope(mask=mask, segment_ids=segments):
        torch.testing.assert_close(model(x), expected)
    with sequence_scope(mask=mask):  # the scope comes first, the rest from what the model is told itself
        torch.testing.assert_close(model(x, segment_ids=segments), expected)
        torch.testing.assert_close(model(x, segment_ids=segments, attention_mask=1 - mask), expected)

    plain = get_peft_model(
        nn.Sequential(nn.Linear(6, 6)).double(), READConfig(target_modules=["0"], init_weights=False)
    )
    with sequence_scope(mask=mask):
        whole = plain(x)
        torch.testing.assert_close(plain(x.flatten(0, 1)).view(2, 6, 6), whole)
        with pytest.raises(ValueError, match="2 sequences of 6 tokens"):
            plain(x[:, :5])
        with pytest.raises(ValueError, match="2 sequences of 6 tokens"):
            plain(x.flatten(0, 1)[:11])
    torch.testing.assert_close(whole[0, 2:], plain(x[:1, 2:])[0])
    with pytest.raises(ValueError, match="a mask"), sequence_scope():
        pass
    with pytest.raises(ValueError, match="must have one shape"), sequence_scope(mask, segments[:, :3]):
        pass


def test_a_flattened_batch_is_recurrent_and_does_not_leak():
    flat, straight = adapted_blocks(flatten=True), adapted_blocks()
    flat.load_state_dict(straight.state_dict())
    x = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(flat(x), straight(x))
    flat(x)[1, 3].sum().backward()
    assert x.grad[1, :4].any() and not x.grad[[0, 2]].any() and not x.grad[1, 4:].any()


class SequenceFirst(nn.Module):
    """The same feed-forward block with tokens in the first dimension."""

    def __init__(self):
        super().__init__()
        self.fc2 = nn.Linear(6, 6)

    def forward(self, x):
        return self.fc2(x)


def test_tokens_in_the_first_dimension():
    torch.manual_seed(0)
    base = SequenceFirst()
    settings = {"target_modules": ["fc2"], "init_weights": False}
    torch.manual_seed(1)
    turned = get_peft_model(copy.deepcopy(base), READConfig(batch_first=False, **settings))
    torch.manual_seed(1)
    straight = get_peft_model(base, READConfig(**settings))
    x = torch.randn(3, 7, 6)
    torch.testing.assert_close(turned(x.transpose(0, 1)).transpose(0, 1), straight(x))
    mask = torch.ones(3, 7)
    mask[1, :4] = 0
    with sequence_scope(mask=mask):
        torch.testing.assert_close(turned(x.transpose(0, 1)).transpose(0, 1), straight(x))
        flat = turned(x.transpose(0, 1).flatten(0, 1)).view(7, 3, 6).transpose(0, 1)
        torch.testing.assert_close(flat, straight(x))
        with pytest.raises(ValueError, match="batch_first=False"):
            straight(x.transpose(0, 1))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_torchs_own_encoder_in_both_layouts_and_off_its_fast_path(batch_first, grad):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first, dropout=0.0)
    base = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()
    model = get_peft_model(base, READConfig(target_modules=["linear2"], init_weights=False)).eval()
    x = torch.randn(3, 5, 8)
    padding = torch.tensor([[False] * 5, [False, False, False, True, True], [True, True, False, False, False]])
    with torch.set_grad_enabled(grad):
        result = model(x if batch_first else x.transpose(0, 1), src_key_padding_mask=padding)
        result = result if batch_first else result.transpose(0, 1)
        for row in range(3):
            real = x[row, ~padding[row]]
            expected = model(real[None] if batch_first else real[:, None])
            torch.testing.assert_close(result[row, ~padding[row]], expected.reshape(real.shape), rtol=0, atol=1e-5)
        with model.disable_adapter():
            without = model(x if batch_first else x.transpose(0, 1))
        full = model(x if batch_first else x.transpose(0, 1))
    assert (without - full).abs().max() > 1e-2  # the fast path would have gone past READ
    # with as many rows as tokens the shape tells nothing; the attention beside the layer does
    square = torch.randn(4, 4, 8)
    turned = model(square if batch_first else square.transpose(0, 1))
    turned = turned if batch_first else turned.transpose(0, 1)
    one = model(square[:1] if batch_first else square[:1].transpose(0, 1)).reshape(4, 8)
    torch.testing.assert_close(turned[0], one, rtol=0, atol=1e-5)


def test_the_fast_path_would_be_taken_without_the_hook():
    """The control: the hook is what keeps READ in."""
    base = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    model = get_peft_model(base, READConfig(target_modules=["linear2"], init_weights=False)).eval()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        right = model(x)
        for layer in base.layers:
            layer._forward_pre_hooks.clear()
            layer._forward_hooks.clear()
        wrong = model(x)
    assert (right - wrong).abs().max() > 1e-2


@pytest.mark.parametrize("length", [6, 8])
@pytest.mark.parametrize("family", ["bart", "t5"])
def test_keys_and_values_of_cross_attention_follow_the_encoders_sequence(family, length):
    model = adapted(family, target_modules="all-linear")
    ids, mask = padded_batch(family)
    decoder_ids = torch.randint(3, VOCABULARY, (3, length))  # also as long as the source: the shape tells nothing
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder_ids).logits
        for row in range(3):
            real = mask[row].bool()
            one = model(input_ids=ids[row, real][None], decoder_input_ids=decoder_ids[row][None]).logits
            torch.testing.assert_close(logits[row], one[0], rtol=0, atol=TOLERANCE)
    model.generation_config.eos_token_id = None
    cached, uncached = (
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, use_cache=cache)
        for cache in (True, False)
    )
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_all_linear_layers_of_other_models(family):
    model = adapted(family, target_modules="all-linear")
    ids, mask = padded_batch(family)
    padded = run(model, family, ids, mask, positions_of(mask))
    expected = alone(model, family, ids, mask, 1)
    torch.testing.assert_close(padded[1, mask[1].bool()], expected, rtol=0, atol=TOLERANCE)


def gradients_of(model, batches):
    model.zero_grad()
    losses = [model(**batch, use_cache=False).loss for batch in batches]  # all forwards before the one backward
    sum(losses).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("family", [*FAMILIES])
def test_checkpointed_gradients_are_the_plain_ones(family, use_reentrant):
    model = adapted(family).double().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "activation_dropout", "attn_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    model.enable_input_require_grads()
    batches = []
    for pads in ((0, 3, 5), (2, 0, 1)):  # two batches, padded differently
        ids, mask = padded_batch(family, pads=pads)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": ids})
    plain = gradients_of(model, batches)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    checkpointed = gradients_of(model, batches)
    assert plain.keys() == checkpointed.keys() and plain
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-9, atol=1e-12)
    model.gradient_checkpointing_disable()


class Elsewhere(Blocks):
    """Blocks of which the second is on the meta device, as if the model were split over devices."""

    def forward(self, inputs_embeds, attention_mask=None, segment_ids=None):
        first, second = self.layers
        return second(first(inputs_embeds).to("meta"))


@pytest.mark.parametrize("cell", ["none", "lstm"])
@pytest.mark.parametrize("ids", [None, [[0, 0, 1, 1], [0, 1, 1, 1]]])
def test_the_mask_follows_the_layers_to_their_devices(cell, ids, monkeypatch):
    # The recurrences themselves do not run on the meta device.
    monkeypatch.setattr(LSTM, "forward", lambda self, x, state, mask, keep_states: (x.where(mask[..., None], 0), None))
    model = get_peft_model(Elsewhere().double(), READConfig(target_modules=["fc2"], cell=cell, init_weights=False))
    model.base_model.model.layers[1].to("meta")
    x, mask = torch.randn(2, 4, 6, dtype=torch.float64), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
    told = {"attention_mask": mask, "segment_ids": None if ids is None else torch.tensor(ids)}
    result = model(x, **told)
    assert result.shape == x.shape and result.is_meta
    with sequence_scope(mask=mask, segment_ids=told["segment_ids"]):
        assert model(x).is_meta


def test_a_scope_belongs_to_the_thread_that_opens_it():
    mask = torch.tensor([[1, 1, 0]])
    with ThreadPoolExecutor(1) as pool, sequence_scope(mask=mask):
        assert pool.submit(current_scope).result() is None
        told = pool.submit(contextvars.copy_context().run, current_scope).result()
        assert told is current_scope() and torch.equal(told.mask, mask.bool())


def test_what_was_moved_is_moved_once():
    mask, ids = torch.tensor([[1, 1, 0]]).bool(), torch.tensor([[0, 1, 1]])
    scope = Scope(batch=1, length=3, mask=mask, segment_ids=ids)
    meta = torch.device("meta")
    assert scope.on(mask.device, mask) is mask and scope.on(meta, None) is None
    assert scope.on(meta, mask).is_meta and scope.on(meta, mask) is scope.on(meta, mask)
    segments = scope.segments
    assert segments.on(ids.device) is segments and segments.on(meta) is segments.on(meta)
    moved = segments.on(meta)
    assert moved.split(torch.zeros(1, 3, 2, device=meta)).shape == segments.split(torch.zeros(1, 3, 2)).shape
    assert moved.longest == 1 and segments.mask.device == ids.device


def test_torchs_checkpoint_wrapper(tmp_path):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = adapted("llama").train()
    ids, mask = padded_batch("llama")
    batch = [{"input_ids": ids, "attention_mask": mask, "labels": ids}]
    plain = gradients_of(model, batch)
    blocks = model.get_base_model().model.layers
    for index, block in enumerate(blocks):
        blocks[index] = checkpoint_wrapper(block)
    wrapped = gradients_of(model, batch)
    for name, gradient in wrapped.items():
        torch.testing.assert_close(gradient, plain[name.replace("_checkpoint_wrapped_module.", "")])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path)
    batch = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**batch).logits, model.eval()(**batch).logits)


def test_a_checkpoint_that_read_does_not_know_is_an_error():
    from torch.utils.checkpoint import checkpoint

    model = adapted_blocks()
    model.train()
    first = model.base_model.model.layers[0]
    forward = first.forward
    first.forward = lambda x: checkpoint(forward, x, use_reentrant=False)
    x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    loss = model(x, attention_mask=torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])).sum()
    with pytest.raises(RuntimeError, match="recomputed in a backward pass without the mask"):
        loss.backward()


def test_a_pooled_vector_follows_nothing():
    model = adapted("bert", target_modules=["pooler.dense"])
    ids, mask = padded_batch("bert")
    with torch.no_grad():
        rows = model(input_ids=ids, attention_mask=mask).pooler_output
        one = model(input_ids=ids[:1], attention_mask=mask[:1]).pooler_output
    torch.testing.assert_close(rows[:1], one)


def test_outputs_that_fit_no_sequence_are_refused():
    class Pooled(Blocks):
        def forward(self, inputs_embeds, attention_mask=None):
            return self.layers[0](inputs_embeds[:, ::2])

    model = get_peft_model(Pooled(), READConfig(target_modules=["fc2"], init_weights=False))
    x = torch.randn(2, 6, 6)
    torch.testing.assert_close(model(x)[1:], model(x[1:]))  # every other token, sequences of their own
    with pytest.raises(ValueError, match=r"READ layer 'layers.0.fc2' sees 2 rows of 3 tokens, some of them padding"):
        model(x, attention_mask=torch.tensor([[1] * 6, [1] * 4 + [0] * 2]))
    model = build("llama")
    assert run(get_peft_model(model, READConfig()), "llama", torch.ones(1, 3, dtype=torch.long), None).shape[1] == 3


@pytest.mark.parametrize("name", ["rnn", "gru", "lstm"])
def test_segments_are_run_as_sequences_of_their_own(name):
    cell = build_cell(name, 4).double()
    segment_ids = torch.tensor([[5, 5, 5, 2, 2, 9, 9], [0, 1, 0, 1, 0, 1, 1]])
    mask = torch.tensor([[1, 0, 1, 1, 1, 1, 0], [1] * 7], dtype=torch.bool)
    x = torch.randn(2, 7, 4, dtype=torch.float64, requires_grad=True)
    segments = Segments(segment_ids, mask)
    joined = segments.join(cell(segments.split(x), None, segments.mask)[0])
    for row in range(2):
        for segment in segment_ids[row].unique():
            tokens = (segment_ids[row] == segment) & mask[row]
            alone, _ = cell(x[row, tokens][None])
            torch.testing.assert_close(joined[row, tokens], alone[0], rtol=0, atol=1e-14)
    assert not joined[~mask].any()
    joined.sum().backward()
    assert x.grad[mask].abs().sum(-1).gt(0).all() and not x.grad[~mask].any()


@pytest.mark.parametrize("pattern", PADDING)
@pytest.mark.parametrize("name", ["rnn", "gru", "lstm"])
def test_states_of_segments_are_carried_over_padding(name, pattern):
    """One segment a row is the row itself."""
    cell, mask = build_cell(name, 4).double(), torch.tensor(PADDING[pattern], dtype=torch.bool)
    x = torch.randn(3, 8, 4, dtype=torch.float64)
    segments = Segments(torch.full((3, 8), 5), mask)
    _, states = cell(segments.split(x), None, segments.mask, keep_states=True)
    _, expected = cell(x, None, mask, keep_states=True)
    torch.testing.assert_close(segments.carried(states), expected, rtol=0, atol=1e-14)


def test_segments_of_nothing_but_padding():
    segments = Segments(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, dtype=torch.bool))
    x = torch.randn(2, 3, 4)
    cell = build_cell("rnn", 4)
    assert not segments.join(cell(segments.split(x), None, segments.mask)[0]).any()


@pytest.fixture
def unasked(monkeypatch):
    """As on CUDA: whether a mask has any padding is not asked when it is read."""
    monkeypatch.setattr(masks, "_none_without_padding", lambda mask: mask)


def test_a_mask_without_padding_is_no_error_where_padding_would_be(unasked):
    class Pooled(Blocks):
        def forward(self, inputs_embeds, attention_mask=None):
            return self.layers[0](inputs_embeds[:, ::2])

    class Bare(Blocks):
        def forward(self, inputs_embeds, attention_mask=None):
            return self.layers[0].fc2(torch.nn.functional.pad(inputs_embeds, (0, 6))[:, ::2])

    x, ones = torch.randn(2, 6, 6), torch.ones(2, 6)
    for kind in (Pooled, Bare):  # a block with rows of its own, and a layer
        model = get_peft_model(kind(), READConfig(target_modules=["fc2"], init_weights=False))
        assert torch.equal(model(x, attention_mask=ones), model(x))
        with pytest.raises(ValueError, match="some of them padd"):
            model(x, attention_mask=torch.tensor([[1] * 6, [1] * 4 + [0] * 2]))


def test_pooled_blocks_of_funnel_take_a_mask_without_padding(unasked):
    settings = {"block_sizes": [1, 1], "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32, "num_decoder_layers": 1}
    base = FunnelModel(FunnelConfig(vocab_size=VOCABULARY, **settings)).eval()
    model = get_peft_model(base, READConfig(init_weights=False)).eval()
    ids = torch.randint(3, VOCABULARY, (2, 9))
    with torch.no_grad():
        found, expected = (model(ids, attention_mask=mask).last_hidden_state for mask in (torch.ones_like(ids), None))
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


def test_frames_with_a_mask_without_padding_are_one_sequence():
    ones, output = torch.ones(6, 4, dtype=torch.bool), torch.randn(6, 4, 5)
    for mask, rows in ((ones, 2), (ones.tril(), 6)):
        scope = Scope(batch=6, length=4, mask=mask, tower=Tower(rows=6, frames=(2, 3)))
        found = as_sequences(output, output, scope, path="layers.0.fc2", batch_first=True, notice=Notice())
        assert len(found.tensor) == rows
        assert torch.equal(found.restore(found.tensor), output)
