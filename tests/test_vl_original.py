"""Models of VL-Adapter's published code: the stored cases, the counts at real size, saving, and what is refused."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration

from peft_read import BottleneckConfig, CompacterConfig, HyperformerConfig, set_task
from peft_read.baselines import train_only
from peft_read.bottleneck.layer import BottleneckLayer
from peft_read.data import resize_frames
from peft_read.models import VLBartConfig, VLBartForConditionalGeneration, VLT5Config, VLT5ForConditionalGeneration
from peft_read.vl_adapter import TASK_LOSSES, BottleneckPenalty, load_original, task_loss
from peft_read.vl_adapter.original import POSITIONS

CASES = [
    "vl_bart/adapter_half_shared_up",
    "vl_bart/adapter_single",
    "vl_bart/backbone",
    "vl_bart/compacter_single",
    "vl_bart/hyperformer_unique",
    "vl_bart/prompt_multiple",
    "vl_t5/adapter_multiple",
    "vl_t5/backbone",
    "vl_t5/compacter_code_defaults",
    "vl_t5/hyperformer_efficient",
    "vl_t5/video_adapter_single",
]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
TASKS = ["vqa", "gqa", "nlvr", "caption"]


def golden_case(path):
    """The tensors of a case by group and name, and its notes."""
    from safetensors.torch import load_file

    groups = {}
    for key, value in load_file(path).items():
        group, name = key.split("/", 1)
        groups.setdefault(group, {})[name] = value
    return groups, json.loads(path.with_suffix(".json").read_text())


def inputs_of(golden, task):
    given = {name.partition(".")[2]: value for name, value in golden["inputs"].items() if name.startswith(f"{task}.")}
    images = given.get("vis_inputs.img_order_ids")
    source = {
        "input_ids": given["input_ids"],
        "visual_features": given["vis_feats"] if images is None else given["vis_inputs.feats"],
        "visual_boxes": given["boxes"] if images is None else given["vis_inputs.boxes"],
        "image_ids": images,
    }
    if "raw_video_0" in given:
        source["visual_features"] = torch.stack([resize_frames(given[f"raw_video_{i}"], 9) for i in range(3)])
        assert source["visual_features"].equal(given["vis_feats"])
    return source, given["target_ids"], given.get("scores")


def trained_by_value(model, names, weights):
    """The trained parameters by the original's names: told by their values, which are all different."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    by_name = {}
    for name in names:
        same = [p for p in trained if p.shape == weights[name].shape and torch.equal(p.detach(), weights[name])]
        assert len(same) == 1, f"{name}: {len(same)} trained parameters have its values"
        by_name[name] = same[0]
    assert len({id(p) for p in by_name.values()}) == len(trained) == len(names)
    return by_name


def record(model):
    outputs = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda module, args, output, name=name: outputs.__setitem__(
                name, output[0] if isinstance(output, tuple) else output
            )
        )
    return outputs


def state_of(name, output, seen, backbone):
    """What a case calls by one of its names."""
    stack, _, place = name.partition(".")
    if name in ("encoder.input", "decoder.input"):
        return getattr(output, f"{stack}_hidden_states")[0]
    if name in ("encoder.last", "decoder.last"):
        return getattr(output, f"{stack}_hidden_states")[-1]
    prefix = "model." if backbone == "bart" else ""
    if stack == "module":
        block, _, kind = place.rpartition(".")
        return seen[f"{block}.{POSITIONS[backbone][kind]}"]
    return seen[f"{prefix}{name}".replace("encoder.prompt", "encoder.task_prompts")]


@pytest.mark.parametrize("case", CASES)
def test_everything_equals_the_original(reference_data, case):
    golden, notes = golden_case(reference_data(f"golden/vl_adapter/{case}.safetensors"))
    model = load_original(golden["state_dict"], notes)
    assert not model.training
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == notes["trainable_count"]
    trained = trained_by_value(model, notes["trainable"], golden["state_dict"])
    seen = record(model.get_base_model() if isinstance(model, PeftModel) else model)
    for task in notes["tasks"]:
        source, labels, scores = inputs_of(golden, task)
        set_task(model, task)
        model.zero_grad()
        output = model(**source, labels=labels, output_hidden_states=True)
        torch.testing.assert_close(output.logits, golden["outputs"][f"{task}.logits"], **CLOSE)
        for name, expected in golden["hidden"].items():
            if name.startswith(f"{task}.") and ".generated." not in f".{name}":
                actual = state_of(name.partition(".")[2], output, seen, notes["backbone"])
                torch.testing.assert_close(actual, expected, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
        loss = task_loss(output.logits, labels, TASK_LOSSES[task], scores).mean
        torch.testing.assert_close(loss, golden["losses"][f"{task}.loss"], **CLOSE)
        loss.backward()
        for name, expected in golden["grads"].items():
            if name.startswith(f"{task}."):
                gradient = trained[name.partition(".")[2]].grad
                assert (gradient - expected).abs().max() < 5e-4 * (1 + expected.abs().max()), name
        assert all(trained[name].grad is None for name in notes["grad_none"][task])
        # transformers 4.2.1 forces BART's last token to be EOS in beam search and not in greedy search
        greedy = model.generate(**source, num_beams=1, do_sample=False, max_length=10, forced_eos_token_id=None)
        assert greedy.equal(golden["outputs"][f"{task}.generate.greedy"])
        assert model.generate(**source, num_beams=5, max_length=10).equal(golden["outputs"][f"{task}.generate.beam5"])


# What each script of the original is here: the options of the backbone, and what peft adds.
BART_NORMS = ["layer_norm", "layernorm_embedding"]  # peft compares the ends of names
VISUAL = ["visual_embedding"]


OF_T5 = (
    "image_single_adapter",
    "adapter_single_r4",
    "image_single_compacter",
    "image_hyperformer",
    "image_single_prompt",
)


def scripts(norms, lora, tasks):
    def adapter(kind=BottleneckConfig, **options):
        saved = options.pop("saved", VISUAL + norms)
        return {}, kind(init_weights="original", modules_to_save=saved, **options)

    hyperformer = {"kind": HyperformerConfig, "tasks": tasks}
    compacter = {"kind": CompacterConfig, "phm_dim": 2, "shared_rule": None, "factorized_rank": None}
    no_attention = LoraConfig(target_modules="dummy-target-modules", modules_to_save=[*VISUAL, "task_prompts"])
    cross = "encoder_attn|EncDecAttention"
    return {
        "image_single_adapter": adapter(tasks=tasks, share="all"),
        "image_multiple_adapters": adapter(tasks=tasks),
        "image_single_compacter": adapter(**compacter, tasks=tasks, share="all"),
        "image_hyperformer": adapter(**hyperformer),
        "image_single_prompt": ({"prompt_length": 40}, no_attention),
        "image_multiple_prompts": ({"prompt_length": 40, "prompt_tasks": tasks}, no_attention),
        "image_single_lora": (
            {},
            LoraConfig(r=128, lora_alpha=32, target_modules=lora, bias="all", modules_to_save=VISUAL),
        ),
        "video_single_adapter": ({"visual_feature_dim": 512}, adapter(tasks=tasks, share="all")[1]),
        "adapter_half_shared_down": adapter(tasks=tasks, share="down"),
        "adapter_half_shared_up": adapter(tasks=tasks, share="up"),
        "adapter_single_no_cross_attention": adapter(exclude_modules=rf".*({cross})\.(out_proj|o)"),
        "adapter_single_r4": adapter(reduction_factor=4),
        "compacter_code_defaults_single": adapter(CompacterConfig),
        "low_rank_adapter_single": adapter(low_rank=1),
        "adapter_single_prompt_multiple": (
            {"prompt_length": 40, "prompt_tasks": tasks},
            BottleneckConfig(modules_to_save=[*VISUAL, "task_prompts", *norms]),
        ),
    }


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_the_counts_of_the_published_scripts(reference_data, name):
    counts = json.loads(reference_data("golden/vl_adapter/data/parameter_counts.json").read_text())
    published = {**counts["from_scripts"], **counts["variants"]}
    config_class, model_class = {
        "bart": (VLBartConfig, VLBartForConditionalGeneration),
        "t5": (VLT5Config, VLT5ForConditionalGeneration),
    }[name]
    norms = BART_NORMS if name == "bart" else []  # the original's switch does nothing to T5's norms
    lora = ["q_proj", "v_proj"] if name == "bart" else ["q", "v"]
    rows = 50_465 if name == "bart" else 32_200
    bases = {}
    for script, (options, peft_config) in scripts(norms, lora, TASKS).items():
        if name == "t5" and script not in OF_T5:
            continue
        with torch.device("meta"):
            if str(options) not in bases:
                bases[str(options)] = model_class(config_class(vocab_size=rows, **options))
            model = get_peft_model(copy.deepcopy(bases[str(options)]), peft_config)
        frozen_copies = sum(p.numel() for key, p in model.named_parameters() if ".original_module." in key)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in model.parameters()) - frozen_copies
        expected = published[script][name]
        assert (trained, total) == (expected["trainable"], expected["total"]), script
        assert round(100 * trained / total, 4) == expected["percent"], script
    with torch.device("meta"):
        model = train_only(model_class(config_class(vocab_size=rows)), "none", also=["visual_embedding"])
    assert (
        sum(p.numel() for p in model.parameters() if p.requires_grad)
        == published["visual_projection_only"][name]["trainable"]
    )


SIZES = {
    "vocab_size": 40,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
}
ADAPTER = {
    "class": "AdapterConfig",
    "reduction_factor": 4,
    "non_linearity": "gelu_new",
    "add_layer_norm_before_adapter": False,
    "add_layer_norm_after_adapter": False,
    "use_single_adapter": True,
}


def original(added=None, flags=(), **more):
    """The settings and the weights of a small BART with `added` on top, under the original's names."""
    settings = {
        "backbone": "bart",
        "config": {**SIZES, "feat_dim": 12},
        "tasks": ["vqa", "gqa"],
        "original_flags": list(flags),
        "options": added or {},
    }
    base = VLBartForConditionalGeneration(VLBartConfig(**SIZES, visual_feature_dim=12))
    weights = {key: torch.randn_like(value) * 0.3 for key, value in base.state_dict().items()}
    for alias in ("model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head"):
        weights[f"{alias}.weight"] = weights["model.shared.weight"]
    weights["final_logits_bias"].zero_()
    return settings, {**weights, **{key: torch.randn(shape) * 0.3 for key, shape in more.items()}}


def adapters(single=True):
    kinds = {
        "encoder": ["attn_adapter", "ff_adapter"],
        "decoder": ["self_attn_adapter", "enc_attn_adapter", "ff_adapter"],
    }
    shapes = {
        "down_sampler.weight": (4, 16),
        "down_sampler.bias": (4,),
        "up_sampler.weight": (16, 4),
        "up_sampler.bias": (16,),
    }
    return {
        f"model.{stack}.layers.0.{kind}.adapters.{task}.{weight}": shape
        for stack in kinds
        for kind in kinds[stack]
        for task in (["vqa"] if single else ["vqa", "gqa"])
        for weight, shape in shapes.items()
    }


def batch():
    return {
        "input_ids": torch.randint(4, 40, (2, 5)),
        "visual_features": torch.randn(2, 4, 12),
        "visual_boxes": torch.rand(2, 4, 4),
        "labels": torch.randint(4, 40, (2, 3)),
    }


def test_a_loaded_model_is_saved_with_all_that_it_trains(tmp_path):
    settings, weights = original(
        {"adapter_config": {**ADAPTER, "use_single_adapter": False}},
        ["--use_adapter", "--unfreeze_layer_norms"],
        **adapters(single=False),
    )
    model, inputs = load_original(weights, settings), batch()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert sum("visual_embedding" in name for name in trained) == 9
    assert sum("layer_norm" in name or "layernorm" in name for name in trained) == 2 * (2 + 3 + 2)
    model.save_pretrained(tmp_path)
    base = VLBartForConditionalGeneration.from_original_checkpoint(
        {**weights, **{key: torch.zeros_like(weights[key]) for key in weights if "visual_embedding" in key}},
        model.get_base_model().config,
    )
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    for task in ("vqa", "gqa"):
        set_task(model, task)
        set_task(again, task)
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)


def test_lora_per_task_is_the_merged_weight_and_shares_the_visual_embedding(tmp_path):
    places = ["encoder.layers.0.self_attn", "decoder.layers.0.self_attn", "decoder.layers.0.encoder_attn"]
    factors = {
        f"model.{place}.{linear}.lora_{factor}s.{task}": (3, 16) if factor == "A" else (16, 3)
        for place in places
        for linear in ("q_proj", "v_proj")
        for factor in "AB"
        for task in ("vqa", "gqa")
    }
    settings, weights = original({"lora_config": {"lora_alpha": 24.0}}, ["--use_lora"], **factors)
    model, inputs = load_original(weights, settings), batch()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sum(".lora_" in name for name in trained) == len(factors)
    assert sum("visual_embedding" in name for name in trained) == 9
    assert len([name for name in trained if name.endswith("bias")]) > 20
    for task in ("vqa", "gqa"):
        merged = dict(weights)
        for place in places:
            for linear in ("q_proj", "v_proj"):
                a, b = (weights[f"model.{place}.{linear}.lora_{factor}s.{task}"] for factor in "AB")
                merged[f"model.{place}.{linear}.weight"] = merged[f"model.{place}.{linear}.weight"] + 24 / 3 * b @ a
        plain = VLBartForConditionalGeneration.from_original_checkpoint(merged, model.get_base_model().config)
        set_task(model, task)
        torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_prompts_of_the_decoder_come_before_its_tokens():
    settings = {"prompt_len": 3, "mid_dim": 5, "use_single_prompt": True}
    prompts = {
        f"model.prompt_modules.prompts.{task}.prefix_embedding.{name}": shape
        for task in ("vqa",)
        for name, shape in {"0.weight": (3, 16), "1.weight": (5, 16), "1.bias": (5,), "3.weight": (16, 5)}.items()
    }
    prompts["model.prompt_modules.prompts.vqa.prefix_embedding.3.bias"] = (16,)
    options, weights = original({"decoder_prompt_config": settings}, [], **prompts)
    model, inputs = load_original(weights, options), batch()
    names = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in names if "prompts" in name} == {
        f"model.decoder_prompts.{part}" for part in ("embedding", "inner", "outer")
    }
    logits = model(**inputs).logits
    plain = VLBartForConditionalGeneration.from_original_checkpoint(
        weights, VLBartConfig(**SIZES, visual_feature_dim=12)
    )
    assert not torch.allclose(plain(**inputs).logits, logits)
    # one token at a time gives what all tokens at once give, with a mask or without
    tokens = model.prepare_decoder_input_ids_from_labels(inputs["labels"])
    source = {name: value for name, value in inputs.items() if name != "labels"}
    masked = model(**source, decoder_input_ids=tokens, decoder_attention_mask=torch.ones_like(tokens))
    torch.testing.assert_close(masked.logits, logits)
    shorter = torch.cat([model(**source, decoder_input_ids=tokens[:, :t]).logits[:, -1:] for t in (1, 2, 3)], dim=1)
    torch.testing.assert_close(shorter, logits)
    lengths = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": 3}
    cached, uncached = (model.generate(**source, **lengths, use_cache=cache) for cache in (True, False))
    assert cached.equal(uncached)
    with pytest.raises(ValueError, match="need a dynamic cache"):
        model.generate(**source, **lengths, cache_implementation="static")
    model(**inputs).loss.backward()
    assert all(p.grad is not None for p in model.model.decoder_prompts.parameters())
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing drops the cache"):
        model(**inputs)


def test_the_penalty_is_the_mean_square_in_the_bottlenecks():
    settings, weights = original({"adapter_config": ADAPTER}, ["--use_adapter"], **adapters())
    model, inputs = load_original(weights, settings), batch()
    squares, hooks = [], []
    for layer in model.modules():
        if isinstance(layer, BottleneckLayer):
            hooks.append(
                layer.register_forward_hook(
                    lambda layer, args, output: squares.append(
                        nn.functional.gelu(
                            layer.parts["default"].down_sampler(layer.base_layer(args[0])), approximate="tanh"
                        )
                        .pow(2)
                        .mean()
                    )
                )
            )
    with BottleneckPenalty(model) as penalty:
        with pytest.raises(ValueError, match="no adapter with a bottleneck has run"):
            penalty.value()
        model(**inputs)
        value = penalty.value()
    assert len(squares) == 5
    torch.testing.assert_close(value, torch.stack(squares).mean())
    value.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if "down_sampler" in n and p.requires_grad}
    assert len(gradients) == 10
    assert all(gradient is not None and gradient.any() for gradient in gradients.values())
    model(**inputs)
    torch.testing.assert_close(penalty.value(), value)  # it watches no longer
    with pytest.raises(ValueError, match="has no adapters with a bottleneck"):
        BottleneckPenalty(nn.Linear(2, 2))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_penalty_without_a_gradient_is_an_error(reentrant):
    config = BartConfig(
        vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, dropout=0.0,
    )  # fmt: skip
    model = get_peft_model(BartForConditionalGeneration(config), BottleneckConfig(r=4)).train()
    model.enable_input_require_grads()
    inputs = {"input_ids": torch.randint(3, 40, (2, 6)), "decoder_input_ids": torch.randint(3, 40, (2, 4))}

    def gradients(inside=True):
        with BottleneckPenalty(model) as penalty:
            model(**inputs)
            value = penalty.value()
            if inside:
                torch.autograd.backward(value)
        if not inside:  # as in the example of its docstring
            torch.autograd.backward(value)
        return [p.grad.clone() for n, p in model.named_parameters() if "down_sampler" in n and p.requires_grad]

    plain = gradients()
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if not reentrant:
        torch.testing.assert_close(gradients(), plain)
        model.zero_grad()
        torch.testing.assert_close(gradients(inside=False), plain)
        return
    with pytest.raises(RuntimeError, match=r"bottleneck '.*' ran where gradients are .*'use_reentrant': False"):
        gradients()
    with BottleneckPenalty(model) as penalty, torch.no_grad():  # for its value alone
        model(**inputs)
        assert penalty.value() > 0
    with BottleneckPenalty(model.eval()) as penalty:
        with torch.no_grad():
            model(**inputs)
        assert penalty.value() > 0


def test_settings_and_weights_that_do_not_fit():
    settings, weights = original({"adapter_config": ADAPTER}, ["--use_adapter"], **adapters())
    key = "model.encoder.layers.0.attn_adapter.adapters.vqa.up_sampler.bias"
    for change, missing, message in [
        ({"backbone": "bert"}, None, "backbone='bert' is not one of"),
        ({"tasks": []}, None, "the settings name no tasks"),
        ({"original_flags": ["--use_lm_head_adapter"]}, None, "--use_lm_head_adapter"),
        ({"options": {"adapter_config": {**ADAPTER, "class": "Other"}}}, None, "class 'Other' is unknown"),
        ({"options": {"adapter_config": {**ADAPTER, "factorized_phm_rule": True}}}, None, "factorized_phm_rule=True"),
        ({}, key, "1 keys missing .*attn.out_proj.*up_sampler.bias"),
    ]:
        held = {name: value for name, value in weights.items() if name != missing}
        with pytest.raises(ValueError, match=message):
            load_original(held, {**settings, **change})
    with pytest.raises(ValueError, match="1 left over"):
        load_original({**weights, "model.encoder.layers.7.fc1.bias": torch.zeros(24)}, settings)
    apart = {name.replace(".vqa.", ".gqa."): value + 1 for name, value in weights.items() if ".vqa." in name}
    with pytest.raises(ValueError, match="should be shared by the tasks, and differs"):
        load_original({**weights, **apart}, settings)
    t5 = {**settings, "backbone": "t5", "options": {"decoder_prompt_config": {"prompt_len": 3, "mid_dim": 4}}}
    with pytest.raises(ValueError, match="VL-T5 has no prompts of the decoder"):
        load_original(weights, t5)
