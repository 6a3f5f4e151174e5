"""Rows of the embeddings that are trained beside READ (`trainable_token_indices`), by peft's own wrapper."""

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import build, padded_batch

from peft_read import READConfig

TOKENS = [38, 39]


def trained(family="llama", *, tokens=TOKENS, steps=2, **changes):
    base = build(family, **changes)
    model = get_peft_model(base, READConfig(trainable_token_indices=tokens, init_weights=False))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    ids, mask = padded_batch(family, pads=(0, 1))
    ids[:, -3:-1] = torch.tensor(TOKENS)
    for _ in range(steps):
        model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), {"input_ids": ids, "attention_mask": mask}


def logits(model, inputs, **extra):
    extra = {"decoder_input_ids": inputs["input_ids"], **extra} if model.config.is_encoder_decoder else extra
    with torch.no_grad():
        return model(**inputs, **extra).logits


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("bart", {}), ("gpt2", {})],
)
def test_only_these_rows_are_trained_saved_and_loaded(tmp_path, family, changes):
    model, inputs = trained(family, **changes)
    before = build(family, **changes).get_input_embeddings().weight
    after = model.get_input_embeddings().weight
    assert {row for row in range(len(before)) if not torch.equal(before[row], after[row])} == set(TOKENS)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    rows = [weight for name, weight in saved.items() if "readapter_" not in name]
    assert [tuple(weight.shape) for weight in rows] == [(2, 16)]
    assert "| trainable token indices | `[38, 39]` |" in (tmp_path / "README.md").read_text()
    assert PeftConfig.from_pretrained(tmp_path).trainable_token_indices == TOKENS
    loaded = PeftModel.from_pretrained(build(family, **changes), tmp_path).eval()
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


def test_tied_output_embeddings_follow():
    model, _ = trained(tie_word_embeddings=True)
    assert torch.equal(model.get_output_embeddings().weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize("tied", [False, True])
def test_the_base_model_comes_back(tied):
    model, inputs = trained(tie_word_embeddings=tied)
    plain = logits(build("llama", tie_word_embeddings=tied), inputs)
    assert not torch.equal(logits(model, inputs), plain)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), plain)
    assert torch.equal(logits(model.unload(), inputs), plain)


def test_every_row_of_a_batch_reads_its_own_embeddings():
    model, inputs = trained()
    plain = logits(build("llama"), inputs)
    alone = logits(model, inputs)
    mixed = logits(model, inputs, adapter_names=["default", "__base__"])
    torch.testing.assert_close(mixed[0], alone[0])
    torch.testing.assert_close(mixed[1], plain[1])


def test_an_embedding_may_be_named_and_set_after_the_configuration_is_made():
    """As trainers do that add tokens to the vocabulary."""
    named, inputs = trained(tokens={"embed_tokens": TOKENS})
    assert torch.equal(logits(named, inputs), logits(trained()[0], inputs))
    config = READConfig(init_weights=False)
    config.trainable_token_indices = {"embed_tokens": TOKENS}
    model = get_peft_model(build("llama"), config)
    assert any("trainable_tokens_delta" in name for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "is empty"),
        ([3, -1], "-1 is not"),
        ([3, 3], "3 is not"),
        ([1.5], "is not an integer"),
        ("<video>", "not a sequence of integers"),
        ({"embed_tokens": "all"}, r"trainable_token_indices\['embed_tokens'\]"),
    ],
)
def test_invalid_tokens_are_named(tokens, message):
    with pytest.raises(ValueError, match=message):
        READConfig(trainable_token_indices=tokens)


@pytest.mark.parametrize("tokens", [[3, 40], {"embed_tokens": [40]}])
def test_tokens_that_the_embedding_lacks_leave_the_model_alone(tokens):
    base = build("llama")
    names = list(base.state_dict())
    with pytest.raises(ValueError, match=r"has the token 40, and the embedding has 40 of them"):
        get_peft_model(base, READConfig(trainable_token_indices=tokens))
    assert list(base.state_dict()) == names


def test_numbers_of_torch_are_converted():
    assert READConfig(trainable_token_indices=torch.tensor(TOKENS)).trainable_token_indices == TOKENS


def test_a_model_without_an_embedding_of_tokens_is_named():
    from peft_read.models import UMTConfig, UMTForTemporalGrounding

    sizes = {"video_feature_dim": 6, "audio_feature_dim": None, "text_feature_dim": 5, "d_model": 16}
    model = UMTForTemporalGrounding(UMTConfig(**sizes))
    with pytest.raises(ValueError, match="UMTForTemporalGrounding has no input embedding of tokens"):
        get_peft_model(model, READConfig(r=2, trainable_token_indices=[1]))
    get_peft_model(UMTForTemporalGrounding(UMTConfig(**sizes)), READConfig(r=2))
