"""READ on this project's own backbones: default targets, segments, padding and generation."""

import pytest
import torch
from peft import get_peft_model
from tiny_models import read_layers

from peft_read import READConfig
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

SHORT = {"vocab_size": 40, "d_model": 16, "visual_feature_dim": 8, "img_trans_heads": 2, "img_trans_layers": 1}
SHORT |= {"img_trans_ffn_dim": 16, "use_img_trans": True, "use_forget_gate": True, "pad_token_id": 0}


def moment_detr():
    return MomentDetrForTemporalGrounding(
        MomentDetrConfig(video_feature_dim=6, text_feature_dim=5, d_model=16, num_attention_heads=2, ffn_dim=32)
    )


def umt():
    return UMTForTemporalGrounding(
        UMTConfig(
            video_feature_dim=6, audio_feature_dim=4, text_feature_dim=5, d_model=16, num_attention_heads=2,
            max_positions=32, decoder_layers=2, mask_decoder=True,
        )
    )  # fmt: skip


def vg_bart():
    return VGBartForConditionalGeneration(
        VGBartConfig(
            **SHORT, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=2, forced_eos_token_id=None, init_std=0.1, mask_fusion=True,
        )
    )  # fmt: skip


def vg_t5():
    return VGT5ForConditionalGeneration(
        VGT5Config(
            **SHORT, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=2, num_heads=2, fusion_layer=1,
            mask_fusion=True, eos_token_id=2, decoder_start_token_id=0, apply_img_trans=True,
        )
    )  # fmt: skip


def with_read(build, **settings):
    torch.manual_seed(0)
    model = get_peft_model(build(), READConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "readapter_" in name:
                parameter.uniform_(-0.6, 0.6)
    return model


EXPECTED = {
    moment_detr: {"transformer.encoder.layers.0.linear2", "transformer.decoder.layers.1.linear2"},
    umt: {
        "video_enc.encoder.ffn.mapping.3",
        "audio_enc.encoder.ffn.mapping.3",
        "cross_enc.encoder.encoder.0.ffn1.mapping.3",
        "cross_enc.encoder.encoder.0.ffn2.mapping.3",
        "query_dec.decoder.1.ffn.mapping.3",
    },
    vg_bart: {"model.encoder.layers.0.fc2", "model.decoder.layers.1.fc2"},
    vg_t5: {"encoder.block.0.layer.1.DenseReluDense.wo", "decoder.block.1.layer.2.DenseReluDense.wo"},
}
COUNTS = {moment_detr: 4, umt: 6, vg_bart: 4, vg_t5: 4}


@pytest.mark.parametrize("build", EXPECTED, ids=lambda build: build.__name__)
def test_default_targets(build):
    layers = read_layers(with_read(build))
    names = {layer.path for layer in layers}
    assert len(names) == COUNTS[build]
    assert EXPECTED[build] <= names or {name.replace("encoder.0.", "encoder.") for name in EXPECTED[build]} <= names
    cells = {layer.path: layer.cell_name["default"] for layer in layers}
    assert all((cell == "none") == (build is moment_detr and ".decoder." in name) for name, cell in cells.items())


def test_moment_detr_keeps_video_and_text_apart_and_padding_out():
    model = with_read(moment_detr)
    video, text = torch.randn(2, 7, 6), torch.randn(2, 5, 5)
    video_mask, text_mask = torch.ones(2, 7), torch.ones(2, 5)
    video_mask[1, 4:], text_mask[1, 3:] = 0, 0
    with torch.no_grad():
        padded = model(video_features=video, video_mask=video_mask, text_features=text, text_mask=text_mask)
        alone = model(video_features=video[1:, :4], video_mask=torch.ones(1, 4), text_features=text[1:, :3],
                      text_mask=torch.ones(1, 3))  # fmt: skip
    torch.testing.assert_close(padded.pred_spans[1:], alone.pred_spans, rtol=0, atol=1e-5)
    torch.testing.assert_close(padded.saliency_scores[1:, :4], alone.saliency_scores, rtol=0, atol=1e-5)

    layer = next(layer for layer in read_layers(model) if ".encoder." in layer.path)
    seen = {}
    layer.base_layer.register_forward_hook(lambda module, args, output: seen.update(output=output.requires_grad_()))
    layer.register_forward_hook(lambda module, args, output: seen.update(result=output))
    model(video_features=video, video_mask=video_mask, text_features=text, text_mask=text_mask)
    first_word = torch.autograd.grad(seen["result"][0, 7].sum(), seen["output"], retain_graph=True)[0][0]
    assert first_word[7].any() and not first_word[:7].any()  # the text does not go on from the video
    last_clip = torch.autograd.grad(seen["result"][0, 6].sum(), seen["output"])[0][0]
    assert last_clip[:7].abs().sum(-1).gt(0).all() and not last_clip[7:].any()


def test_umt_keeps_padding_out():
    model = with_read(umt)
    video, audio, text = torch.randn(2, 7, 6), torch.randn(2, 7, 4), torch.randn(2, 5, 5)
    video_mask, text_mask = torch.ones(2, 7), torch.ones(2, 5)
    video_mask[1, 4:], text_mask[1, 3:] = 0, 0
    with torch.no_grad():
        padded = model(video_features=video, audio_features=audio, text_features=text, video_mask=video_mask,
                       text_mask=text_mask)  # fmt: skip
        alone = model(video_features=video[1:, :4], audio_features=audio[1:, :4], text_features=text[1:, :3])
    torch.testing.assert_close(padded.saliency_scores[1:, :4], alone.saliency_scores, rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [{"num_beams": 1}, {"num_beams": 3}])
@pytest.mark.parametrize("build", [vg_bart, vg_t5], ids=lambda build: build.__name__)
def test_video_guided_models_generate_with_a_cache_and_without_padding_the_same(build, settings):
    model = with_read(build)
    model.generation_config.eos_token_id = None
    ids, frames = torch.randint(3, 40, (2, 6)), torch.randn(2, 5, 8)
    mask, video_mask = torch.ones_like(ids), torch.ones(2, 5)
    mask[1, 4:], video_mask[1, 3:] = 0, 0
    inputs = {"input_ids": ids * mask, "attention_mask": mask, "video_features": frames, "video_mask": video_mask}
    settings = {"max_new_tokens": 6, "do_sample": False, **settings}
    cached = model.generate(**inputs, **settings)
    assert torch.equal(cached, model.generate(**inputs, **settings, use_cache=False))
    alone = {"input_ids": ids[1:, :4], "attention_mask": mask[1:, :4], "video_features": frames[1:, :3]}
    assert torch.equal(cached[1:], model.generate(**alone, video_mask=torch.ones(1, 3), **settings))


@pytest.mark.parametrize("build", [vg_bart, vg_t5], ids=lambda build: build.__name__)
def test_the_visual_transformer_can_be_adapted(build):
    model = with_read(build, target_modules=r".*img_transformer.*linear2")
    assert read_layers(model)
    # as many frames as words: the shapes do not tell the two sequences apart
    ids, frames, video_mask = torch.randint(3, 40, (2, 5)), torch.randn(2, 5, 8), torch.ones(2, 5)
    video_mask[1, 3:] = 0
    with torch.no_grad():
        padded = model(input_ids=ids, video_features=frames, video_mask=video_mask, decoder_input_ids=ids).logits
        alone = model(input_ids=ids[1:], video_features=frames[1:, :3], video_mask=torch.ones(1, 3),
                      decoder_input_ids=ids[1:]).logits  # fmt: skip
    torch.testing.assert_close(padded[1:], alone, rtol=0, atol=1e-5)
