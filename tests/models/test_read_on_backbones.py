"""READ on the four backbones: targets, identity, padding and segments, generation with and without a cache."""

import pytest
import test_moment_detr as moment_detr
import test_umt as umt
import test_vision_guided as vision_guided
import torch
from peft import get_peft_model

from peft_read import READConfig


def adapted(model, **options):
    """The model with READ, and READ with weights that move the outputs."""
    model = get_peft_model(model, READConfig(r=4, **options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "readapter_" in name:
                parameter.normal_(std=0.5)
    return model


def adapters(model):
    return sorted(
        name.split(".readapter_down")[0] for name, _ in model.named_parameters() if "down.default.weight" in name
    )


def test_default_targets_are_the_last_linear_layers_of_the_feed_forward_blocks():
    bart = adapted(vision_guided.small_model(vision_guided.BART, use_img_trans=True))
    t5 = adapted(vision_guided.small_model(vision_guided.T5))
    detr = adapted(moment_detr.small_model())
    large = adapted(umt.small_model(cross_layers=1, decoder_layers=3))
    prefix = "base_model.model."
    stacks = [f"model.{stack}.layers.{i}" for stack in ("decoder", "encoder") for i in (0, 1)]
    assert adapters(bart) == [f"{prefix}{stack}.fc2" for stack in stacks]
    assert len(adapters(t5)) == 4
    assert adapters(detr) == [f"{prefix}{stack.replace('model', 'transformer', 1)}.linear2" for stack in stacks]
    assert adapters(large) == sorted(
        prefix + name + ".mapping.3"
        for name in ["video_enc.encoder.ffn", "audio_enc.encoder.ffn"]
        + ["cross_enc.encoder.encoder.0.ffn1", "cross_enc.encoder.encoder.0.ffn2"]
        + [f"query_dec.decoder.{j}.ffn" for j in range(3)]
    )


def test_untrained_adapters_change_nothing():
    for room, model in [(moment_detr, moment_detr.small_model()), (umt, umt.small_model())]:
        inputs = room.batch(model) if room is umt else room.batch()
        # frozen on both sides: PyTorch's kernels round differently where a gradient is wanted
        before = model.requires_grad_(False)(**inputs).saliency_scores
        with torch.no_grad():
            after = get_peft_model(model, READConfig(r=4)).eval()(**inputs).saliency_scores
        assert after.equal(before)


def test_padding_and_the_other_segment_stay_out_of_moment_detr():
    model, inputs = adapted(moment_detr.small_model()), moment_detr.batch()
    together = model(**inputs)
    for i, (clips, words) in enumerate([(9, 2), (6, 4), (1, 1)]):
        alone = model(
            video_features=inputs["video_features"][i : i + 1, :clips],
            text_features=inputs["text_features"][i : i + 1, :words],
        )
        torch.testing.assert_close(together.pred_spans[i], alone.pred_spans[0])
        torch.testing.assert_close(together.saliency_scores[i, :clips], alone.saliency_scores[0])


def test_padding_stays_out_of_umt():
    model = adapted(umt.small_model(mask_decoder=True, decoder_layers=3, cross_layers=2))
    inputs = umt.batch(model.get_base_model())
    together = model(**inputs).saliency_scores
    for i, (clips, words) in enumerate(umt.LENGTHS):
        alone = {
            name: value[i : i + 1, : words if name.startswith("text") else clips] for name, value in inputs.items()
        }
        torch.testing.assert_close(together[i, :clips], model(**alone).saliency_scores[0])


@pytest.mark.parametrize("name", vision_guided.BACKBONES)
@pytest.mark.parametrize(
    "mode",
    [{"num_beams": 4}, {"num_beams": 3, "num_return_sequences": 2}, {"num_beams": 1, "do_sample": False}],
    ids=["beams", "several beams", "greedy"],
)
def test_cached_generation_equals_uncached(name, mode):
    backbone = vision_guided.BACKBONES[name]
    visual = vision_guided.visual_transformer(backbone)
    model = adapted(vision_guided.small_model(backbone, use_forget_gate=True, **visual))
    inputs = vision_guided.batch()
    lengths = {"max_new_tokens": 8, "min_new_tokens": 8}
    cached, uncached = (model.generate(**inputs, **mode, **lengths, use_cache=cache) for cache in (True, False))
    assert cached.equal(uncached)
    adapted_logits = model(**inputs, labels=vision_guided.LABELS).logits
    with model.disable_adapter():
        assert not torch.allclose(model(**inputs, labels=vision_guided.LABELS).logits, adapted_logits)
