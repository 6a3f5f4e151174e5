"""The fine-tuning baselines: what each one trains, and prompts that the rest of the model does not notice."""

import copy

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration

from peft_read.baselines import FREEZING_METHODS, HEADS, add_prompts, train_only
from peft_read.models import (
    MomentDetrConfig,
    MomentDetrForTemporalGrounding,
    UMTConfig,
    UMTForTemporalGrounding,
    VGBartConfig,
    VGBartForConditionalGeneration,
    VGT5Config,
    VGT5ForConditionalGeneration,
)


def moment_detr(**options):
    sizes = {"video_feature_dim": 6, "text_feature_dim": 5, "d_model": 8, "num_attention_heads": 2, "ffn_dim": 16}
    return MomentDetrForTemporalGrounding(MomentDetrConfig(**{**sizes, **options})).eval()


def umt(**options):
    sizes = {"video_feature_dim": 6, "audio_feature_dim": None, "text_feature_dim": 5, "d_model": 8}
    config = UMTConfig(**{**sizes, "max_positions": 16, "heads": ["saliency", "boundary"], **options})
    return UMTForTemporalGrounding(config).eval()


def bart():
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return BartForConditionalGeneration(BartConfig(vocab_size=20, d_model=8, **sizes, **heads))


def batch():
    return {
        "video_features": torch.randn(2, 7, 6),
        "video_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3]),
        "text_features": torch.randn(2, 3, 5),
        "text_mask": torch.tensor([[1, 1, 1], [1, 0, 0]]),
    }


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("build", [bart, moment_detr, umt])
def test_full_and_none_train_everything_and_nothing(build):
    model = build()
    assert trained(train_only(model, "full")) == {name for name, _ in model.named_parameters()}
    assert trained(train_only(model, "none")) == set()


@pytest.mark.parametrize("build", [bart, moment_detr, umt])
def test_bias_trains_every_bias_and_nothing_else(build):
    model = train_only(build(), "bias")
    names = {name for name, _ in model.named_parameters()}
    assert trained(model) == {name for name in names if name.endswith("bias")}


def test_partial_trains_the_last_block_of_every_stack():
    blocks = {name.rsplit(".layers.1.", 1)[0] for name in trained(train_only(bart(), "partial"))}
    assert blocks == {"model.encoder", "model.decoder"}
    model = train_only(moment_detr(encoder_layers=3), "partial")
    layers = [model.transformer.encoder.layers[2], model.transformer.decoder.layers[1]]
    assert trained(model) == {
        name for name, p in model.named_parameters() if any(p is q for layer in layers for q in layer.parameters())
    }
    for count, last in ((1, "video_enc.encoder."), (2, "video_enc.encoder.1.")):  # one block is no list
        names = trained(train_only(umt(decoder_layers=3, encoder_layers=count), "partial"))
        assert {name for name in names if name.startswith("video_enc")}
        assert all(name.startswith((last, "query_dec.decoder.2.")) for name in names), names


def test_proj_trains_the_output_layer():
    model = train_only(bart(), "proj")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 20 * 8
    for model in (moment_detr(), umt()):
        heads = trained(train_only(model, "proj"))
        kinds = HEADS[model.config.model_type]
        assert {kind for kind in kinds if any(kind in name for name in heads)} == set(kinds)
        assert all(any(kind in name for kind in kinds) for name in heads)


def test_new_modules_are_trained_in_any_case_and_errors_name_the_methods():
    model = train_only(moment_detr(), "none", also=["saliency_proj"])
    assert trained(model) == {"saliency_proj.weight", "saliency_proj.bias"}
    with pytest.raises(ValueError, match="'lora' is not one of"):
        train_only(model, "lora")
    with pytest.raises(ValueError, match="finds nothing to train in Linear"):
        train_only(torch.nn.Linear(2, 2), "partial")
    assert set(FREEZING_METHODS) == {"full", "bias", "partial", "proj", "none"}


@pytest.mark.parametrize(
    ("also", "message"),
    [
        (["saliency_proj", "span_embde"], r"'span_embde' is neither .* in MomentDetr.* near names: span_embed"),
        (["transformer.decoder.layers.0.liner1"], r"near names: transformer\.decoder\.layers\.0\.linear1"),
        (["of_another_model"], "its modules: transformer, encoder, .*saliency_proj"),
        (["saliency_proj.weight"], "is neither the name of a module"),
        ([""], "'' is neither"),
        ("saliency_proj", r"is one string; write a list of names, \['saliency_proj'\]"),
    ],
)
@pytest.mark.parametrize("apply", [lambda model, **also: train_only(model, "none", **also), add_prompts])
def test_a_name_that_no_module_has_is_an_error_that_names_near_ones(apply, also, message):
    model = moment_detr()
    with pytest.raises(ValueError, match=message):
        apply(model, also=also)
    assert trained(model) == {name for name, _ in model.named_parameters()} and not hasattr(model, "prompts")


def test_a_module_without_parameters_cannot_be_trained():
    with pytest.raises(ValueError, match=r"also=.*'activation_fn' is neither the name of a module with parameters"):
        train_only(bart(), "bias", also=["activation_fn"])


@pytest.mark.parametrize("build", [moment_detr, umt, lambda: umt(encoder_layers=2, mask_decoder=True)])
def test_prompts_act_on_both_streams_and_keep_every_shape(build):
    model, inputs = build(), batch()
    before = model(**inputs)
    model = add_prompts(model, length=4)
    after = model(**inputs)
    for name, value in before.items():
        if isinstance(value, torch.Tensor):
            assert after[name].shape == value.shape, name
    if "encoder_hidden_states" in before:
        shapes = [state.shape for state in before.encoder_hidden_states]
        assert [state.shape for state in after.encoder_hidden_states] == shapes
        assert torch.equal(after.encoder_hidden_states[0], before.encoder_hidden_states[0])
    assert not torch.allclose(after.saliency_scores, before.saliency_scores)
    assert trained(model) == {"prompts.video", "prompts.text"}
    after.saliency_scores.sum().backward()
    assert model.prompts.video.grad.abs().sum() > 0
    assert model.prompts.text.grad.abs().sum() > 0


@pytest.mark.parametrize("build", [moment_detr, lambda: umt(mask_decoder=True)])
def test_padding_stays_without_effect_under_prompts(build):
    model, inputs = add_prompts(build()), batch()
    alone = {
        "video_features": inputs["video_features"][1:, :4],
        "text_features": inputs["text_features"][1:, :1],
    }
    together, single = model(**inputs), model(**alone)
    assert torch.allclose(together.saliency_scores[1, :4], single.saliency_scores[0], atol=1e-6)


def test_a_prompt_is_one_more_clip_and_one_more_word():
    """The known answer: a frozen Moment-DETR encoder over [prompts; video; prompts; text], written out."""
    model, inputs = add_prompts(moment_detr(), length=2), batch()
    inputs = {name: value[:1] for name, value in inputs.items()}
    hidden = model(**inputs).encoder_hidden_states
    prompts, (video, text) = model.prompts, hidden[0].split([7, 3], dim=1)
    states = torch.cat((prompts.video[None], video, prompts.text[None], text), dim=1)
    positions = torch.zeros_like(states)
    positions[:, 2:9] = model.position_embed(torch.ones(1, 7))
    for layer in model.transformer.encoder.layers:
        states = layer(states, torch.zeros(1, 14, dtype=torch.bool), positions)
    assert torch.allclose(hidden[-1], torch.cat((states[:, 2:9], states[:, 11:]), dim=1), atol=1e-6)


def test_prompts_survive_copies_and_state_dicts():
    model, inputs = add_prompts(moment_detr()), batch()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.prompts.video.add_(1)
    assert not torch.allclose(twin(**inputs).saliency_scores, model(**inputs).saliency_scores)
    fresh = add_prompts(moment_detr())
    fresh.load_state_dict(twin.state_dict())
    assert torch.equal(fresh(**inputs).saliency_scores, twin(**inputs).saliency_scores)


def test_a_model_without_text_gets_video_prompts_only_and_other_models_get_none():
    model = add_prompts(umt(text_feature_dim=None))
    assert trained(model) == {"prompts.video"}
    inputs = {name: value for name, value in batch().items() if name.startswith("video")}
    assert model(**inputs).saliency_scores.shape == (2, 7)
    with pytest.raises(ValueError, match="has prompts already"):
        add_prompts(model)
    with pytest.raises(ValueError, match="length=0 must be positive"):
        add_prompts(umt(), length=0)
    with pytest.raises(ValueError, match="not of BartForConditionalGeneration"):
        add_prompts(bart())


FUSION = {"visual_feature_dim": 6, "use_forget_gate": True, "mask_fusion": True, "img_trans_heads": 2}
FUSION |= {"img_trans_layers": 1, "img_trans_ffn_dim": 8}
KINDS = ("vg_bart", "vg_t5")


def summariser(kind, **options):
    torch.manual_seed(0)
    if kind == "vg_bart":
        sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "init_std": 0.5}
        sizes |= {
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "fusion_layer": 0,
            "forced_eos_token_id": 2,
        }
        config = VGBartConfig(vocab_size=20, d_model=8, max_position_embeddings=32, **{**FUSION, **sizes, **options})
        return VGBartForConditionalGeneration(config).eval()
    sizes = {"d_kv": 4, "d_ff": 8, "num_layers": 2, "num_heads": 2, "fusion_place": "layer", "fusion_layer": 0}
    config = VGT5Config(vocab_size=20, d_model=8, **{**FUSION, **sizes, **options})
    return VGT5ForConditionalGeneration(config).eval()


def visual(kind):
    return {"use_img_trans": True} | ({"apply_img_trans": True} if kind == "vg_t5" else {})


def transcripts():
    torch.manual_seed(1)
    return {
        "input_ids": torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        "video_features": torch.randn(2, 5, 6),
        "video_mask": torch.tensor([[1] * 5, [1, 1, 1, 0, 0]]),
    }


SUMMARY = torch.tensor([[3, 4, 5], [6, 7, 8]])


@pytest.mark.parametrize("kind", KINDS)
def test_a_summarisers_prompts_are_words_and_frames_before_the_first(kind):
    """The known answer: prompts that ARE words and frames give the states of the longer inputs."""
    model, inputs = summariser(kind), transcripts()
    encoder = model.get_encoder()
    if kind == "vg_bart":  # its prompts have no position
        torch.nn.init.zeros_(encoder.embed_positions.weight)
    words, frames = torch.tensor([11, 12]), torch.randn(2, 6)
    longer = {
        "input_ids": torch.cat((words.expand(2, -1), inputs["input_ids"]), 1),
        "video_features": torch.cat((frames.expand(2, -1, -1), inputs["video_features"]), 1),
        **{name: torch.cat((torch.ones(2, 2), inputs[name]), 1) for name in ("attention_mask", "video_mask")},
    }
    with torch.no_grad():
        wanted = encoder(**longer, output_hidden_states=True)
        embedded = encoder.embed_tokens(words)
        embedded = encoder.layernorm_embedding(embedded) if kind == "vg_bart" else embedded
        add_prompts(model, length=2)
        model.prompts.text.copy_(embedded)
        model.prompts.video.copy_(frames)
        actual = encoder(**inputs, output_hidden_states=True)
    assert torch.allclose(actual.last_hidden_state, wanted.last_hidden_state[:, 2:], atol=1e-5)
    for short, long in zip(actual.hidden_states, wanted.hidden_states, strict=True):
        assert torch.allclose(short, long[:, 2:], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_summarisers_prompts_act_keep_shapes_and_alone_are_trained(kind):
    model, inputs = summariser(kind, **visual(kind)), transcripts()
    before = model(**inputs, labels=SUMMARY, output_hidden_states=True)
    add_prompts(model, length=4)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 4 * 8 + 4 * 6
    after = model(**inputs, labels=SUMMARY, output_hidden_states=True)
    assert after.loss != before.loss
    assert [s.shape for s in after.encoder_hidden_states] == [s.shape for s in before.encoder_hidden_states]
    after.loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"prompts.text", "prompts.video"}
    assert all(p.grad.abs().sum() > 0 for p in model.prompts.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_frames_and_words_keep_their_positions(kind):
    model, inputs, seen = summariser(kind, **visual(kind)), transcripts(), []
    stack = model.get_encoder().img_transformer.encoder
    hooks = [stack.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))]
    if kind == "vg_bart":
        layer = model.get_encoder().layers[0]
        hooks.append(layer.register_forward_pre_hook(lambda module, args: seen.append(args[0])))
    model(**inputs, labels=SUMMARY)
    add_prompts(model, length=3)
    model(**inputs, labels=SUMMARY)
    half = len(seen) // 2
    assert half == len(hooks)
    for bare, prompted in zip(seen[:half], seen[half:], strict=True):
        assert torch.equal(prompted[:, 3:], bare)
        assert prompted.shape[1] == bare.shape[1] + 3


@pytest.mark.parametrize("kind", KINDS)
def test_cached_generation_under_prompts_equals_uncached_and_padding_has_no_effect(kind):
    model, inputs = add_prompts(summariser(kind, **visual(kind)), length=3), transcripts()
    torch.nn.init.normal_(model.prompts.text)
    modes = ({"num_beams": 1}, {"num_beams": 3}, {"do_sample": True, "top_k": 5})
    for mode in modes:
        summaries = []
        for use_cache in (True, False):
            torch.manual_seed(2)
            summaries.append(model.generate(**inputs, **mode, use_cache=use_cache, max_new_tokens=6, min_new_tokens=6))
        assert torch.equal(*summaries), mode
    alone = {name: value[1:, : 2 if value.dim() == 2 and "video" not in name else 3] for name, value in inputs.items()}
    together = model(**inputs, decoder_input_ids=SUMMARY)
    single = model(**alone, decoder_input_ids=SUMMARY[1:])
    assert torch.allclose(together.logits[1], single.logits[0], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_summarisers_prompts_survive_copies_and_state_dicts(kind):
    model, inputs = add_prompts(summariser(kind)), transcripts()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.prompts.video.add_(torch.randn(10, 6))
        twin.prompts.text.add_(torch.randn(10, 8))

    def logits(model):
        return model(**inputs, decoder_input_ids=SUMMARY).logits

    assert not torch.allclose(logits(twin), logits(model))
    fresh = add_prompts(summariser(kind))
    fresh.load_state_dict(twin.state_dict())
    assert torch.equal(logits(fresh), logits(twin))
    text_only = {"vg_bart": None, "vg_t5": 0}[kind]
    with pytest.raises(ValueError, match="sees no video"):
        add_prompts(summariser(kind, fusion_layer=text_only, **({"fusion_place": "final"} if kind == "vg_t5" else {})))
