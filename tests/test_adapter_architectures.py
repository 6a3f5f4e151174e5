"""READ on architectures with something of their own: speech, images beside text, experts, other caches."""

import pytest
import torch
import transformers as t
from peft import get_peft_model

from peft_read import READConfig

TOKENS = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BLOCKS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGES = {"image_size": 32, "patch_size": 8}


def with_read(model, **settings):
    torch.manual_seed(1)
    model = get_peft_model(model, READConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "readapter_" in name:
                parameter.uniform_(-0.5, 0.5)
    return model


def generates_alike(model, **inputs):
    """Whether generation with a cache gives the tokens of generation without one, with beams too."""
    model.generation_config.eos_token_id = None
    settings = {**inputs, "max_new_tokens": 5, "do_sample": False}
    for beams in (1, 3):
        cached = model.generate(**settings, num_beams=beams)
        assert torch.equal(cached, model.generate(**settings, num_beams=beams, use_cache=False))


def test_whisper_reads_frames_and_generates_words():
    sizes = {"d_model": 32, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 30}
    layers = {f"{part}_{name}": value for part in ("encoder", "decoder")
              for name, value in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 48))}  # fmt: skip
    silence = {"suppress_tokens": None, "begin_suppress_tokens": None, "decoder_start_token_id": 1}
    model = t.WhisperForConditionalGeneration(t.WhisperConfig(**TOKENS, **sizes, **layers, **silence))
    generates_alike(with_read(model), input_features=torch.randn(2, 8, 40))


def test_an_image_encoder_inside_a_language_model_keeps_to_its_patches():
    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**{**BLOCKS, "num_hidden_layers": 3}, **IMAGES),
        text_config=t.LlamaConfig(**TOKENS, **BLOCKS),
        image_token_index=5,
        image_seq_length=16,
    )
    model = with_read(t.LlavaForConditionalGeneration(config), target_modules=["down_proj", "fc2"])
    ids = torch.randint(6, 60, (2, 22))
    ids[:, 2:18] = 5
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    generates_alike(model, input_ids=ids, attention_mask=mask, pixel_values=torch.randn(2, 3, 32, 32))


def test_a_mixture_of_experts_is_adapted_around_its_experts():
    config = t.MixtralConfig(**TOKENS, **BLOCKS, num_key_value_heads=1, num_local_experts=4)
    model = with_read(t.MixtralForCausalLM(config), target_modules="all-linear")
    ids = torch.randint(6, 60, (2, 9))
    generates_alike(model, input_ids=ids, attention_mask=torch.ones_like(ids))


def test_layers_of_attention_and_of_states_in_one_cache():
    linear = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
              "linear_value_head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
              "shared_expert_intermediate_size": 16, "head_dim": 16, "num_key_value_heads": 1}  # fmt: skip
    config = t.AutoConfig.for_model("qwen3_next", **TOKENS, **{**BLOCKS, "num_hidden_layers": 4}, **linear)
    model = with_read(t.AutoModelForCausalLM.from_config(config), target_modules=["shared_expert.down_proj", "o_proj"])
    ids = torch.randint(6, 60, (2, 9))
    generates_alike(model, input_ids=ids, attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize("family", ["clip", "siglip", "vit"])
def test_images_are_sequences_of_patches(family):
    vision = {**BLOCKS, **IMAGES}
    text = {**BLOCKS, "vocab_size": 60, "eos_token_id": 2}
    model, inputs = {
        "clip": lambda: (t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=vision)), {"input_ids"}),
        "siglip": lambda: (t.SiglipModel(t.SiglipConfig(text_config=text, vision_config=vision)), {"input_ids"}),
        "vit": lambda: (t.ViTModel(t.ViTConfig(**vision)), set()),
    }[family]()
    model = with_read(model)
    given = {"pixel_values": torch.randn(2, 3, 32, 32)}
    if inputs:
        given["input_ids"] = torch.randint(3, 60, (2, 7))
    with torch.no_grad():
        both = model(**given)[0]
        first = model(**{name: value[:1] for name, value in given.items()})[0]
    torch.testing.assert_close(both[:1, :1], first[:1, :1], rtol=0, atol=1e-5)
