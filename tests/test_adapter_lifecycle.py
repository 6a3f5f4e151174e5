"""Adapters as peft users handle them: add, switch, save, load, mix, delete; and what READ refuses."""

import copy
import pickle
import warnings

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from peft import (
    AutoPeftModel,
    AutoPeftModelForSeq2SeqLM,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from tiny_models import adapted, build, padded_batch, read_layers
from torch import nn
from transformers import AutoModelForSeq2SeqLM, BartForConditionalGeneration

from peft_read import READConfig
from peft_read.adapter.layer import READLayer

RANDOM = {"init_weights": False}


def logits(model, family="bart", **extra):
    ids, mask = padded_batch(family)
    inputs = {"input_ids": ids, "attention_mask": mask, **({"decoder_input_ids": ids} if family == "bart" else {})}
    with torch.no_grad():
        return model(**inputs, **extra).logits


def same(one, other):
    """Equal up to the last bit: torch's recurrences round differently where the weights need no gradient."""
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    return True


def two_adapters(family="bart", **second):
    model = adapted(family)
    torch.manual_seed(7)
    model.add_adapter("b", READConfig(**{**RANDOM, "cell": "lstm", "r": 2, **second}))
    return model.eval()


def test_several_adapters_are_added_switched_and_deleted():
    model, base = two_adapters(), logits(build("bart"))
    first = logits(model)
    model.set_adapter("b")
    second = logits(model)
    assert not torch.allclose(first, base) and not torch.allclose(second, base) and not torch.allclose(first, second)
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"b"}
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    with pytest.warns(UserWarning, match="default was active which is now deleted"):
        model.delete_adapter("default")
    assert model.active_adapters == ["b"] and torch.equal(logits(model), second)
    assert not [name for name in model.state_dict() if ".default." in name]


def test_active_together_they_add_up():
    layer = nn.Linear(6, 8)
    model = get_peft_model(nn.Sequential(layer), READConfig(target_modules=["0"], **RANDOM))
    model.add_adapter("b", READConfig(target_modules=["0"], cell="gru", r=2, **RANDOM))
    x = torch.randn(2, 5, 6)
    with torch.no_grad():
        base = layer(x)
        shares = []
        for name in ("default", "b"):
            model.set_adapter(name)
            shares.append(model(x) - base)
        for order in (["default", "b"], ["b", "default"]):
            model.base_model.set_adapter(order)
            torch.testing.assert_close(model(x), base + sum(shares))


def test_disabling_and_unloading_give_the_base_model_back():
    base, model = build("bart"), adapted("bart")
    expected = logits(base)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert not torch.allclose(logits(model), expected)
    plain = model.unload()
    assert torch.equal(logits(plain), expected)
    assert not [module for module in plain.modules() if isinstance(module, READLayer)]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in plain.modules())


def test_unloading_a_copy_takes_its_hooks_off_too():
    model = pickle.loads(pickle.dumps(copy.deepcopy(adapted("bart"))))
    plain = model.unload()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in plain.modules())


def test_a_later_adapter_on_another_stack_gets_its_scope():
    model = adapted("bart", target_modules=r".*encoder\..*fc2")
    model.add_adapter("b", READConfig(target_modules=r".*decoder\..*fc2", **RANDOM))
    model.set_adapter("b")
    model.generation_config.eos_token_id = None
    ids, mask = padded_batch("bart")
    settings = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6}
    assert torch.equal(model.generate(**settings), model.generate(**settings, use_cache=False))


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm", "none"])
def test_saving_and_loading(tmp_path, cell, safe, low_cpu_mem_usage):
    model = adapted("bart", cell=cell, modules_to_save=["lm_head"])
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.add_(0.1)
    model.save_pretrained(tmp_path, safe_serialization=safe)
    loaded = PeftModel.from_pretrained(build("bart"), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert same(logits(loaded), logits(model))
    assert not any(p.requires_grad for p in loaded.parameters())
    if safe:
        names = set(load_file(tmp_path / "adapter_model.safetensors"))
        assert not [name for name in names if "default" in name]
        assert any(name.endswith("decoder.layers.1.fc2.readapter_down.weight") for name in names)


def test_loading_goes_on_training(tmp_path):
    model = adapted("bart")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("bart"), tmp_path, is_trainable=True)
    assert all(p.requires_grad == ("readapter_" in n) for n, p in loaded.named_parameters())


class ThreadModel(nn.Module):
    """Paths that contain the obvious prefixes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.thread_ff = nn.ModuleDict({"read_head": nn.Linear(6, 6), "spread_out": nn.Linear(6, 6)})

    def forward(self, x):
        return self.thread_ff["spread_out"](self.thread_ff["read_head"](x))


@pytest.mark.parametrize("name", ["read", "default", "a", "d_", "readapter", "down", "weight_ih"])
@pytest.mark.filterwarnings("ignore:Adapter name")
def test_awkward_names_survive_saving_loading_and_deleting(tmp_path, name):
    settings = {"target_modules": ["read_head", "spread_out"], **RANDOM}
    model = get_peft_model(ThreadModel(), READConfig(**settings), adapter_name=name).eval()
    x = torch.randn(2, 5, 6)
    expected = model(x)
    model.save_pretrained(tmp_path)
    folder = tmp_path if name == "default" else tmp_path / name
    loaded = PeftModel.from_pretrained(ThreadModel(), folder, adapter_name=name).eval()
    assert same(loaded(x), expected)
    loaded.load_adapter(folder, "other")
    loaded.set_adapter("other")
    assert same(loaded(x), expected)
    loaded.delete_adapter("other")
    assert not [key for key in loaded.state_dict() if ".other." in key]
    loaded.set_adapter(name)
    assert same(loaded(x), expected)
    loaded.delete_adapter(name)
    assert not [key for key in loaded.state_dict() if "readapter_" in key and "base_layer" not in key]


@pytest.mark.parametrize("name", ["read", "default", "a"])
@pytest.mark.filterwarnings("ignore:Adapter name")
def test_transformers_own_adapter_methods(tmp_path, name):
    needed = getattr(transformers.integrations.peft, "MIN_PEFT_VERSION", "0")
    if Version(peft.__version__) < Version(needed):
        pytest.skip(f"transformers {transformers.__version__} takes adapters of peft {needed} and later only")
    model = build("bart")
    expected = logits(model)
    model.add_adapter(READConfig(**RANDOM), adapter_name=name)
    changed = logits(model)
    assert not torch.allclose(changed, expected)
    assert model.active_adapters() == [name]
    model.save_pretrained(tmp_path)
    fresh = build("bart")
    fresh.load_adapter(str(tmp_path), adapter_name=name)
    assert same(logits(fresh.eval()), changed)
    with pytest.raises(ValueError, match="Hotswapping is currently only supported for LoRA"):
        fresh.load_adapter(str(tmp_path), adapter_name=name, hotswap=True)
    fresh.disable_adapters()
    assert torch.equal(logits(fresh), expected)
    fresh.enable_adapters()
    fresh.delete_adapter(name)
    assert not [key for key in fresh.state_dict() if f".{name}." in key]


def test_adapters_found_by_the_auto_classes(tmp_path):
    build("bart").save_pretrained(tmp_path / "base")
    base = BartForConditionalGeneration.from_pretrained(tmp_path / "base")
    for task, kind in (("SEQ_2_SEQ_LM", AutoPeftModelForSeq2SeqLM), (None, AutoPeftModel)):
        torch.manual_seed(3)
        model = get_peft_model(copy.deepcopy(base), READConfig(task_type=task, **RANDOM)).eval()
        model.save_pretrained(tmp_path / "adapter")
        assert same(logits(kind.from_pretrained(tmp_path / "adapter").eval()), logits(model))
    through_transformers = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(through_transformers), logits(model))


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_injecting_without_a_wrapper(low_cpu_mem_usage):
    donor = adapted("bart")
    state = get_peft_model_state_dict(donor)
    model = inject_adapter_in_model(READConfig(), build("bart"), low_cpu_mem_usage=low_cpu_mem_usage)
    assert len(read_layers(model)) == 4
    if low_cpu_mem_usage:
        assert {p.device.type for n, p in model.named_parameters() if "readapter_" in n} == {"meta"}
    else:
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, {k.removeprefix("base_model.model."): v for k, v in state.items()})
        assert same(logits(model.eval()), logits(donor))


def test_injecting_where_a_state_dict_says():
    state = {k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(adapted("bart")).items()}
    state = {name: value for name, value in state.items() if "decoder" in name}
    with pytest.warns(RuntimeWarning, match="inconsistency"):
        model = inject_adapter_in_model(READConfig(), build("bart"), state_dict=state)
    assert {layer.path for layer in read_layers(model)} == {f"model.decoder.layers.{i}.fc2" for i in range(2)}


def test_missing_weights_are_reported(tmp_path):
    model = adapted("bart")
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    lost = next(name for name in state if name.endswith("readapter_cell.weight_hh"))
    save_file({name: value for name, value in state.items() if name != lost}, path)
    with pytest.warns(UserWarning, match=r"missing adapter keys.*readapter_cell\.default\.weight_hh"):
        PeftModel.from_pretrained(build("bart"), tmp_path)


def test_a_long_list_of_targets_is_condensed_to_the_same_modules():
    names = [f"model.{part}.layers.{i}.{name}" for part in ("encoder", "decoder") for i in range(2)
             for name in ("fc2", "fc1", "self_attn.q_proj", "self_attn.v_proj", "self_attn.k_proj")]  # fmt: skip
    model = get_peft_model(build("bart"), READConfig(target_modules=names))
    assert {layer.path for layer in read_layers(model)} == set(names) and len(names) == 20
    assert len(model.peft_config["default"].target_modules) < 20


def test_targets_and_ranks_by_module():
    model = get_peft_model(build("bart"), READConfig(r=4, rank_pattern={r"encoder\.layers\.0\.fc2": 2, "fc1": 8},
                           target_modules=["fc1", "fc2"], layers_to_transform=[0], layers_pattern="layers",
                           exclude_modules=[r"decoder.layers.0.fc1"]))  # fmt: skip
    ranks = {layer.path.removeprefix("model."): layer.r["default"] for layer in read_layers(model)}
    assert ranks == {"encoder.layers.0.fc1": 8, "encoder.layers.0.fc2": 2, "decoder.layers.0.fc2": 4}
    everything = get_peft_model(build("bart"), READConfig(target_modules="all-linear"))
    names = {layer.path for layer in read_layers(everything)}
    assert len(names) == 2 * 6 + 2 * 10 and "lm_head" not in names
    everything.add_adapter("b", READConfig(target_modules="all-linear"))  # finds the layers below READ's own
    assert all(set(layer.r) == {"default", "b"} for layer in read_layers(everything))


def test_the_layers_report_their_status():
    model = two_adapters()
    status = model.get_layer_status()
    assert {s.module_type for s in status} == {"read.Linear"}
    assert all(s.available_adapters == ["b", "default"] and s.active_adapters == ["default"] for s in status)
    whole = model.get_model_status()
    assert whole.peft_types == {"default": "READ", "b": "READ"}
    layer = read_layers(model)[0]
    assert (layer.in_features, layer.out_features) == (32, 16) and repr(layer).startswith("read.Linear(")


def test_no_stray_tensors_in_a_checkpoint():
    model = adapted("bart")
    logits(model)
    names = {name.split("readapter_")[1] for name in get_peft_model_state_dict(model)}
    assert names == {f"{part}.{n}" for part in ("down", "up") for n in ("weight", "bias")} | {
        f"cell.{n}" for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    }


def test_copies_and_pickles_compute_the_same():
    model = adapted("bart")
    expected = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), expected)
        twin.generation_config.eos_token_id = None
        ids, mask = padded_batch("bart")
        settings = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 4}
        assert torch.equal(twin.generate(**settings), twin.generate(**settings, use_cache=False))


def test_other_layers_with_an_output_of_known_width():
    class QuantLinear(nn.Module):
        """As quantised layers are: no nn.Linear, no float weight."""

        def __init__(self):
            super().__init__()
            self.infeatures, self.outfeatures = 6, 8
            self.register_buffer("qweight", torch.randint(-8, 8, (6, 8), dtype=torch.int8))

        def forward(self, x):
            return x @ (self.qweight.float() / 8)

    model = get_peft_model(nn.Sequential(QuantLinear()), READConfig(target_modules=["0"], **RANDOM))
    assert model(torch.randn(2, 5, 6)).shape == (2, 5, 8)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_tied_output_layer_is_only_warned_of():
    with pytest.warns(UserWarning, match="tie"):
        model = get_peft_model(build("bart"), READConfig(target_modules=["lm_head"], **RANDOM))
    assert model.get_base_model().lm_head.weight is model.get_base_model().model.shared.weight
    assert logits(model.eval()).isfinite().all()


def test_settings_of_a_later_version_are_dropped_with_a_warning(tmp_path):
    import json

    adapted("bart").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "of_a_later_version": 1}))
    with pytest.warns(UserWarning, match="Unexpected keyword arguments"):
        assert isinstance(READConfig.from_pretrained(tmp_path), READConfig)


@pytest.mark.parametrize("family", ["bart", "opt", "llama"])
def test_every_row_is_served_by_its_own_adapter(family):
    model = two_adapters(family)
    expected = {}
    for name in ("default", "b"):
        model.set_adapter(name)
        expected[name] = logits(model, family)
    with model.disable_adapter():
        expected["__base__"] = logits(model, family)
    names = ["b", "__base__", "default"]
    model.set_adapter("default")
    mixed = logits(model, family, adapter_names=names)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], expected[name][row], rtol=0, atol=1e-5)
    assert torch.equal(logits(model, family), expected["default"])


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
@pytest.mark.parametrize("family", ["bart", "llama"])
def test_mixed_batches_generate(family, settings):
    model = two_adapters(family)
    model.generation_config.eos_token_id = None
    ids, mask = padded_batch(family)
    settings = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False, **settings}
    expected = {}
    for name in ("default", "b"):
        model.set_adapter(name)
        expected[name] = model.generate(**settings)
    names = ["b", "default", "b"]
    mixed = model.generate(**settings, adapter_names=names)
    copies = len(mixed) // 3
    for row in range(len(mixed)):
        assert torch.equal(mixed[row], expected[names[row // copies]][row])


def test_mixed_batches_choose_modules_trained_as_a_whole_too():
    model = adapted("bart", modules_to_save=["lm_head"])
    model.add_adapter("b", READConfig(modules_to_save=["lm_head"], **RANDOM))
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["b"].weight.mul_(2)
    model.eval().set_adapter("b")
    expected = logits(model)
    model.set_adapter("default")
    mixed = logits(model, adapter_names=["b", "default", "b"])
    torch.testing.assert_close(mixed[[0, 2]], expected[[0, 2]], rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed[1], logits(model)[1], rtol=0, atol=1e-5)


def test_mixed_batches_are_checked():
    model = two_adapters()
    with pytest.raises(ValueError, match="non-existing adapter\\(s\\): c"):
        logits(model, adapter_names=["b", "c", "c"])
    with pytest.raises(ValueError, match="same as the number of inputs, but got 2 and 3"):
        logits(model, adapter_names=["b", "b"])
    model.train()
    with pytest.raises(ValueError, match="when the model is in training mode"):
        logits(model, adapter_names=["b", "b", "b"])
    model = two_adapters("llama").eval()
    ids, _ = padded_batch("llama", pads=(0, 0))
    with torch.no_grad():
        cache = model(input_ids=ids, adapter_names=["b", "default"], use_cache=True).past_key_values
        with pytest.raises(RuntimeError, match="rows of `adapter_names` changed"):
            model(input_ids=ids[:, :1], adapter_names=["default", "b"], past_key_values=cache)


@pytest.mark.parametrize(
    "merge",
    [
        lambda model: model.merge_adapter(),
        lambda model: model.merge_and_unload(),
        lambda model: model.merge_and_unload(safe_merge=True, adapter_names=["default"]),
        lambda model: read_layers(model)[0].merge(),
        lambda model: read_layers(model)[0].unmerge(),
    ],
)
def test_merging_is_refused_before_anything_is_touched(merge):
    model = adapted("bart", modules_to_save=["lm_head"])
    modules, expected = [type(module) for module in model.modules()], logits(model)
    with pytest.raises(NotImplementedError, match="GELU and the recurrence over tokens are not linear"):
        merge(model)
    assert [type(module) for module in model.modules()] == modules
    assert torch.equal(logits(model), expected)
    assert model.peft_config


def test_adapters_are_not_added_by_weight():
    model = two_adapters()
    with pytest.raises(NotImplementedError, match=r"set_adapter\(\[...\]\)"):
        model.add_weighted_adapter(["default", "b"], [0.5, 0.5], "c")


def test_mixing_methods_is_refused():
    with pytest.raises(ValueError, match="READ"):
        get_peft_model(build("bart"), READConfig(), mixed=True)
    mixed = get_peft_model(build("bart"), LoraConfig(), mixed=True)
    with pytest.raises(ValueError, match="READ"):
        mixed.add_adapter("b", READConfig())


def test_hotswapping_is_refused(tmp_path):
    adapted("bart").save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(build("bart"), tmp_path)
    with pytest.raises(ValueError, match="Hotswapping"):
        hotswap_adapter(model, tmp_path, "default")


def test_conversions_made_for_other_methods_are_refused(tmp_path):
    model = adapted("bart")
    with pytest.raises(ValueError, match="not supported"):
        model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion=tmp_path / "first")
    assert not model.supports_lora_conversion()


def test_transformers_renaming_puts_the_adapters_name_in_its_place():
    """peft matches prefixes anywhere in a path; READ's occurs in no module's name."""
    from peft.utils.transformers_weight_conversion import build_peft_weight_mapping
    from transformers.core_model_loading import WeightRenaming

    mapping = build_peft_weight_mapping([WeightRenaming("old", "new")], "default", READConfig())
    patterns = [(source, target) for item in mapping for source, target in zip(
        item.source_patterns, item.target_patterns, strict=True)]  # fmt: skip
    import re

    key = "model.thread_ff.spread_out.read_head.readapter_down.weight"
    for source, target in patterns:
        key = re.sub(source, target, key)
    assert key == "model.thread_ff.spread_out.read_head.readapter_down.default.weight"


def test_a_usual_training_step_warns_of_nothing():
    model = get_peft_model(build("bart"), READConfig(task_type="SEQ_2_SEQ_LM")).train()
    ids, mask = padded_batch("bart")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
