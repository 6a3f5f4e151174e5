"""VL-BART and VL-T5: parity with the original, known answers, prompts, generation, checkpoints, READ and PVLA."""

from typing import NamedTuple

import pytest
import torch
from golden_cases import golden_case, record_outputs
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput

from peft_read import Aligner, PVLAConfig, READConfig, set_task
from peft_read.alignment import preset_streams
from peft_read.models import VLBartConfig, VLBartForConditionalGeneration, VLT5Config, VLT5ForConditionalGeneration
from peft_read.models.visual_tokens import pool_visual


class Backbone(NamedTuple):
    config_class: type
    model_class: type
    plain_config_class: type
    plain_model_class: type
    sizes: dict
    prefix: str  # of the encoder's and the decoder's names
    block: str
    pad: int


BART = Backbone(
    VLBartConfig,
    VLBartForConditionalGeneration,
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
    1,
)
T5 = Backbone(
    VLT5Config,
    VLT5ForConditionalGeneration,
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
    0,
)
BACKBONES = {"vl_bart": BART, "vl_t5": T5}
PROMPTS = {"prompt_length": 3, "prompt_width": 5}
LABELS = torch.tensor([[5, 6, 7, 8, 2], [9, 4, 2, -100, -100], [5, 9, 9, 2, -100]])


@pytest.fixture(params=BACKBONES)
def backbone(request):
    return BACKBONES[request.param]


def small_model(backbone, **options):
    model = backbone.model_class(backbone.config_class(**{**backbone.sizes, "visual_feature_dim": 12, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def encoder_of(model, backbone):
    return model.get_submodule(f"{backbone.prefix}encoder")


def batch(backbone, *, images=False):
    words = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 3 + [0] * 4])
    regions = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 2 + [0] * 4])
    low = 0.5 * torch.rand(3, 6, 2)
    inputs = {
        "input_ids": torch.randint(4, 40, (3, 7)) * words + (1 - words) * backbone.pad,
        "attention_mask": words,
        "visual_features": torch.randn(3, 6, 12),
        "visual_boxes": torch.cat((low, low + 0.5 * torch.rand(3, 6, 2)), dim=-1),
        "visual_mask": regions,
    }
    if images:
        inputs["image_ids"] = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]])
    return inputs


def example(inputs, row, words, regions):
    """One example of a batch without its padding."""
    return {
        name: value[row : row + 1, : words if name in ("input_ids", "attention_mask") else regions]
        for name, value in inputs.items()
    }


def without_dropout(model):
    for module in model.modules():
        for name in ("dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def original_inputs(golden, task):
    given = {name.partition(".")[2]: value for name, value in golden["inputs"].items() if name.startswith(f"{task}.")}
    images = given.get("vis_inputs.img_order_ids")
    source = {
        "input_ids": given["input_ids"],
        "visual_features": given["vis_feats"] if images is None else given["vis_inputs.feats"],
        "visual_boxes": given["boxes"] if images is None else given["vis_inputs.boxes"],
        "image_ids": images,
    }
    return source, given["target_ids"], given.get("scores")


def original_loss(output, labels, scores, rule):
    if rule.startswith("mean over all"):
        return output.loss
    tokens = nn.functional.cross_entropy(output.logits.transpose(1, 2), labels, reduction="none")
    rows = tokens.sum(1) / (labels != -100).sum(1)
    return (rows if scores is None else rows * scores).mean()


@pytest.mark.parametrize("case", BACKBONES)
def test_everything_equals_the_original(reference_data, case):
    backbone = BACKBONES[case]
    golden, notes = golden_case(reference_data(f"golden/vl_adapter/{case}/backbone.safetensors"))
    config = backbone.config_class.from_original_options(notes)
    model = backbone.model_class.from_original_checkpoint(golden["state_dict"], config)
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) == notes["total_count"]
    assert [name for name, _ in model.named_parameters()] == notes["trainable"]
    close = {"rtol": 1e-4, "atol": 1e-4}
    seen, parameters = record_outputs(model), dict(model.named_parameters())
    for task, rule in notes["loss_rule"].items():
        source, labels, scores = original_inputs(golden, task)
        model.zero_grad()
        output = model(**source, labels=labels, output_hidden_states=True)
        states = {
            "encoder.input": output.encoder_hidden_states[0],
            "decoder.input": output.decoder_hidden_states[0],
            "encoder.last": output.encoder_last_hidden_state,
            "decoder.last": output.decoder_hidden_states[-1],
        }
        torch.testing.assert_close(output.logits, golden["outputs"][f"{task}.logits"], **close)
        for name, expected in golden["hidden"].items():
            if name.startswith(f"{task}."):
                place = name.partition(".")[2]
                actual = states.get(place, seen.get(f"{backbone.prefix}{place}"))
                torch.testing.assert_close(actual, expected, **close, msg=lambda text, name=name: f"{name}: {text}")
        loss = original_loss(output, labels, scores, rule)
        torch.testing.assert_close(loss, golden["losses"][f"{task}.loss"], **close)
        loss.backward()
        for name, expected in golden["grads"].items():
            if name.startswith(f"{task}."):
                actual = parameters[name.partition(".")[2]].grad
                assert (actual - expected).abs().max() < 5e-4 * (1 + expected.abs().max()), name
        # transformers 4.2.1 forces BART's last token to be EOS in beam search and not in greedy search
        greedy = model.generate(**source, num_beams=1, do_sample=False, max_length=10, forced_eos_token_id=None)
        assert greedy.equal(golden["outputs"][f"{task}.generate.greedy"])
        beams = model.generate(**source, num_beams=5, max_length=10)
        assert beams.equal(golden["outputs"][f"{task}.generate.beam5"])
    source, labels, _ = original_inputs(golden, "vqa")
    output = model(**source, visual_mask=golden["inputs"]["masked.vis_attention_mask"], labels=labels)
    torch.testing.assert_close(output.logits, golden["outputs"]["masked.logits"], **close)
    torch.testing.assert_close(output.loss, golden["losses"]["masked.loss"], **close)
    torch.testing.assert_close(output.encoder_last_hidden_state, golden["hidden"]["masked.encoder.last"], **close)


@pytest.mark.parametrize("norm", ["separate", "joint", None])
@pytest.mark.parametrize("order", [True, False])
def test_each_token_follows_the_formula(backbone, norm, order):
    model = small_model(backbone, visual_norm=norm, use_order_embeddings=order)
    encoder, inputs = encoder_of(model, backbone), batch(backbone, images=True)
    seen = record_outputs(encoder)
    model(**inputs, labels=LABELS)
    embedding, table = encoder.visual_embedding, model.get_input_embeddings().weight
    counted = [[0, 1, 2, 0, 1, 2], [0, 0, 1, 2, 1, 2], [0, 0, 1, 2, 3, 4]]
    for row in range(3):
        for place in range(int(inputs["visual_mask"][row].sum())):
            x1, y1, x2, y2 = inputs["visual_boxes"][row, place]
            box = torch.stack([x1, y1, x2, y2, (y2 - x2) * (y1 - x1)])  # the area of the original
            features = embedding.feat_embedding[0](inputs["visual_features"][row, place])
            box = embedding.absolute_vis_pos_embedding[0](box)
            if norm == "separate":
                features = embedding.feat_embedding[1](features)
                box = embedding.absolute_vis_pos_embedding[1](box)
            token = features + box
            if order:
                token = token + embedding.img_order_embedding.weight[inputs["image_ids"][row, place]]
                token = token + table[39 - counted[row][place]]
            if norm == "joint":
                token = embedding.layer_norm(token)
            torch.testing.assert_close(seen["visual_embedding"][row, place], token)


@pytest.mark.parametrize("shared", [False, True])
def test_prompts_text_and_visual_tokens_come_in_this_order(backbone, shared):
    if shared and backbone is T5:
        with pytest.raises(ValueError, match="no norm of the text embeddings"):
            small_model(backbone, share_embedding_norm=True)
        return
    model = small_model(backbone, share_embedding_norm=shared, **PROMPTS)
    encoder, inputs = encoder_of(model, backbone), batch(backbone)
    seen = record_outputs(encoder)
    states = model(**inputs, labels=LABELS, output_hidden_states=True).encoder_hidden_states[0]
    prompt = encoder.task_prompts
    prompts = prompt.outer(torch.tanh(prompt.inner(prompt.embedding.weight))).expand(3, -1, -1)
    text, visual = model.get_input_embeddings()(inputs["input_ids"]), seen["visual_embedding"]
    if backbone is BART:
        norm = encoder.layernorm_embedding
        text = norm(text + encoder.embed_positions.weight[2 : 2 + 7])  # BART's table begins with two unused rows
        prompts = norm(prompts)
        visual = norm(visual) if shared else visual
    torch.testing.assert_close(states, torch.cat((prompts, text, visual), dim=1))


def test_t5_has_no_position_bias_around_visual_tokens():
    model = small_model(T5, **PROMPTS)
    bias = model.encoder._position_bias(10, 6, torch.zeros(1, 16, 16))
    attention = model.encoder.block[0].layer[0].SelfAttention
    torch.testing.assert_close(bias[..., :10, :10], attention.compute_bias(10, 10))
    assert bias.shape == (1, 2, 16, 16)
    assert not bias[..., 10:, :].any()
    assert not bias[..., 10:].any()


@pytest.mark.parametrize("options", [{}, PROMPTS])
@pytest.mark.parametrize("images", [False, True])
def test_padding_changes_nothing(backbone, options, images):
    model, inputs = small_model(backbone, **options), batch(backbone, images=images)
    together = model(**inputs, labels=LABELS).logits
    for row, (words, regions) in enumerate([(7, 6), (5, 4), (3, 2)]):
        alone = model(**example(inputs, row, words, regions), labels=LABELS[row : row + 1]).logits
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-5)
    del inputs["attention_mask"]  # it is told by the padding token
    torch.testing.assert_close(model(**inputs, labels=LABELS).logits, together)


def test_a_grid_is_pooled_to_a_smaller_one(backbone):
    features = torch.arange(18.0).reshape(1, 9, 2)
    pooled, boxes, images, mask = pool_visual(features, torch.zeros(1, 9, 4), tokens=4)
    assert pooled[0, :, 0].tolist() == [8.0, 10.0, 14.0, 16.0]  # the windows of a 3 x 3 grid overlap
    assert boxes.shape == (1, 4, 4)
    assert images is None
    assert mask is None
    sequence, *_ = pool_visual(features, torch.zeros(1, 9, 4), tokens=3, grid=False)
    assert sequence[0, :, 1].tolist() == [5.0, 11.0, 17.0]
    two = torch.tensor([[0] * 9 + [1] * 9])
    mask = torch.tensor([[1] * 9 + [0] * 9])
    both, _, images, mask = pool_visual(
        torch.cat((features, -features), 1), torch.zeros(1, 18, 4), two, mask, tokens=4
    )
    assert both[0, 4:, 0].tolist() == [0.0, -2.0, -6.0, -8.0]
    assert images.tolist() == [[0] * 4 + [1] * 4]
    assert mask.tolist() == [[1] * 4 + [0] * 4]

    model = small_model(backbone, visual_pooling="grid", pooled_tokens=4)
    inputs = {**batch(backbone), "visual_features": torch.randn(3, 9, 12), "visual_boxes": None, "visual_mask": None}
    output = model(**inputs, labels=LABELS)
    assert output.encoder_last_hidden_state.shape[1] == 7 + 4
    inputs["visual_features"] = pool_visual(inputs["visual_features"], torch.zeros(3, 9, 4), tokens=4)[0]
    plain = backbone.model_class(backbone.config_class(**backbone.sizes, visual_feature_dim=12)).eval()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(**inputs, labels=LABELS).logits, output.logits)
    for features, image_ids, message in [
        (torch.zeros(1, 8, 2), None, "the 8 visual tokens of an image are not a square"),
        (torch.zeros(1, 3, 2), None, "no more than 3"),
        (torch.zeros(1, 9, 2), torch.tensor([[0] * 4 + [1] * 5]), "equally many tokens for each image"),
    ]:
        with pytest.raises(ValueError, match=message):
            pool_visual(features, torch.zeros(*features.shape[:2], 4), image_ids, tokens=4)


def test_a_plain_checkpoint_can_be_loaded(backbone, tmp_path):
    plain = backbone.plain_model_class(backbone.plain_config_class(**backbone.sizes))
    plain.save_pretrained(tmp_path)
    model = backbone.model_class.from_plain_checkpoint(tmp_path, visual_feature_dim=600, **PROMPTS)
    again = backbone.model_class.from_pretrained(
        tmp_path, config=backbone.config_class(**backbone.sizes, visual_feature_dim=12)
    )
    for key, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)
        assert torch.equal(again.state_dict()[key], value)
    embedding = encoder_of(model, backbone).visual_embedding
    new, order = embedding.feat_embedding[0], embedding.img_order_embedding.weight
    prompt = encoder_of(model, backbone).task_prompts
    if backbone is BART:  # normal(0, 0.02), zero bias
        assert 0.019 < new.weight.std() < 0.021
        assert not new.bias.any()
        assert order.std() < 0.03
        assert prompt.embedding.weight.std() < 0.03
    else:  # PyTorch's own
        assert 0.9 / 600**0.5 < new.weight.abs().max() < 1 / 600**0.5
        assert new.bias.any()
        assert order.std() > 0.5
        assert prompt.embedding.weight.std() > 0.5
    assert embedding.feat_embedding[1].weight.eq(1).all()
    # in a larger table the order of objects is embedded by the new last rows
    model.resize_token_embeddings(45)
    seen, inputs = record_outputs(model), {**batch(backbone), "visual_features": torch.randn(3, 6, 600)}
    model(**inputs, labels=LABELS)
    before = seen[f"{backbone.prefix}encoder.visual_embedding"]
    with torch.no_grad():
        model.get_input_embeddings().weight[43] += 1
    model(**inputs, labels=LABELS)
    moved = seen[f"{backbone.prefix}encoder.visual_embedding"] - before
    torch.testing.assert_close(moved[:, 1], torch.ones(3, 16))
    assert not moved[:, [0, 2, 3, 4, 5]].any()


def test_save_and_load_through_the_auto_classes(backbone, tmp_path):
    model, inputs = small_model(backbone, **PROMPTS, prompt_tasks=["vqa", "gqa"], visual_norm="joint"), batch(backbone)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, backbone.config_class)
    assert (config.visual_norm, config.prompt_tasks, config.max_objects) == ("joint", ["vqa", "gqa"], 40)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert isinstance(loaded, backbone.model_class)
    more = backbone.model_class.from_pretrained(tmp_path, prompt_length=4, prompt_tasks=None)
    assert encoder_of(more, backbone).task_prompts.embedding.weight.shape == (4, 16)
    set_task(loaded, "gqa")
    set_task(model, "gqa")
    torch.testing.assert_close(loaded(**inputs, labels=LABELS).logits, model(**inputs, labels=LABELS).logits)


def test_original_checkpoints_with_what_was_added_to_them(backbone):
    model = small_model(backbone)
    layer = f"{backbone.prefix}encoder.{backbone.block}.0"
    weights = {
        **model.state_dict(),
        f"{backbone.prefix}encoder.visual_embedding.obj_order_embedding.weight": torch.zeros(40, 16),
        f"{layer}.attn_adapter.adapters.vqa.down_sampler.weight": torch.zeros(2, 16),
        f"{backbone.prefix}encoder.prompt_modules.prompts.vqa.prefix_embedding.0.weight": torch.zeros(5, 16),
        f"{layer}.self_attn.q_proj.lora_As.vqa": torch.zeros(2, 16),
        f"{backbone.prefix}shared_task_embed.task_to_embeddings.vqa": torch.zeros(8),
    }
    loaded = backbone.model_class.from_original_checkpoint(weights, model.config)
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())
    key = f"{backbone.prefix}encoder.visual_embedding.feat_embedding.0.bias"
    del weights[key]
    with pytest.raises(ValueError, match=rf"1 keys missing \['{key}'\]"):
        backbone.model_class.from_original_checkpoint(weights, model.config)


@pytest.mark.parametrize(
    "mode",
    [
        {"num_beams": 1, "do_sample": False},
        {"num_beams": 3, "no_repeat_ngram_size": 3},
        {"do_sample": True, "num_return_sequences": 2},
    ],
    ids=["greedy", "beams", "sampling"],
)
def test_generation_sees_the_image_and_caching_changes_nothing(backbone, mode):
    model, inputs = small_model(backbone, **PROMPTS), batch(backbone, images=True)
    lengths = {"max_new_tokens": 6, "min_new_tokens": 6}
    results = []
    for cache in ({"use_cache": True}, {"use_cache": False}, {"cache_implementation": "static"}):
        torch.manual_seed(3)
        results.append(model.generate(**inputs, **mode, **lengths, **cache, disable_compile=True))
    assert results[0].equal(results[1])
    assert results[0].equal(results[2])
    scores = []
    for features in (inputs["visual_features"], inputs["visual_features"].flip(-1)):
        torch.manual_seed(3)
        output = model.generate(
            **{**inputs, "visual_features": features},
            **mode,
            **lengths,
            return_dict_in_generate=True,
            output_scores=True,
        )
        scores.append(output.scores[0].clamp(min=-100))
    assert not torch.allclose(*scores)


def test_generation_keeps_padding_out(backbone):
    model, inputs = small_model(backbone), batch(backbone)
    lengths = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": 3}
    together = model.generate(**inputs, **lengths)
    for row, (words, regions) in enumerate([(7, 6), (5, 4), (3, 2)]):
        assert model.generate(**example(inputs, row, words, regions), **lengths).equal(together[row : row + 1])


def test_checkpointed_gradients_are_the_same(backbone):
    model, inputs = small_model(backbone, **PROMPTS), batch(backbone)
    gradients = []
    for checkpointing in (False, True):
        model = without_dropout(model.train())
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**inputs, labels=LABELS).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_accumulated_losses_equal_one_large_batch(backbone):
    model, inputs = small_model(backbone), batch(backbone)
    items = (LABELS != -100).sum()
    whole = model(**inputs, labels=LABELS).loss
    parts = [
        model(
            **{name: value[rows] for name, value in inputs.items()}, labels=LABELS[rows], num_items_in_batch=items
        ).loss
        for rows in (slice(0, 1), slice(1, 3))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_states_of_the_encoder_may_be_given(backbone):
    model, inputs = small_model(backbone, **PROMPTS), batch(backbone)
    expected = model(**inputs, labels=LABELS).logits
    states = encoder_of(model, backbone)(**inputs)
    torch.testing.assert_close(model(encoder_outputs=states, labels=LABELS).logits, expected)
    masks = {name: inputs[name] for name in ("attention_mask", "visual_mask")}
    for elsewhere in (BaseModelOutput(states.last_hidden_state), (states.last_hidden_state,)):
        torch.testing.assert_close(model(encoder_outputs=elsewhere, **masks, labels=LABELS).logits, expected)
    joint = model(encoder_outputs=(states.last_hidden_state,), attention_mask=states.attention_mask, labels=LABELS)
    torch.testing.assert_close(joint.logits, expected)
    with pytest.raises(ValueError, match="covers neither the 16 states"):
        model(encoder_outputs=(states.last_hidden_state,), attention_mask=torch.ones(3, 14), labels=LABELS)


def test_the_model_without_a_head_is_the_same_below_it():
    model, inputs = small_model(BART, **PROMPTS), batch(BART)
    bare = AutoModel.from_config(model.config)
    bare.load_state_dict(model.model.state_dict())
    states = bare.eval()(**inputs, decoder_input_ids=model.prepare_decoder_input_ids_from_labels(LABELS))
    torch.testing.assert_close(model.lm_head(states.last_hidden_state), model(**inputs, labels=LABELS).logits)


def test_tuples_embeddings_masks_of_other_types_and_attentions(backbone):
    model, inputs = small_model(backbone), batch(backbone)
    output = model(**inputs, labels=LABELS)
    as_tuple = model(**inputs, labels=LABELS, return_dict=False)
    torch.testing.assert_close(as_tuple[0], output.loss)
    torch.testing.assert_close(as_tuple[1], output.logits)
    for dtype in (torch.bool, torch.float32):
        other = {**inputs, "visual_mask": inputs["visual_mask"].to(dtype)}
        torch.testing.assert_close(model(**other, labels=LABELS).logits, output.logits)
    embedded = {name: value for name, value in inputs.items() if name != "input_ids"}
    embedded["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"])
    torch.testing.assert_close(model(**embedded, labels=LABELS).logits, output.logits)
    eager = backbone.model_class(model.config)
    eager.load_state_dict(model.state_dict())
    for part in eager.modules():  # before 5.23 a model passes over parts with a configuration of its own class
        if isinstance(part, PreTrainedModel):
            part.set_attn_implementation("eager")
    with_attentions = eager.eval()(**inputs, labels=LABELS, output_attentions=True)
    assert [tuple(a.shape) for a in with_attentions.encoder_attentions] == [(3, 2, 13, 13)] * 2
    torch.testing.assert_close(with_attentions.logits, output.logits)


def test_bfloat16_runs(backbone):
    model, inputs = small_model(backbone, **PROMPTS).bfloat16(), batch(backbone)
    output = model(**inputs, labels=LABELS)
    assert output.logits.dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32
    assert output.loss.isfinite()


def test_a_task_has_prompts_of_its_own(backbone):
    model, inputs = small_model(backbone, **PROMPTS, prompt_tasks=["vqa", "gqa"]), batch(backbone)
    with pytest.raises(ValueError, match=r"set_task\(model, one of \('vqa', 'gqa'\)\)"):
        model(**inputs, labels=LABELS)
    logits = {}
    for task in ("vqa", "gqa"):
        set_task(model, task)
        output = model(**inputs, labels=LABELS)
        logits[task] = output.logits
        model.zero_grad()
        output.loss.backward()
        own = encoder_of(model, backbone).task_prompts.prompts
        assert all(p.grad is not None for p in own[task].parameters())
        assert all(p.grad is None for other in {"vqa", "gqa"} - {task} for p in own[other].parameters())
    assert not torch.allclose(logits["vqa"], logits["gqa"])
    with pytest.raises(ValueError, match="task 'nlvr' is unknown"):
        set_task(model, "nlvr")
    # prompts for all tasks alike have nothing to switch
    set_task(small_model(backbone, **PROMPTS), "anything")


def test_prompts_and_the_visual_embedding_travel_with_an_adapter(backbone, tmp_path):
    base, inputs = small_model(backbone, **PROMPTS, prompt_tasks=["vqa", "gqa"]), batch(backbone)
    base.save_pretrained(tmp_path / "base")
    added = ["visual_embedding", "task_prompts"]
    for targets in (["q_proj", "v_proj"] if backbone is BART else ["q", "v"], "dummy-target-modules"):
        model = get_peft_model(base, LoraConfig(target_modules=targets, modules_to_save=added)).eval()
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
        trained = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
        assert sum(any(part in name for part in added) for name in trained) == (19 if backbone is BART else 17)
        assert not any("embed_tokens" in name or "shared" in name for name in trained)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        set_task(model, "gqa")
        expected = model(**inputs, labels=LABELS).logits
        model.save_pretrained(tmp_path / "adapter")
        again = backbone.model_class.from_pretrained(tmp_path / "base")
        loaded = PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
        set_task(loaded, "gqa")
        torch.testing.assert_close(loaded(**inputs, labels=LABELS).logits, expected)
        set_task(loaded, "vqa")
        assert not torch.allclose(loaded(**inputs, labels=LABELS).logits, expected)
        base = backbone.model_class.from_pretrained(tmp_path / "base")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"visual_norm": "both"}, "visual_norm='both' is not one of"),
        ({"visual_pooling": "mean"}, "visual_pooling='mean' is not one of"),
        ({"visual_pooling": "grid", "pooled_tokens": 5}, "pooled_tokens=5 is not a square"),
        ({"max_objects": 41}, "max_objects=41: .* which has 40"),
        ({"visual_feature_dim": 0}, "visual_feature_dim=0 must be at least 1"),
        ({"num_images": 1.5}, "num_images=1.5 is not an integer"),
        ({"prompt_tasks": ["vqa"]}, "need a prompt_length above 0"),
        ({**PROMPTS, "prompt_tasks": ["vqa", "vqa"]}, "different names"),
        ({**PROMPTS, "prompt_tasks": "vqa"}, "not a list of names"),
    ],
)
def test_invalid_configurations_are_refused(backbone, options, message):
    with pytest.raises(ValueError, match=message):
        backbone.config_class(**{**backbone.sizes, "visual_feature_dim": 12, **options})


@pytest.mark.parametrize("name", ["vis_use_transformer", "expand_vis_embedding", "sparse_sample"])
def test_options_of_the_original_that_are_not_part_of_these_models(backbone, name):
    with pytest.raises(ValueError, match=f"{name}=True of the original"):
        backbone.config_class.from_original_options({**backbone.sizes, "feat_dim": 12, name: True})


def test_invalid_inputs_are_refused(backbone):
    model, inputs = small_model(backbone, max_objects=6), batch(backbone)
    pixels, order = 100 * inputs["visual_boxes"], torch.zeros(3, 6, dtype=torch.long)
    for change, message in [
        ({"visual_features": None}, "pass visual_features"),
        ({"visual_features": torch.randn(3, 6, 11)}, r"\(3, V, 12\), not \(3, 6, 11\)"),
        ({"visual_features": torch.randn(2, 6, 12)}, r"\(3, V, 12\), not \(2, 6, 12\)"),
        ({"visual_boxes": torch.zeros(3, 6, 5)}, r"visual_boxes must have the shape \(3, 6, 4\), not \(3, 6, 5\)"),
        ({"visual_boxes": pixels}, "visual_boxes hold .*, outside the image"),
        ({"visual_boxes": torch.full((3, 6, 4), torch.nan)}, "outside the image"),
        ({"visual_mask": torch.ones(3, 5)}, r"visual_mask must have the shape \(3, 6\), not \(3, 5\)"),
        ({"visual_mask": inputs["visual_mask"].float().log()}, "visual_mask holds negative numbers or NaN"),
        ({"attention_mask": inputs["attention_mask"].float().log()}, "attention_mask holds negative numbers or NaN"),
        ({"image_ids": order[:, :5]}, "image_ids must have the shape"),
        ({"image_ids": order + 2}, "image_ids from 2 to 2, but an example may have num_images=2"),
        ({"image_ids": order - 1}, "image_ids from -1 to -1"),
        ({"input_ids": None}, "exactly one of input_ids and inputs_embeds"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(**{**inputs, **change}, labels=LABELS)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match=r"an image of 7 visual tokens, but .* max_objects=6"):
        model(**text, visual_features=torch.randn(3, 7, 12), labels=LABELS)
    ids = torch.tensor([0] * 7 + [1] * 5).expand(3, -1)
    with pytest.raises(ValueError, match="an image of 7 visual tokens"):
        model(**text, visual_features=torch.randn(3, 12, 12), image_ids=ids, labels=LABELS)
    ids = torch.tensor([0] * 6 + [1] * 6).expand(3, -1)
    model(**text, visual_features=torch.randn(3, 12, 12), image_ids=ids, labels=LABELS)
    # padding after two images counts for neither, whatever its number
    model(
        **text,
        visual_features=torch.randn(3, 20, 12),
        image_ids=torch.nn.functional.pad(ids, (0, 8)),
        visual_mask=torch.arange(20).lt(12).expand(3, -1),
        labels=LABELS,
    )
    if backbone is BART:
        with pytest.raises(ValueError, match="a text of 33 tokens, but the position table has 32 rows"):
            model(torch.ones(3, 33, dtype=torch.long), visual_features=torch.randn(3, 6, 12), labels=LABELS)


def adapted(model):
    """The model with READ, and READ with weights that move the outputs."""
    model = get_peft_model(model, READConfig(r=4)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "readapter_" in name:
                parameter.normal_(std=0.5)
    return model


def test_read_finds_the_feed_forward_blocks_and_keeps_padding_out(backbone):
    model, inputs = adapted(small_model(backbone, **PROMPTS)), batch(backbone, images=True)
    modules = {
        name.split(".readapter_down")[0].removeprefix("base_model.model.")
        for name, _ in model.named_parameters()
        if "down.default.weight" in name
    }
    last = {"encoder": "fc2", "decoder": "fc2"}
    if backbone is T5:
        last = {"encoder": "layer.1.DenseReluDense.wo", "decoder": "layer.2.DenseReluDense.wo"}
    assert modules == {f"{backbone.prefix}{s}.{backbone.block}.{i}.{last[s]}" for s in last for i in (0, 1)}
    together = model(**inputs, labels=LABELS).logits
    for row, (words, regions) in enumerate([(7, 6), (5, 4), (3, 2)]):
        alone = model(**example(inputs, row, words, regions), labels=LABELS[row : row + 1]).logits
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)
    lengths = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": 3}
    cached, uncached = (model.generate(**inputs, **lengths, use_cache=cache) for cache in (True, False))
    assert cached.equal(uncached)


def test_read_runs_over_the_text_and_over_each_image_apart(backbone):
    model, inputs = adapted(small_model(backbone)), batch(backbone, images=True)
    inputs["image_ids"] = torch.tensor([[0, 0, 0, 1, 1, 1]] * 3)
    seen = {}
    ending = "fc2" if backbone is BART else "layer.1.DenseReluDense.wo"
    layer = encoder_of(model.get_base_model(), backbone).get_submodule(f"{backbone.block}.0.{ending}")
    layer.register_forward_hook(lambda module, args, output: seen.update(given=args[0], output=output))
    model(**inputs, labels=LABELS)
    added = seen["output"] - layer.base_layer(seen["given"])
    states = layer.base_layer(seen["given"])

    def change(place):
        moved = states.clone()
        moved[:, place] += 1
        layer.base_layer.forward = lambda x: moved
        model(**inputs, labels=LABELS)
        del layer.base_layer.forward
        return (seen["output"] - moved - added).abs().amax((0, 2)) > 1e-6

    text, first, second = slice(0, 7), slice(7, 10), slice(10, 13)
    for place, own in ((0, text), (7, first), (10, second)):
        moved = change(place)
        assert moved[own].any()
        moved[own] = False
        assert not moved.any()


@pytest.mark.parametrize("options", [{}, {"visual_pooling": "sequence", "pooled_tokens": 4}])
def test_visual_tokens_are_aligned_with_the_text(backbone, options):
    model, inputs = adapted(small_model(backbone, **PROMPTS, **options)), batch(backbone)
    base = model.get_base_model()
    video, language = preset_streams(base)
    layers = [f"{backbone.prefix}encoder.{backbone.block}.{i}" for i in (0, 1)]
    assert video.module_names(base) == language.module_names(base) == layers
    states = torch.randn(3, 3 + 7 + (4 if options else 6), 16)
    tokens, mask = video.select_tokens(states, inputs, "a")
    assert tokens.equal(states[:, 10:])
    assert mask.long().equal(inputs["visual_mask"][:, : tokens.shape[1]])
    tokens, mask = language.select_tokens(states, inputs, "a")
    assert tokens.equal(states[:, 3:10])
    assert mask.long().equal(inputs["attention_mask"])
    told_by_padding = {name: value for name, value in inputs.items() if name != "attention_mask"}
    assert language.select_tokens(states, told_by_padding, "a")[1].equal(mask)

    aligner = Aligner(model, PVLAConfig(weight=1.0))
    with aligner.record() as recording:
        output = model(**inputs, labels=LABELS)
    loss = aligner.loss(recording, inputs, output)
    loss.backward()
    assert loss.item() > 0
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and ".encoder." in name}
    assert len(trained) > 4
    assert all(gradient is not None for name, gradient in trained.items() if "down" in name)
