"""VG-BART and VG-T5: parity with the original, every option, generation, checkpoints, parameter counts."""

from typing import NamedTuple

import pytest
import torch
from golden_cases import golden_case, record_outputs
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_read.models import VGBartConfig, VGBartForConditionalGeneration, VGT5Config, VGT5ForConditionalGeneration


class Backbone(NamedTuple):
    config_class: type
    model_class: type
    plain_config_class: type
    plain_model_class: type
    sizes: dict
    prefix: str  # of the encoder's and the decoder's names
    block: str
    feed_forward: dict  # the module whose output READ adapts, below a block
    closing_norm: str


BART = Backbone(
    VGBartConfig,
    VGBartForConditionalGeneration,
    BartConfig,
    BartForConditionalGeneration,
    {
        "vocab_size": 40,
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "max_position_embeddings": 32,
    },
    "model.",
    "layers",
    {"encoder": "fc2", "decoder": "fc2"},
    "final_layer_norm",
)
T5 = Backbone(
    VGT5Config,
    VGT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    {
        "vocab_size": 40,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 2,
        "num_heads": 2,
        "decoder_start_token_id": 0,
    },
    "",
    "block",
    {"encoder": "layer.1.DenseReluDense", "decoder": "layer.2.DenseReluDense"},
    "custom_layer_norm",
)
BACKBONES = {"vg_bart": BART, "vg_t5": T5}
VISUAL = {
    "visual_feature_dim": 12,
    "dim_common": 16,
    "n_attn_heads": 2,
    "img_trans_layers": 2,
    "img_trans_heads": 2,
    "img_trans_ffn_dim": 20,
}


@pytest.fixture(params=BACKBONES)
def backbone(request):
    return BACKBONES[request.param]


def small_model(backbone, **options):
    model = backbone.model_class(backbone.config_class(**backbone.sizes, **{**VISUAL, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def visual_transformer(backbone):
    return {"use_img_trans": True} if backbone is BART else {"use_img_trans": True, "apply_img_trans": True}


def encoder_of(model, backbone):
    return model.get_submodule(f"{backbone.prefix}encoder")


def batch():
    words = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 3 + [0] * 4])
    frames = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 2 + [0] * 4])
    return {
        "input_ids": torch.randint(4, 40, (3, 7)) * words + (1 - words),
        "attention_mask": words,
        "video_features": torch.randn(3, 6, 12) * frames.unsqueeze(-1),
        "video_mask": frames,
    }


LABELS = torch.tensor([[5, 6, 7, 8, 2], [9, 4, 2, -100, -100], [5, 9, 9, 2, -100]])


@pytest.mark.parametrize("case", ["vg_bart/type0_fg1_img1", "vg_bart/type4_fg1_img0", "vg_t5/type0_fg1_img0"])
def test_everything_equals_the_original(reference_data, case):
    backbone = BACKBONES[case.split("/")[0]]
    golden, notes = golden_case(reference_data(f"golden/{case}.safetensors"))
    config = backbone.config_class.from_original_options(
        {name: notes[name] for name in ("config", "fusion", "visual")}
    )
    model = backbone.model_class.from_original_checkpoint(golden["state_dict"], config)
    inputs = golden["inputs"]
    frames = torch.arange(inputs["image_features"].shape[1]) < inputs["image_len"][:, None]
    source = {
        "input_ids": inputs["input_ids"],
        "attention_mask": inputs["attention_mask"],
        "video_features": inputs["image_features"],
        "video_mask": frames,
    }
    seen = record_outputs(model)
    with torch.no_grad():
        output = model(
            **source,
            decoder_input_ids=inputs["decoder_input_ids"],
            labels=inputs["labels"],
            output_hidden_states=True,
        )
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(output.logits, golden["outputs"]["logits"], **close)
    torch.testing.assert_close(output.loss, golden["losses"]["loss"], **close)
    fused = golden["outputs"]["encoder_last_hidden_state"]
    torch.testing.assert_close(output.encoder_last_hidden_state, fused, **close)
    for name, expected in golden["hidden"].items():
        stack, _, rest = name.partition(".")
        if stack.endswith("hidden_states"):
            actual = getattr(output, stack)[int(rest)]
        elif stack == "img_transformer":
            actual = seen[f"{backbone.prefix}encoder.img_transformer.encoder.layers.{rest}"]
        else:
            _, index, kind = rest.split(".")
            path = f"{backbone.prefix}{stack}.{backbone.block}.{index}"
            actual = seen[path if kind == "raw" else f"{path}.{backbone.feed_forward[stack]}"]
        torch.testing.assert_close(actual, expected, **close, msg=lambda text, name=name: f"{name}: {text}")
    # transformers 4.3.2 forces BART's last token to be EOS in beam search and not in greedy search
    greedy = model.generate(**source, num_beams=1, do_sample=False, max_length=10, forced_eos_token_id=None)
    assert greedy.equal(golden["outputs"]["generate.greedy"])
    beams = model.generate(**source, num_beams=3, max_length=10, early_stopping=True, no_repeat_ngram_size=3)
    assert beams.equal(golden["outputs"]["generate.beam3"])


def fuse_by_the_book(encoder, h, v, kind, gate):
    """The formulas of the six types, one token at a time."""
    linear = {i: getattr(encoder, f"_linear_{i}", None) for i in range(1, 5)}
    if kind in (4, 5):
        attention = encoder._multi_head_attn
        a = attention(linear[3](h)[None], linear[1](v)[None], linear[2](v)[None])[0][0]
    else:
        query = linear[1](h) if kind == 3 else h
        key = linear[2](v) if kind == 3 else linear[1](v)
        value = key if kind in (1, 2) else v
        a = torch.zeros(len(h), value.shape[1])
        for frame in range(len(v)):
            scores = torch.stack([query[word] @ key[frame] for word in range(len(h))])
            a += scores.softmax(0)[:, None] * value[frame]
    if gate:
        a = torch.sigmoid(encoder.fg(torch.cat([a, h], 1))) * a
    if kind in (2, 5):
        return a
    return {0: linear[2], 1: linear[2], 3: linear[3], 4: linear[4]}[kind](torch.cat([h, a], 1))


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("kind", range(6))
def test_each_type_follows_its_formula(backbone, kind, gate):
    # BART fuses after the layer it is told, T5 after its final norm
    model = small_model(
        backbone, cross_attn_type=kind, use_forget_gate=gate, fusion_layer=0 if backbone is BART else 1
    )
    encoder, inputs = encoder_of(model, backbone), batch()
    seen = record_outputs(model)
    states = model(**inputs, labels=LABELS, output_hidden_states=True).encoder_hidden_states
    before = seen["model.encoder.layers.0" if backbone is BART else "encoder.final_layer_norm"]
    fused = states[1 if backbone is BART else 2]
    update = torch.stack(
        [fuse_by_the_book(encoder, h, v, kind, gate) for h, v in zip(before, inputs["video_features"], strict=True)]
    )
    torch.testing.assert_close(fused, getattr(encoder, backbone.closing_norm)(before + update))
    assert len(states) == 3
    assert not torch.allclose(fused, before)
    block = seen[f"{backbone.prefix}encoder.{backbone.block}.{1 if backbone is BART else 0}"]
    torch.testing.assert_close(states[2 if backbone is BART else 1], block)


@pytest.mark.parametrize("kind", range(6))
@pytest.mark.parametrize("axis", ["text", "video"])
def test_masked_fusion_does_not_depend_on_padding(backbone, kind, axis):
    model = small_model(
        backbone,
        cross_attn_type=kind,
        use_forget_gate=True,
        **visual_transformer(backbone),
        softmax_dim=axis,
        mask_fusion=True,
    )
    inputs = batch()
    together = model(**inputs, labels=LABELS)
    alone = {name: value[1:2, :5] if value.shape[1] == 7 else value[1:2, :4] for name, value in inputs.items()}
    separate = model(**alone, labels=LABELS[1:2])
    torch.testing.assert_close(together.logits[1:2], separate.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together.encoder_last_hidden_state[1:2, :5], separate.encoder_last_hidden_state)
    inputs["video_mask"][0] = 0
    assert model(**inputs, labels=LABELS).logits.isfinite().all()


def test_the_original_fusion_depends_on_padding(backbone):
    model, inputs = small_model(backbone), batch()
    alone = {name: value[1:2, :5] if value.shape[1] == 7 else value[1:2, :4] for name, value in inputs.items()}
    assert not torch.allclose(model(**inputs, labels=LABELS).logits[1:2], model(**alone, labels=LABELS[1:2]).logits)


def test_no_fusion_layer_means_the_plain_model(backbone):
    model = small_model(backbone, fusion_layer=None)
    plain = backbone.plain_model_class(backbone.plain_config_class(**backbone.sizes)).eval()
    plain.load_state_dict({key: model.state_dict()[key] for key in plain.state_dict()})
    inputs = batch()
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(model(**text, labels=LABELS).logits, plain(**text, labels=LABELS).logits)


def test_a_plain_checkpoint_can_be_loaded(backbone, tmp_path):
    plain = backbone.plain_model_class(backbone.plain_config_class(**backbone.sizes))
    plain.save_pretrained(tmp_path)
    model = backbone.model_class.from_plain_checkpoint(tmp_path, **VISUAL, cross_attn_type=1)
    again = backbone.model_class.from_pretrained(tmp_path, config=backbone.config_class(**backbone.sizes, **VISUAL))
    for key, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)
        assert torch.equal(again.state_dict()[key], value)
    assert model.config.vocab_size == 40
    assert model.config.cross_attn_type == 1
    new = encoder_of(model, backbone)._linear_1
    if backbone is BART:  # normal(0, 0.02), zero bias
        assert 0.01 < new.weight.std() < 0.03
        assert not new.bias.any()
    else:  # PyTorch's own, uniform up to 1 / sqrt(12)
        assert 0.25 < new.weight.abs().max() < 0.29
        assert 0.2 < new.bias.abs().max() < 0.29
        attention = T5.model_class(T5.config_class(**T5.sizes, **VISUAL, cross_attn_type=4)).encoder._multi_head_attn
        assert not attention.out_proj.bias.any()
        assert attention.in_proj_weight.abs().max() < (6 / 64) ** 0.5
    with pytest.raises(ValueError, match="not beside it"):
        backbone.model_class.from_plain_checkpoint(tmp_path, config=model.config, cross_attn_type=2)


def test_save_and_load_through_the_auto_classes(backbone, tmp_path):
    model, inputs = small_model(backbone, cross_attn_type=4, use_forget_gate=True, use_img_trans=True), batch()
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, backbone.config_class)
    assert (config.cross_attn_type, config.fusion_layer) == (4, 1 if backbone is BART else 5)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert isinstance(loaded, backbone.model_class)
    torch.testing.assert_close(loaded(**inputs, labels=LABELS).logits, model(**inputs, labels=LABELS).logits)


def test_wrapped_original_checkpoints(backbone, tmp_path):
    model = small_model(backbone)
    weights = {f"model.{key}": value for key, value in model.state_dict().items()}
    weights[f"model.{backbone.prefix}encoder.img_transformer.pos_encoder.pe"] = torch.zeros(5000, 1, 12)
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": weights, "epoch": 3}, path)
    loaded = backbone.model_class.from_original_checkpoint(path, model.config)
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())
    weights.pop(f"model.{backbone.prefix}encoder._linear_1.weight")
    with pytest.raises(ValueError, match=rf"1 keys missing \['{backbone.prefix}encoder._linear_1.weight'\]"):
        backbone.model_class.from_original_checkpoint(weights, model.config)


@pytest.mark.parametrize(
    "mode",
    [
        {"num_beams": 1, "do_sample": False},
        {"num_beams": 3, "no_repeat_ngram_size": 3},
        {"num_beams": 2, "num_return_sequences": 2, "do_sample": True},
        {"do_sample": True, "num_return_sequences": 2},
    ],
    ids=["greedy", "beams", "beam-sampling", "sampling"],
)
def test_generation_sees_the_video_and_caching_changes_nothing(backbone, mode):
    model, inputs = small_model(backbone, use_forget_gate=True, **visual_transformer(backbone)), batch()
    lengths = {"max_new_tokens": 8, "min_new_tokens": 8}
    results = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        results.append(model.generate(**inputs, **mode, **lengths, use_cache=use_cache))
    assert results[0].equal(results[1])
    scores = []
    for video in (inputs["video_features"], inputs["video_features"].flip(-1)):
        torch.manual_seed(3)
        output = model.generate(
            **{**inputs, "video_features": video},
            **mode,
            **lengths,
            return_dict_in_generate=True,
            output_scores=True,
        )
        scores.append(output.scores[0].clamp(min=-100))
    assert not torch.allclose(*scores)


def test_checkpointed_gradients_are_the_same(backbone):
    model, inputs = small_model(backbone, use_forget_gate=True, **visual_transformer(backbone)), batch()
    gradients = []
    for reentrant in (None, False, True):
        model = without_dropout(model.train())
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        model(**inputs, labels=LABELS).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert f"{backbone.prefix}encoder.img_transformer.encoder.layers.0.linear1.weight" in gradients[0]
    for found in gradients[1:]:
        assert found.keys() == gradients[0].keys()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(found[name], gradient)


def without_dropout(model):
    for module in model.modules():
        for name in ("dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def test_accumulated_losses_equal_one_large_batch(backbone):
    model, inputs = small_model(backbone, mask_fusion=True), batch()
    items = (LABELS != -100).sum()
    whole = model(**inputs, labels=LABELS).loss
    parts = [
        model(
            **{name: value[rows] for name, value in inputs.items()}, labels=LABELS[rows], num_items_in_batch=items
        ).loss
        for rows in (slice(0, 1), slice(1, 3))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_tuples_masks_of_other_types_and_outputs(backbone):
    model, inputs = small_model(backbone), batch()
    output = model(**inputs, labels=LABELS)
    as_tuple = model(**inputs, labels=LABELS, return_dict=False)
    torch.testing.assert_close(as_tuple[0], output.loss)
    torch.testing.assert_close(as_tuple[1], output.logits)
    for dtype in (torch.bool, torch.float32):
        other = {**inputs, "video_mask": inputs["video_mask"].to(dtype)}
        torch.testing.assert_close(model(**other, labels=LABELS).logits, output.logits)
    eager = backbone.model_class(model.config)
    eager.load_state_dict(model.state_dict())
    for part in eager.modules():  # before 5.23 a model passes over parts with a configuration of its own class
        if isinstance(part, PreTrainedModel):
            part.set_attn_implementation("eager")
    with_attentions = eager.eval()(**inputs, labels=LABELS, output_attentions=True)
    assert len(with_attentions.encoder_attentions) == 2
    torch.testing.assert_close(with_attentions.logits, output.logits)


def test_bfloat16_runs(backbone):
    model, inputs = (
        small_model(backbone, use_forget_gate=True, use_img_trans=True, mask_fusion=True).bfloat16(),
        batch(),
    )
    output = model(**inputs, labels=LABELS)
    assert output.logits.dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32
    assert output.loss.isfinite()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cross_attn_type": 6}, "integer from 0 to 5, not 6"),
        ({"cross_attn_type": None}, "integer from 0 to 5, not None"),
        ({"cross_attn_type": 5, "dim_common": 8}, "must equal the width of the text encoder"),
        ({"cross_attn_type": 4, "n_attn_heads": 3}, "multiple of n_attn_heads"),
        ({"use_img_trans": True, "img_trans_heads": 5}, "multiple of img_trans_heads"),
        ({"softmax_dim": "frames"}, "must be 'text' or 'video', not 'frames'"),
    ],
)
def test_invalid_configurations_are_refused(backbone, options, message):
    with pytest.raises(ValueError, match=message):
        backbone.config_class(**backbone.sizes, **{**VISUAL, **options})


def test_invalid_inputs_are_refused(backbone):
    model, inputs = small_model(backbone), batch()
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="pass video_features, or use a configuration with fusion_layer=None"):
        model(**text, labels=LABELS)
    with pytest.raises(ValueError, match=r"\(3, F, 12\), not \(3, 6, 11\)"):
        model(**text, video_features=torch.randn(3, 6, 11), labels=LABELS)
    with pytest.raises(ValueError, match=r"\(3, 6\), not \(3, 5\)"):
        model(**text, video_features=inputs["video_features"], video_mask=torch.ones(3, 5), labels=LABELS)
    with pytest.raises(ValueError, match="video_mask holds negative numbers or NaN"):
        model(**{**inputs, "video_mask": inputs["video_mask"].float().log()}, labels=LABELS)
    with pytest.raises(ValueError, match=r"exactly one of input_ids (and|or) inputs_embeds"):
        encoder_of(model, backbone)(video_features=inputs["video_features"])
    with pytest.raises(ValueError, match=r"unknown groups of original options \['vision'\]"):
        backbone.config_class.from_original_options({"config": {}, "vision": {}})


def test_layers_that_do_not_exist_cannot_fuse():
    for layer in (2, -3):
        with pytest.raises(ValueError, match=f"fusion_layer={layer} is not one of the 2 encoder layers"):
            VGBartConfig(**BART.sizes, **VISUAL, fusion_layer=layer)


def test_t5_reads_the_fusion_layer_as_a_switch_and_ignores_its_visual_transformer():
    model, inputs = small_model(T5, use_img_trans=True, fusion_layer=7), batch()
    output = model(**inputs, labels=LABELS)
    with torch.no_grad():
        model.encoder.img_transformer.encoder.layers[0].linear1.weight.normal_()
    torch.testing.assert_close(model(**inputs, labels=LABELS).logits, output.logits)
    model.config.apply_img_trans = model.encoder.config.apply_img_trans = True
    assert not torch.allclose(model(**inputs, labels=LABELS).logits, output.logits)
    model.encoder.config.fusion_layer = 0
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(model(**inputs, labels=LABELS).logits, model(**text, labels=LABELS).logits)
    with pytest.raises(ValueError, match="needs use_img_trans=True"):
        VGT5Config(apply_img_trans=True)


@pytest.mark.parametrize("layer", [0, -1])
def test_t5_may_fuse_after_a_block(layer):
    model, inputs = small_model(T5, fusion_place="layer", fusion_layer=layer, use_forget_gate=True), batch()
    encoder, seen = model.encoder, record_outputs(model)
    assert model.config.fusion_layer == layer % 2
    output = model(**inputs, labels=LABELS, output_hidden_states=True)
    before = seen[f"encoder.block.{layer % 2}"]
    video = inputs["video_features"]
    update = torch.stack([fuse_by_the_book(encoder, h, v, 0, True) for h, v in zip(before, video, strict=True)])
    fused = encoder.custom_layer_norm(before + update)
    states = output.encoder_hidden_states
    assert len(states) == 3
    if layer == 0:
        torch.testing.assert_close(states[1], fused)
        fused = seen["encoder.block.1"]
    torch.testing.assert_close(states[2], encoder.final_layer_norm(fused))
    torch.testing.assert_close(output.encoder_last_hidden_state, states[2])
    # apart from the fusion it is T5
    with torch.no_grad():
        encoder.custom_layer_norm.weight.zero_()
        encoder.custom_layer_norm.bias.zero_()
    if layer == -1:
        assert not model(**inputs, labels=LABELS).encoder_last_hidden_state.any()
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    whole = T5ForConditionalGeneration(T5Config(**T5.sizes)).eval()
    whole.load_state_dict({key: model.state_dict()[key] for key in whole.state_dict()})
    encoder.fuse = lambda states, *args, **kwargs: torch.zeros_like(states)
    encoder.custom_layer_norm = nn.Identity()
    torch.testing.assert_close(model(**inputs, labels=LABELS).logits, whole(**text, labels=LABELS).logits)
    for options, message in [
        ({"fusion_place": "start"}, "'final' or 'layer'"),
        ({"fusion_layer": 2}, "not one of the 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            VGT5Config(**T5.sizes, **{"fusion_place": "layer", **options})
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        encoder(video_features=video)


def test_gated_t5_checkpoints_keep_their_unscaled_head(tmp_path):
    # flan-T5 and T5 v1.1: gated feed-forward blocks, no scaling before the head
    config = T5Config(**T5.sizes, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    plain = T5ForConditionalGeneration(config).eval()
    plain.save_pretrained(tmp_path)
    model = VGT5ForConditionalGeneration.from_plain_checkpoint(tmp_path, **VISUAL, fusion_layer=0).eval()
    text = {name: batch()[name] for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(model(**text, labels=LABELS).logits, plain(**text, labels=LABELS).logits)


# The paper's tables 4 and 5, as computed from the published code (type 0, forget gate, visual transformer).
PAPER = {
    "vg_bart": {
        "full": 249_673_472,
        "bias": 195_840,
        "partial": 7_087_872 + 9_451_776,
        "projection": 38_603_520,
        "rank 4 on every linear": 1_191_268,
        "rank 4 without the gate": 1_171_812,
        "type 0": 143_159_040,
        "type 4": 141_718_272,
        "type 4, transformer, gate": 242_725_888,
    },
    "vg_t5": {
        "full": 333_156_608,
        "bias": 69_888,
        "partial": 7_079_424 + 9_439_488,
        "projection": 24_674_304,
        "rank 4 on every linear": 1_929_728,
        "rank 4 without the gate": 1_910_272,
        "type 0": 226_642_176,
        "type 4": 225_201_408,
        "type 4, transformer, gate": 326_209_024,
    },
}


@pytest.mark.parametrize("name", PAPER)
def test_parameter_counts_of_the_paper(name):
    backbone = BACKBONES[name]

    def on_meta(**options):
        with torch.device("meta"):
            return backbone.model_class(backbone.config_class(**options))

    def size(model):
        return sum(parameter.numel() for parameter in model.parameters())

    whole = {"use_forget_gate": True, "use_img_trans": True}
    model = on_meta(**whole)
    linears = {path: module for path, module in model.named_modules() if type(module) is nn.Linear}
    rank_4 = {path: 4 * (linear.in_features + linear.out_features) for path, linear in linears.items()}
    stacks = [model.get_submodule(f"{backbone.prefix}{stack}.{backbone.block}") for stack in ("encoder", "decoder")]
    assert PAPER[name] == {
        "full": size(model),
        "bias": sum(p.numel() for path, p in model.named_parameters() if path.endswith("bias")),
        "partial": sum(size(blocks[-1]) for blocks in stacks),
        "projection": model.lm_head.weight.numel(),
        "rank 4 on every linear": sum(rank_4.values()),
        "rank 4 without the gate": sum(count for path, count in rank_4.items() if not path.endswith(".fg")),
        "type 0": size(on_meta()),
        "type 4": size(on_meta(cross_attn_type=4)),
        "type 4, transformer, gate": size(on_meta(cross_attn_type=4, **whole)),
    }
