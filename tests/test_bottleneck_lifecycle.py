"""The bottleneck family as peft users handle it: adding, switching, saving, mixing, compiling; what it refuses."""

import copy
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from accelerate import cpu_offload
from packaging.version import Version
from peft import LoraConfig, PeftModel, PeftType, get_peft_model, inject_adapter_in_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from test_bottleneck import CONFIGS, TASKS, adapted, inputs_of, logits
from tiny_models import build
from torch import nn

from peft_read import BottleneckConfig, CompacterConfig, HyperformerConfig, set_task
from peft_read.bottleneck.hypernetwork import Generated
from peft_read.bottleneck.shared import BottleneckState
from peft_read.checkpointing import ScopedCheckpoint
from peft_read.tasks import TaskModule

FAMILY = {"BOTTLENECK": BottleneckConfig, "COMPACTER": CompacterConfig, "HYPERFORMER": HyperformerConfig}
RANDOM = {"init_weights": False}
ONE_EACH = ("bottleneck", "half", "compacter", "hyperformer")


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# Registration


def test_peft_knows_the_family():
    for name, config in FAMILY.items():
        member = PeftType[name]
        assert PEFT_TYPE_TO_CONFIG_MAPPING[name] is config
        assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == PEFT_TYPE_TO_TUNER_MAPPING[name].prefix


def test_no_prefix_is_a_part_of_another_or_of_what_layers_share():
    ours = {PEFT_TYPE_TO_PREFIX_MAPPING[PeftType[name]] for name in FAMILY}
    others = {prefix for prefix in PEFT_TYPE_TO_PREFIX_MAPPING.values() if prefix} - ours
    for prefix in ours:
        assert not [other for other in [*others, *(ours - {prefix})] if prefix in other or other in prefix]
        assert prefix not in "shared_over_layers" and prefix not in "model.decoder.layers.0.bottleneck.adapter_ff"


# Saving and loading


@pytest.mark.parametrize("name", CONFIGS)
def test_saving_and_loading(tmp_path, name):
    model = adapted(name, modules_to_save=["lm_head"])
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.add_(0.1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("bart"), tmp_path, low_cpu_mem_usage=True).eval()
    for task in ("vqa", "nlvr"):
        set_task(model, task), set_task(loaded, task)
        assert torch.equal(logits(loaded), logits(model))
    assert not trained(loaded)
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert not [key for key in keys if "default" in key]
    again = PeftModel.from_pretrained(build("bart"), tmp_path, is_trainable=True, adapter_name="other")
    assert {key.replace(".other", "") for key in trained(again)} == {k.replace(".default", "") for k in trained(model)}
    again.load_adapter(tmp_path, "default")
    again.set_adapter("default")
    set_task(again, "nlvr")
    assert torch.equal(logits(again.eval()), logits(model))


def test_one_folder_holds_all_tasks_and_what_they_share_once(tmp_path):
    sizes = {}
    for share in (None, "up", "down", "all"):
        model = adapted("bottleneck", tasks=TASKS, share=share)
        model.save_pretrained(tmp_path / str(share))
        weights = load_file(tmp_path / str(share) / "adapter_model.safetensors")
        sizes[share] = {half: sum(f".{half}_sampler" in key for key in weights) for half in ("down", "up")}
    each = 10 * 2  # positions, weight and bias
    assert sizes[None] == {"down": 4 * each, "up": 4 * each} and sizes["all"] == {"down": each, "up": each}
    assert sizes["up"] == {"down": 4 * each, "up": each} and sizes["down"] == {"down": each, "up": 4 * each}


def test_the_card_and_the_configuration(tmp_path):
    for name in ("half", "compacter", "hyperformer"):
        model = adapted(name, dropout=0.1)
        model.save_pretrained(tmp_path / name)
        card = (tmp_path / name / "README.md").read_text()
        kind = model.peft_config["default"].peft_type.value
        assert "import peft_read" in card and f"`KeyError: '{kind}'`" in card and "trained parameters" in card
        saved = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert saved["peft_type"] == kind and saved["dropout"] == 0.1
        loaded, expected = FAMILY[kind].from_pretrained(tmp_path / name), model.peft_config["default"]
        loaded.inference_mode, loaded.auto_mapping = False, None
        assert loaded == expected


@pytest.mark.parametrize("name", ["hyperformer_", "a", "vqa"])
@pytest.mark.filterwarnings("ignore:Adapter name")
@pytest.mark.parametrize("kind", ["half", "hyperformer"])
def test_awkward_names_of_adapters(tmp_path, kind, name):
    model = get_peft_model(build("bart"), CONFIGS[kind](**RANDOM), adapter_name=name).eval()
    set_task(model, "gqa") if name != "gqa" else None
    expected = logits(model)
    model.save_pretrained(tmp_path)
    folder = tmp_path if name == "default" else tmp_path / name
    loaded = PeftModel.from_pretrained(build("bart"), folder, adapter_name=name).eval()
    loaded.load_adapter(folder, "other")
    loaded.set_adapter("other")
    set_task(loaded, "gqa")
    assert torch.equal(logits(loaded), expected)
    loaded.delete_adapter("other")
    loaded.set_adapter(name)
    assert torch.equal(logits(loaded), expected)


def test_names_that_weights_have_are_refused():
    for name in ("task_vqa", "up_sampler", "stacks"):
        with pytest.raises(ValueError, match=f"cannot be called '{name}'"):
            get_peft_model(build("bart"), CONFIGS["half"](), adapter_name=name)


@pytest.mark.parametrize("name", ONE_EACH)
def test_transformers_own_adapter_methods(tmp_path, name):
    needed = getattr(transformers.integrations.peft, "MIN_PEFT_VERSION", "0")
    if Version(peft.__version__) < Version(needed):
        pytest.skip(f"transformers {transformers.__version__} takes adapters of peft {needed} and later only")
    model = build("bart")
    expected = logits(model)
    model.add_adapter(CONFIGS[name](**RANDOM), adapter_name="x")
    set_task(model, "gqa")
    changed = logits(model)
    assert not torch.allclose(changed, expected)
    model.save_pretrained(tmp_path)
    fresh = build("bart")
    fresh.load_adapter(str(tmp_path), adapter_name="x")
    set_task(fresh, "gqa")
    assert torch.equal(logits(fresh.eval()), changed)
    fresh.disable_adapters()
    assert torch.equal(logits(fresh), expected)
    fresh.enable_adapters()
    fresh.delete_adapter("x")
    assert not [key for key in fresh.state_dict() if ".x." in key]


def test_injecting_alone():
    model = inject_adapter_in_model(CONFIGS["compacter"](**RANDOM), build("bart"))
    assert not torch.allclose(logits(model), logits(build("bart")))


def test_weights_that_do_not_fit_are_refused(tmp_path):
    model = adapted("bottleneck")
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    weights = {key: value.clone() for key, value in load_file(path).items()}
    key = next(key for key in weights if "down_sampler" in key)
    for changed, message in (
        ({**weights, key.replace("down_sampler", "gate"): weights[key].clone()}, "no place for"),
        ({**weights, key: weights[key] * float("nan")}, "NaN or infinite"),
    ):
        save_file(changed, path)
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(build("bart"), tmp_path)
    save_file({k: v for k, v in weights.items() if k != key}, path)
    with pytest.warns(UserWarning, match="lacks 1 weights of the adapter"):
        PeftModel.from_pretrained(build("bart"), tmp_path)


@pytest.mark.parametrize("name", ["half", "hyperformer"])
def test_a_checkpoint_of_other_tasks_is_refused_by_their_names(tmp_path, name):
    adapted(name).save_pretrained(tmp_path)
    for tasks, message in ((TASKS[:-1], "has weights of 'caption'"), ([*TASKS, "snli"], "lacks weights of 'snli'")):
        with pytest.raises(ValueError, match=f"tasks of the checkpoint differ .* {message}"):
            PeftModel.from_pretrained(build("bart"), tmp_path, config=CONFIGS[name](tasks=tasks))


# Tasks


@pytest.mark.parametrize("name", ["half", "compacter over tasks", "hyperformer"])
def test_a_task_must_be_chosen_and_known(name):
    model = get_peft_model(build("bart"), CONFIGS[name](**RANDOM))
    with pytest.raises(ValueError, match=r"set_task\(model, task\) with one of 'vqa', 'gqa', 'nlvr', 'caption'"):
        logits(model)
    with pytest.raises(ValueError, match="task 'snli' is unknown to this model, which has weights for: 'vqa'"):
        set_task(model, "snli")
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(build("bart")))
    outputs = []
    for task in TASKS:
        with set_task(model, task):
            outputs.append(logits(model))
    assert all(not torch.equal(one, two) for i, one in enumerate(outputs) for two in outputs[:i])
    assert {module.task for module in model.modules() if isinstance(module, TaskModule)} == {None}


def test_what_the_tasks_share_serves_all_of_them():
    model = get_peft_model(build("bart"), BottleneckConfig(r=4, tasks=TASKS, share="all", **RANDOM))
    expected = logits(model)
    set_task(model, "nlvr")
    assert torch.equal(logits(model), expected)
    with pytest.raises(ValueError, match="task 'snli' is unknown"):
        set_task(model, "snli")
    plain = get_peft_model(build("bart"), BottleneckConfig(r=4))
    set_task(plain, "whatever")


@pytest.mark.parametrize("name", ["half", "compacter over tasks", "hyperformer"])
def test_a_task_is_added_later(tmp_path, name):
    model = adapted(name, task="nlvr")
    expected = logits(model)
    before = trained(model)
    model.add_task("snli", like="nlvr") if name != "hyperformer" else model.add_task("snli")
    assert trained(model) > before
    set_task(model, "snli")
    if name == "hyperformer":
        assert not torch.equal(logits(model), expected)
        model.add_task("again", like="nlvr")
        set_task(model, "again")
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("bart"), tmp_path).eval()
    set_task(loaded, "snli"), set_task(model, "snli")
    assert torch.equal(logits(loaded), logits(model))
    for arguments, message in (
        (("snli",), "serves task 'snli' already"),
        (("a.b",), "'a.b'"),
    ):
        with pytest.raises(ValueError, match=message):
            model.add_task(*arguments)
    with pytest.raises(ValueError, match="'vizwiz', to begin with, is unknown"):
        model.add_task("other", like="vizwiz")
    with pytest.raises(ValueError, match="knows no tasks"):
        adapted("bottleneck").add_task("vqa")


@pytest.mark.parametrize(
    "config", [lambda: LoraConfig(r=2, init_lora_weights=False), lambda: CONFIGS["bottleneck"](**RANDOM)]
)
def test_adapters_named_after_tasks_are_switched_and_none_is_frozen(config):
    model = get_peft_model(build("bart"), config(), adapter_name="vqa")
    model.add_adapter("gqa", config())
    with pytest.warns(UserWarning, match=r"set_requires_grad\(\['gqa', 'vqa'\]\)"):
        set_task(model.train(), "gqa")
    model.base_model.set_requires_grad(["vqa", "gqa"])
    every = trained(model)
    model.eval()
    outputs = {}
    for task in ("vqa", "gqa"):
        set_task(model, task)
        assert trained(model) == every and model.active_adapter == task == model.base_model.active_adapter
        outputs[task] = logits(model)
    assert not torch.equal(*outputs.values())
    with set_task(model, "vqa"):
        assert torch.equal(logits(model), outputs["vqa"])
    assert torch.equal(logits(model), outputs["gqa"])
    model.set_adapter("vqa")
    assert torch.equal(logits(model), outputs["vqa"])
    with pytest.raises(ValueError, match="'nlvr' is unknown to this model, which has adapters for: 'gqa', 'vqa'"):
        set_task(model, "nlvr")
    single = get_peft_model(build("bart"), config())
    set_task(single, "vqa")  # one adapter serves every task
    assert single.active_adapter == "default"


def test_modules_saved_per_task_follow_the_task():
    model = get_peft_model(build("bart"), LoraConfig(r=2, modules_to_save=["lm_head"]), adapter_name="vqa").eval()
    model.add_adapter("gqa", LoraConfig(r=2, modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["gqa"].weight.zero_()
    set_task(model, "gqa")
    assert not logits(model).any()
    set_task(model, "vqa")
    assert logits(model).any()


# Several adapters


@pytest.mark.parametrize("name", ONE_EACH)
def test_several_adapters_are_added_switched_summed_mixed_and_deleted(name):
    model = adapted(name)
    first = logits(model)
    torch.manual_seed(7)
    model.add_adapter("b", CONFIGS[name](**RANDOM))
    before = trained(model)
    assert not any(".b." in key for key in before)
    model.eval().set_adapter("b")
    set_task(model, "gqa")
    second = logits(model)
    assert not torch.allclose(first, second)
    assert all(".b." in key for key in trained(model))
    mixed = logits(model, adapter_names=["default", "b", "__base__"])
    for row, expected in enumerate((first, second, logits(build("bart")))):
        torch.testing.assert_close(mixed[row], expected[row], rtol=0, atol=2e-6)
    model.base_model.set_adapter(["default", "b"])
    both = logits(model)
    model.set_adapter("default")
    assert torch.equal(logits(model), first) and not torch.allclose(both, first)
    with pytest.warns(UserWarning, match="default was active which is now deleted"):
        model.delete_adapter("default")
    assert torch.equal(logits(model), second)
    assert not [key for key in model.state_dict() if ".default." in key]


def test_mixed_batches_where_a_block_sees_the_tokens_of_all_rows_at_once():
    model = adapted("bottleneck", "opt")
    torch.manual_seed(7)
    model.add_adapter("b", CONFIGS["bottleneck"](**RANDOM))
    rows = {}
    for name in ("default", "b"):
        model.set_adapter(name)
        rows[name] = logits(model.eval(), "opt")
    mixed = logits(model, "opt", adapter_names=["b", "default", "b"])
    for row, name in enumerate(["b", "default", "b"]):
        torch.testing.assert_close(mixed[row], rows[name][row], rtol=0, atol=2e-6)


def test_active_together_they_add_up():
    layer = nn.Linear(6, 8)
    model = get_peft_model(nn.Sequential(layer), BottleneckConfig(r=4, target_modules=["0"], **RANDOM))
    model.add_adapter("b", BottleneckConfig(r=2, target_modules=["0"], norm_after=True, **RANDOM))
    x = torch.randn(2, 5, 6)
    shares = []
    for name in ("default", "b"):
        model.set_adapter(name)
        shares.append(model(x) - layer(x))
    model.base_model.set_adapter(["b", "default"])
    torch.testing.assert_close(model(x), layer(x) + sum(shares))


@pytest.mark.parametrize("name", ONE_EACH)
def test_unloading_gives_the_base_model_back_also_from_a_copy(name):
    expected = logits(build("bart"))
    model = adapted(name)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(logits(twin), logits(model))
    names = set(build("bart").state_dict())
    for each in (model, twin):
        plain = each.unload()
        assert torch.equal(logits(plain), expected) and set(plain.state_dict()) == names
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in plain.modules())
        assert not [module for module in plain.modules() if isinstance(module, BottleneckState)]


@pytest.mark.parametrize("name", ["bottleneck", "compacter", "hyperformer"])
def test_merging_is_refused_with_the_reason(name):
    model = adapted(name)
    expected = logits(model)
    for refused in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(NotImplementedError, match="activation is not linear"):
            refused()
    with pytest.raises(NotImplementedError, match="cannot be combined by adding their weights"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    assert torch.equal(logits(model), expected)


def test_an_adapter_that_fails_leaves_nothing_behind():
    base = build("bart")
    names = set(base.state_dict())
    with pytest.raises(ValueError, match="does not divide 6"):
        get_peft_model(base, CompacterConfig(r=6))
    with pytest.raises(ValueError):
        get_peft_model(base, HyperformerConfig(r=4, tasks=["a"], target_modules=["nowhere"]))
    assert not any("shared_over_layers" in name for name in base.state_dict()) and names


# Training


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["half", "hyperformer", "efficient"])
def test_checkpointed_blocks_are_recomputed_for_the_task_they_were_computed_for(name, reentrant):
    per_setting = []
    for checkpointed in (False, True):
        model = adapted(name)
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        loss = 0
        for task in ("vqa", "nlvr"):
            with set_task(model, task):
                loss = loss + model(**inputs_of("bart")).logits.square().mean() * (1 + (task == "vqa"))
        set_task(model, "caption")
        per_setting.append(gradients(model, loss))
        assert {module.task for module in model.modules() if isinstance(module, TaskModule)} == {"caption"}
    plain, checkpointed = per_setting
    assert set(plain) == set(checkpointed)
    for key, gradient in plain.items():
        torch.testing.assert_close(checkpointed[key], gradient, rtol=1e-4, atol=1e-6)
    assert not [key for key in plain if "task_gqa" in key or "task_caption" in key]


PER_TASK = {
    "lora": lambda: LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False),
    "lora and a head": lambda: LoraConfig(
        r=2, target_modules=["v_proj"], init_lora_weights=False, modules_to_save=["fc2"]
    ),
    "bottleneck": lambda: BottleneckConfig(**RANDOM),
}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("config", PER_TASK)
def test_checkpointed_blocks_are_recomputed_with_the_adapter_of_their_task(config, reentrant):
    torch.manual_seed(1)
    model = get_peft_model(build("bart", dropout=0.0), PER_TASK[config](), adapter_name="vqa").train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    set_task(model, "vqa")
    model(**inputs_of("bart")).logits.mean().backward()  # a step before the adapter of the second task is there
    model.add_adapter("gqa", PER_TASK[config]())
    model.base_model.set_requires_grad(["vqa", "gqa"])
    found = []
    for checkpointed in (True, False):
        if not checkpointed:
            model.gradient_checkpointing_disable()
        losses = []
        for task in ("vqa", "gqa"):
            set_task(model, task)
            losses.append(model(**inputs_of("bart")).logits.square().mean() * (1 + (task == "gqa")))
        found.append(gradients(model, sum(losses)))
        assert model.active_adapter == "gqa"
        assert all(layer.active_adapters == ["gqa"] for layer in model.modules() if isinstance(layer, BaseTunerLayer))
    assert {name for key in found[1] for name in ("vqa", "gqa") if f".{name}." in key} == {"vqa", "gqa"}
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[1].items():
        torch.testing.assert_close(found[0][key], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["half", "compacter over tasks", "hyperformer", "lora"])
def test_a_stack_that_is_called_by_itself_is_recomputed_for_its_task(name, reentrant):
    inputs = {key: value for key, value in inputs_of("bart").items() if not key.startswith("decoder")}
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        config = PER_TASK["lora"]() if name == "lora" else CONFIGS[name](**RANDOM)
        model = get_peft_model(build("bart", dropout=0.0), config, adapter_name="vqa" if name == "lora" else "default")
        if name == "lora":
            model.add_adapter("nlvr", PER_TASK["lora"]())
            model.base_model.set_requires_grad(["vqa", "nlvr"])
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        set_task(model.train(), "vqa")
        loss = model.get_base_model().get_encoder()(**inputs).last_hidden_state.square().mean()
        set_task(model, "nlvr")
        found.append(gradients(model, loss))
    plain, checkpointed = found
    assert plain.keys() == checkpointed.keys() and not [key for key in plain if "nlvr" in key]
    for key, gradient in plain.items():
        torch.testing.assert_close(checkpointed[key], gradient, rtol=1e-4, atol=1e-6)


def test_what_a_block_was_computed_with_is_forgotten_with_the_adapters():
    model = adapted("bottleneck")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()(**inputs_of("bart")).logits.mean().backward()
    base = model.unload()
    wrapped = [m for m in base.modules() if isinstance(vars(m).get("_gradient_checkpointing_func"), ScopedCheckpoint)]
    assert not wrapped and not base._forward_pre_hooks


@pytest.mark.parametrize("name", ["normed", "half", "compacter", "efficient"])
def test_bfloat16_and_autocast(name):
    model = get_peft_model(build("bart").bfloat16(), CONFIGS[name](**RANDOM)).eval()
    set_task(model, "vqa")
    assert {p.dtype for n, p in model.named_parameters() if p.requires_grad} == {torch.float32}
    low = logits(model)
    assert low.dtype == torch.bfloat16 and low.isfinite().all()
    whole = get_peft_model(build("bart").bfloat16(), CONFIGS[name](**RANDOM), autocast_adapter_dtype=False).eval()
    set_task(whole, "vqa")
    assert {p.dtype for p in whole.parameters()} == {torch.bfloat16}
    assert logits(whole).isfinite().all()
    model = adapted(name)
    expected = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(**inputs_of("bart")).logits.float().square().mean().backward()
        assert (logits(model).float() - expected).norm() < 0.1 * expected.norm()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["half", "hyperformer"])
def test_a_compiled_model_serves_one_task_after_the_other(name):
    torch._dynamo.reset()
    torch.manual_seed(1)
    model = get_peft_model(build("llama", num_hidden_layers=1), CONFIGS[name](**RANDOM)).eval()
    compiled = torch.compile(model, backend="aot_eager")
    for task in ("vqa", "nlvr"):
        set_task(compiled, task)
        expected = model(**inputs_of("llama")).logits
        result = compiled(**inputs_of("llama")).logits
        torch.testing.assert_close(result, expected, rtol=0, atol=2e-5)
        ours = gradients(model, result.square().mean())
        theirs = gradients(model, expected.square().mean())
        assert set(ours) == set(theirs)
        for key, gradient in theirs.items():
            torch.testing.assert_close(ours[key], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", [*CONFIGS, "low rank compacter"])
def test_weights_that_are_offloaded_are_there_when_they_are_needed(name):
    settings = {"factorized_rank": 1, "shared_rule": "model"} if name == "low rank compacter" else {}
    model = adapted(name.removeprefix("low rank ") if settings else name, **settings)
    expected = logits(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    torch.testing.assert_close(logits(model), expected)


def test_generated_weights_go_to_the_device_of_the_layer():
    weights = Generated(*[(torch.ones(2, 2), torch.ones(2))] * 3, None)
    moved = weights.on(torch.device("meta"))
    assert all(tensor.is_meta for pair in moved[:3] for tensor in pair) and moved.norm_after is None
    assert weights.on(torch.device("cpu")) is weights


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one():
    """DDP with and without a search for unused parameters, accumulation, tasks by process; FSDP1 and FSDP2."""
    script = Path(__file__).with_name("distributed_tasks.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", ONE_EACH)
def test_generation_with_a_cache_equals_generation_without(name):
    model = adapted(name)
    inputs = inputs_of("bart")
    settings = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "max_new_tokens": 6}
    expected = model.generate(**settings, use_cache=False)
    assert torch.equal(model.generate(**settings), expected)
    assert torch.equal(
        model.generate(**settings, num_beams=2), model.generate(**settings, num_beams=2, use_cache=False)
    )


# Refusals


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: BottleneckConfig(r=0), "`r` should be a positive integer, got 0"),
        (lambda: BottleneckConfig(r=2.5), "`r` should be a positive integer, got 2.5"),
        (lambda: BottleneckConfig(reduction_factor=-1), "`reduction_factor` should be a positive integer, got -1"),
        (lambda: BottleneckConfig(activation="gelu_old"), "`activation` should be one of .*, got 'gelu_old'"),
        (lambda: BottleneckConfig(dropout=1.0), r"`dropout` is a probability in \[0, 1\), got 1.0"),
        (lambda: BottleneckConfig(norm_before="yes"), "norm_before='yes' is neither True nor False"),
        (lambda: BottleneckConfig(init_weights="paper"), "`init_weights` is True, False or 'original', got 'paper'"),
        (lambda: BottleneckConfig(tasks=[]), "`tasks` is empty"),
        (lambda: BottleneckConfig(tasks="vqa"), "tasks='vqa' is not a list of names"),
        (lambda: BottleneckConfig(tasks=["a", "a"]), "`tasks` contains 'a' twice"),
        (lambda: BottleneckConfig(tasks=["a.b"]), "`tasks` contains 'a.b'"),
        (lambda: BottleneckConfig(share="down"), "share='down' says what tasks share; name them in `tasks`"),
        (lambda: BottleneckConfig(tasks=["a"], share="half"), "`share` should be one of .*, got 'half'"),
        (lambda: BottleneckConfig(low_rank=0), "`low_rank` should be a positive integer, got 0"),
        (lambda: CompacterConfig(phm_dim=0), "`phm_dim` should be a positive integer, got 0"),
        (
            lambda: CompacterConfig(shared_rule="layer"),
            "`shared_rule` should be 'model', 'tasks' or None, got 'layer'",
        ),
        (lambda: CompacterConfig(shared_rule="tasks"), "shared_rule='tasks' says .*; name them in `tasks`"),
        (lambda: CompacterConfig(low_rank=1), "Compacter has `factorized_rank`"),
        (lambda: HyperformerConfig(), "Hyperformer generates the weights of tasks; name them in `tasks`"),
        (lambda: HyperformerConfig(tasks=["a"], share="all"), "`share` is of the bottleneck adapter"),
        (lambda: HyperformerConfig(tasks=["a"], hidden_dim=0), "`hidden_dim` should be a positive integer, got 0"),
    ],
)
def test_invalid_settings(config, message):
    with pytest.raises(ValueError, match=message) as error:
        config()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BottleneckConfig(r=17), "r=17 is not a bottleneck of 'model.encoder.layers.0.self_attn.out_proj'.* width 16"),
        (
            BottleneckConfig(reduction_factor=32),
            "reduction_factor=32 leaves no bottleneck of 'model.encoder.*width 16",
        ),
        (CompacterConfig(r=4, phm_dim=3), "phm_dim=3 does not divide 16, the width of the output of 'model.enc"),
        (CompacterConfig(r=6), "phm_dim=4 does not divide 6, the width of the bottleneck of 'model.encoder"),
        (BottleneckConfig(r=4, target_modules=["embed_tokens"]), "Target module .* is not supported"),
    ],
)
def test_widths_that_do_not_fit_the_model(config, message):
    with pytest.raises(ValueError, match=message) as error:
        get_peft_model(build("bart"), copy.deepcopy(config))
    assert "\n" not in str(error.value)


def test_one_generator_makes_one_size():
    config = HyperformerConfig(tasks=["a"], target_modules=["0", "1"], reduction_factor=2, shared_generator=True)
    with pytest.raises(ValueError, match=re.escape("would have (d, r) = (4, 2), (8, 4)")):
        get_peft_model(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), config)
