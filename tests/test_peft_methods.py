"""What every tuner of this package keeps to: refusals leave nothing behind, rows meet their adapter, models move."""

import copy
import json
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft.helpers import disable_input_dtype_casting
from safetensors.torch import load_file, save_file
from tiny_models import build, padded_batch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import BertForSequenceClassification

from peft_read import BottleneckConfig, CompacterConfig, HyperformerConfig, READConfig, set_task
from peft_read.adapter.layer import Linear, READLayer
from peft_read.bottleneck.layer import Bottleneck, BottleneckLayer
from peft_read.peft_methods.undo import Before

METHODS = {
    "read": lambda **s: READConfig(**{"r": 2, "init_weights": False, **s}),
    "bottleneck": lambda **s: BottleneckConfig(**{"r": 2, "init_weights": False, **s}),
    "compacter": lambda **s: CompacterConfig(**{"r": 4, "phm_dim": 2, "init_weights": False, **s}),
    "hyperformer": lambda **s: HyperformerConfig(**{"r": 2, "tasks": ["a"], "init_weights": False, **s}),
}
FAMILY = ["bottleneck", "compacter", "hyperformer"]


def encoder(*, batch_first=True):
    """torch's own, of two layers of width 8."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first, dropout=0.0)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first).eval()


def adapted(method, base=None, **settings):
    """A model whose adapter is not the identity."""
    torch.manual_seed(1)
    settings = {"target_modules": ["linear2"], **settings}
    return get_peft_model(encoder() if base is None else base, METHODS[method](**settings)).eval()


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# torch's own encoder


@pytest.mark.parametrize("method", METHODS)
def test_adapters_in_torchs_own_encoder_serve_evaluation_too(method):
    model = adapted(method)
    x = torch.randn(3, 5, 8)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [2]])  # on the right, which the encoder makes nested
    for settings in ({}, {"src_key_padding_mask": padding}):
        expected = model(x, **settings)
        with torch.no_grad():
            result = model(x, **settings)
            with model.disable_adapter():
                base = model(x, **settings)
        torch.testing.assert_close(result[~padding], expected[~padding], rtol=0, atol=1e-6)
        assert (result - base)[~padding].abs().max() > 1e-3
    plain = pickle.loads(pickle.dumps(model)).unload()
    assert plain.use_nested_tensor
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in plain.modules())


# Refusals


@pytest.mark.parametrize(
    ("base", "refused", "right"),
    [
        (
            lambda: build("bart"),
            lambda: READConfig(r=2, bidirectional=True),
            lambda: READConfig(r=2, target_modules=r".*decoder\..*fc2"),
        ),
        (
            lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(6, 4)),
            lambda: METHODS["compacter"](phm_dim=4, target_modules=["0", "1"], modules_to_save=["2"]),
            lambda: METHODS["compacter"](target_modules=["1"]),
        ),
        (
            lambda: nn.Sequential(nn.Linear(8, 8), nn.Embedding(5, 6), nn.Linear(6, 4)),
            lambda: METHODS["hyperformer"](target_modules=["0", "1"]),
            lambda: METHODS["hyperformer"](target_modules=["2"]),
        ),
    ],
)
def test_a_refused_configuration_leaves_the_model_as_it_was(base, refused, right):
    model = base()
    names, whole, hooks = set(model.state_dict()), trained(model), len(model._load_state_dict_pre_hooks)
    with pytest.raises(ValueError):
        get_peft_model(model, refused())
    assert set(model.state_dict()) == names and trained(model) == whole
    assert len(model._load_state_dict_pre_hooks) == hooks
    assert not hasattr(model, "peft_config")
    again, expected = get_peft_model(model, right()), get_peft_model(base(), right())
    assert trained(again) == trained(expected) and set(again.state_dict()) == set(expected.state_dict())

    before = set(again.state_dict()), trained(again)
    with pytest.raises(ValueError):
        again.add_adapter("b", refused())
    assert (set(again.state_dict()), trained(again)) == before and set(again.peft_config) == {"default"}
    again.add_adapter("b", right())
    expected.add_adapter("b", right())
    assert trained(again) == trained(expected) and set(again.state_dict()) == set(expected.state_dict())


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.parametrize("second", FAMILY)
@pytest.mark.parametrize("first", FAMILY)
def test_a_second_method_of_the_family_is_refused_and_changes_nothing(first, second):
    if first == second:
        return
    model = adapted(first)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    whole, message = trained(model), f"has adapters of {first.title()} already, and {second.title()} cannot be added"
    for name in ("default", "further"):
        config = METHODS[second](target_modules=["linear1"] if name == "further" else ["linear2"])
        with pytest.raises(ValueError, match=rf"{message}.*`unload\(\)`"):
            get_peft_model(model, config, adapter_name=name)
        with pytest.raises(ValueError, match=message):
            inject_adapter_in_model(config, model.get_base_model(), adapter_name=name)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert trained(model) == whole
    assert {name: config.peft_type for name, config in model.peft_config.items()} == {"default": first.upper()}
    get_peft_model(model.unload(), METHODS[second](target_modules=["linear2"]))


def test_what_is_put_back_includes_containers_hooks_and_what_is_trained():
    model = nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"a": nn.Linear(2, 2)}))
    model.notes, model.names = {"a": 1}, ["a"]
    handle = model[0].register_forward_hook(lambda *_: None)
    before = Before(model)
    model[1]["b"] = nn.Linear(2, 2)
    model.notes["b"], model.other = 2, 3
    model.names.append("b")
    model[0].register_forward_hook(lambda *_: None)
    model[0].weight.requires_grad_(False)
    model[0] = nn.Identity()
    before.restore()
    assert list(model[1]) == ["a"] and isinstance(model[0], nn.Linear) and model[0].weight.requires_grad
    assert model.notes == {"a": 1} and model.names == ["a"] and not hasattr(model, "other")
    handle.remove()
    assert not model[0]._forward_hooks


def changed(folder, change=lambda weights: None, **settings):
    """A saved adapter, with other weights or another configuration."""
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    weights = load_file(file)
    change(weights)
    save_file(weights, file)
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
    return str(folder)


def widen(weights):
    key = sorted(weights)[-1]
    weights[key] = torch.cat([weights[key]] * 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.update({"extra.weight": torch.ones(1)}), "no place for, such as 'extra.weight'"),
        (lambda weights: weights.update({"base_model.model.extra": torch.ones(1)}), "no place for"),
        (widen, "does not fit .size mismatch for base_model.model.*it has the shape"),
    ],
)
@pytest.mark.parametrize("method", ["read", "hyperformer"])
def test_a_file_that_does_not_fit_changes_no_adapter(tmp_path, method, change, message):
    model, other = adapted(method), adapted(method)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name in trained(other):
                parameter.add_(1)
    other.save_pretrained(tmp_path)
    changed(tmp_path, change)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for name in ("default", "x"):
        with pytest.raises(ValueError, match=message):
            model.load_adapter(str(tmp_path), name)
        after = model.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert set(model.peft_config) == {"default"} and model.active_adapter == "default"


def test_after_a_refused_file_the_right_one_is_loaded_with_its_own_configuration(tmp_path):
    for name in ("wrong", "right"):
        adapted("read", cell="gru").save_pretrained(tmp_path / name)
    wrong = changed(tmp_path / "wrong", cell="none")
    model, base = adapted("read"), encoder()
    with pytest.raises(ValueError, match="no place for"):
        model.load_adapter(wrong, "x")
    model.load_adapter(str(tmp_path / "right"), "x")
    assert model.peft_config["x"].cell == "gru"

    names = set(base.state_dict())
    with pytest.raises(ValueError, match="no place for"):
        PeftModel.from_pretrained(base, wrong)
    assert set(base.state_dict()) == names == trained(base) and not hasattr(base, "peft_config")
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in base.modules())
    assert not base._load_state_dict_pre_hooks


# Wrapped models

WRAPPERS = {
    "checkpointed": checkpoint_wrapper,
    "compiled": lambda block: torch.compile(block, backend="eager"),
}


def wrapped(model, kind):
    """The same model, each of whose blocks is inside a wrapper."""
    blocks = model.get_base_model().layers
    for index, block in enumerate(blocks):
        blocks[index] = WRAPPERS[kind](block)
    return model


@pytest.mark.parametrize("kind", WRAPPERS)
@pytest.mark.parametrize("method", METHODS)
def test_wrapped_blocks_are_saved_and_loaded_like_unwrapped_ones(tmp_path, method, kind):
    plain = adapted(method)
    plain.save_pretrained(tmp_path / "plain")
    wrapped(adapted(method), kind).save_pretrained(tmp_path / "wrapped")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "wrapped")]
    assert files[0].keys() == files[1].keys() and len(files[0]) == len(get_peft_model_state_dict(plain)) > 2
    assert all(torch.equal(weight, files[1][key]) for key, weight in files[0].items())
    torch.manual_seed(2)
    other = wrapped(get_peft_model(encoder(), METHODS[method](target_modules=["linear2"])), kind)
    assert not torch.equal(next(p for p in other.parameters() if p.requires_grad), next(iter(files[0].values())))
    other.load_adapter(tmp_path / "plain", "default")
    other.load_adapter(tmp_path / "plain", "second", low_cpu_mem_usage=True)
    for name in ("default", "second"):
        loaded = get_peft_model_state_dict(other, adapter_name=name)
        assert loaded.keys() == files[0].keys()
        assert all(torch.equal(weight, loaded[key]) for key, weight in files[0].items())


def test_names_that_a_compiled_block_had_in_older_files_are_known(tmp_path):
    adapted("bottleneck").save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({key.replace("layers.0.", "layers.0._orig_mod."): weight for key, weight in weights.items()}, file)
    loaded = get_peft_model_state_dict(PeftModel.from_pretrained(encoder(), tmp_path))
    assert loaded.keys() == weights.keys() and all(torch.equal(loaded[key], weights[key]) for key in weights)


@pytest.mark.parametrize("method", METHODS)
def test_weights_among_which_none_is_of_the_adapter_are_not_saved_as_nothing(tmp_path, method):
    model = adapted(method)
    with pytest.raises(ValueError, match=r"none of the 1 weights, such as 'elsewhere\.weight', is one of the adapter"):
        model.save_pretrained(tmp_path, state_dict={"elsewhere.weight": torch.zeros(1)})
    assert get_peft_model_state_dict(model, state_dict={}) == {}


# Mixed batches


def rows_apart(model, x, dim):
    """The outputs of two adapters."""
    outputs = {}
    for name in ("default", "b"):
        model.set_adapter(name)
        outputs[name] = model(x)
    return [outputs[name].select(dim, row) for row, name in enumerate(["b", "default", "b"])]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_rows_meet_their_adapter_in_both_layouts(method, batch_first):
    model = adapted(method, encoder(batch_first=batch_first))
    torch.manual_seed(7)
    model.add_adapter("b", METHODS[method](target_modules=["linear2"]))
    model.eval()
    x = torch.randn(3, 3, 8)  # as many tokens as rows: the shape does not tell
    with torch.no_grad():
        expected = rows_apart(model, x, 0 if batch_first else 1)
        mixed = model(x, adapter_names=["b", "default", "b"])
    for row, output in enumerate(expected):
        torch.testing.assert_close(mixed.select(0 if batch_first else 1, row), output, rtol=0, atol=1e-5)


class Blocks(nn.Module):
    """Blocks that are given vectors (N, d)."""

    def __init__(self, name="fc"):
        super().__init__()
        block = nn.ModuleDict({name: nn.Linear(8, 8)})
        block.forward = lambda hidden_states: block[name](hidden_states)
        self.layers = nn.ModuleList([block])
        self.head = nn.Linear(8, 8)

    def forward(self, hidden_states, count=None):
        for block in self.layers:
            hidden_states = block.forward(hidden_states)
        return self.head(hidden_states)


class Tower(Blocks):
    """Of packed images."""

    def forward(self, hidden_states, grid_thw):
        return super().forward(hidden_states)


class Block(nn.Module):
    """Folds its rows before the last layer, and may leave some out."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, hidden_states, first=None):
        return self.fc(hidden_states.flatten(0, -2)[:first])


class Folding(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block()])

    def forward(self, hidden_states, first=None):
        return self.layers[0](hidden_states=hidden_states, first=first)


def two_bottlenecks(base, target="fc"):
    model = adapted("bottleneck", base, target_modules=[target])
    torch.manual_seed(7)
    model.add_adapter("b", METHODS["bottleneck"](target_modules=[target]))
    return model.eval()


def test_vectors_are_served_where_the_block_tells_their_rows_and_refused_elsewhere():
    model = two_bottlenecks(Folding())
    x = torch.randn(2, 4, 8)
    outputs = {}
    for name in ("default", "b"):
        model.set_adapter(name)
        outputs[name] = model(x).view(2, 4, 8)
    mixed = model(x, adapter_names=["b", "default"]).view(2, 4, 8)
    torch.testing.assert_close(mixed[0], outputs["b"][0])
    torch.testing.assert_close(mixed[1], outputs["default"][1])
    with pytest.raises(ValueError, match=r"shape \(6, 8\) for a batch of 2 rows.*given \(2, 4, 8\).*exclude_modules"):
        model(x, first=6, adapter_names=["b", "default"])
    with pytest.raises(ValueError, match=r"shape \(10, 8\) for a batch of 2 rows.*given \(10, 8\)"):
        model(torch.randn(10, 8), adapter_names=["b", "default"])  # images of 2 and 8 patches, in one row
    pooled = model(torch.randn(2, 8), adapter_names=["b", "default"])
    assert pooled.shape == (2, 8)


def test_packed_images_and_routed_tokens_are_refused_whatever_their_number():
    tower = two_bottlenecks(Tower(), "head")
    with pytest.raises(ValueError, match="tokens of all images stand there one after the other"):
        tower(torch.randn(2, 8), torch.ones(2, 3), adapter_names=["b", "default"])
    routed = two_bottlenecks(nn.ModuleDict({"experts": Blocks("fc")}), "fc")
    expert = routed.base_model.model["experts"]
    routed.base_model.model.forward = lambda x: expert(x)
    with pytest.raises(ValueError, match="a router chose the tokens of an expert"):
        routed(torch.randn(2, 8), adapter_names=["b", "default"])


class Named(nn.Module):
    """Calls its head by keyword."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(input=self.body(x))


@pytest.mark.parametrize("method", ["read", "bottleneck"])
def test_a_module_trained_as_a_whole_is_chosen_by_row_when_it_is_called_by_keyword(method):
    settings = {"target_modules": ["body"], "modules_to_save": ["head"]}
    model = adapted(method, Named(), **settings)
    model.add_adapter("b", METHODS[method](**settings))
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["b"].weight.mul_(-2)
    model.eval()
    x = torch.randn(2, 3, 8)
    outputs = {}
    for name in ("default", "b"):
        model.set_adapter(name)
        outputs[name] = model(x)
    mixed = model(x, adapter_names=["b", "default"])
    torch.testing.assert_close(mixed[0], outputs["b"][0], rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed[1], outputs["default"][1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["read", "bottleneck"])
def test_beams_of_the_models_own_generation_configuration(method):
    torch.manual_seed(1)
    model = get_peft_model(build("llama"), METHODS[method]()).eval()
    model.add_adapter("b", METHODS[method]())
    model.eval()
    model.generation_config.num_beams, model.generation_config.eos_token_id = 2, None
    ids, mask = padded_batch("llama")
    settings = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 3, "do_sample": False}
    model.set_adapter("b")
    expected = model.generate(**settings)
    mixed = model.generate(**settings, adapter_names=["b", "default", "b"])
    assert torch.equal(mixed[[0, 2]], expected[[0, 2]])
    with torch.no_grad(), pytest.raises(ValueError, match="same as the number of inputs, but got 3 and 6"):
        model(input_ids=torch.cat([ids, ids]), adapter_names=["b", "default", "b"])


# All linear layers


@pytest.mark.parametrize("method", FAMILY)
def test_all_linear_names_what_peft_names_also_where_adapters_are(method):
    everything = METHODS[method](target_modules="all-linear")
    for base in (build("bart"), build("gpt2"), BertForSequenceClassification(build("bert").config)):
        task_type = "SEQ_CLS" if isinstance(base, BertForSequenceClassification) else None
        lora = LoraConfig(target_modules="all-linear", task_type=task_type)
        expected = get_peft_model(copy.deepcopy(base), lora).base_model.targeted_module_names
        config = METHODS[method](target_modules="all-linear", task_type=task_type)
        assert get_peft_model(base, config).base_model.targeted_module_names == expected
    model = get_peft_model(build("bart"), METHODS[method]())
    model.add_adapter("second", everything)
    paths = [layer.path for layer in model.modules() if isinstance(layer, BottleneckLayer) and "second" in layer.parts]
    assert len(paths) == 2 * 6 + 2 * 10 and "lm_head" not in paths


@pytest.mark.parametrize("method", METHODS)
def test_a_model_without_linear_layers_has_none_of_all_linear(method):
    with pytest.raises(
        ValueError, match="`target_modules` is 'all-linear', and Sequential has no linear layer beside"
    ):
        get_peft_model(nn.Sequential(nn.Conv1d(3, 3, 1)), METHODS[method](target_modules="all-linear"))


# Adding and deleting


def test_hyperformer_begins_again_after_its_last_adapter_is_deleted(tmp_path):
    model = adapted("hyperformer")
    model.save_pretrained(tmp_path)
    x = torch.randn(2, 5, 8)
    expected = model(x)
    model.delete_adapter("default")
    base = model.base_model.model(x)  # peft's own wrapper has no forward pass without an adapter
    model.add_adapter("b", METHODS["hyperformer"](target_modules=["linear2"]))
    model.set_adapter("b")
    assert not torch.allclose(model.eval()(x), base)
    model.delete_adapter("b")
    model.load_adapter(str(tmp_path), "c")
    model.set_adapter("c")
    torch.testing.assert_close(model.eval()(x), expected)


@pytest.mark.parametrize("settings", [{"method": "compacter", "shared_rule": "model"}, {"method": "hyperformer"}])
def test_a_further_adapter_has_the_dtype_that_the_model_has_by_now(settings):
    method = METHODS[settings["method"]]
    own = {**{name: value for name, value in settings.items() if name != "method"}, "target_modules": ["linear2"]}
    model = get_peft_model(encoder(), method(**own)).double().eval()
    model.add_adapter("b", method(**own))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    model.set_adapter("b")
    assert model(torch.randn(2, 5, 8, dtype=torch.float64)).isfinite().all()


class Cast(nn.Module):
    def forward(self, x):
        return x.float()


@pytest.mark.parametrize("method", METHODS)
def test_peft_can_turn_the_casting_of_inputs_off(method):
    model = adapted(method)  # float32 throughout: there is nothing to cast
    x, low = torch.randn(2, 5, 8), torch.randn(3, dtype=torch.bfloat16)
    layer = next(module for module in model.modules() if isinstance(module, BottleneckLayer | READLayer))
    expected = model(x)
    with disable_input_dtype_casting(model):
        assert layer._cast_input_dtype(low, torch.float32).dtype == torch.bfloat16
        torch.testing.assert_close(model(x), expected)
    assert layer._cast_input_dtype(low, torch.float32).dtype == torch.float32


def test_one_rule_for_layers_of_several_dtypes():
    base = nn.Sequential(nn.Linear(8, 8).double(), Cast(), nn.Linear(8, 8))
    config = METHODS["compacter"](target_modules=["0", "2"], shared_rule="model")
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    model(torch.randn(2, 3, 8, dtype=torch.float64)).sum().backward()
    assert model.base_model.model.shared_over_layers.parts["default"].rule.weight.grad is not None


def test_a_further_adapter_of_a_mixture_of_experts_goes_where_its_experts_are():
    experts = nn.Sequential(nn.Linear(8, 8)).to("meta")
    config = BottleneckConfig(r=2)
    layers = [Linear(experts, "a", r=2, cell="rnn", config=READConfig(), width=8), BottleneckLayer(experts, width=8)]
    layers[1].update_layer("a", Bottleneck(8, 2, config), r=2, inference_mode=False)
    for layer in layers:
        assert all(parameter.is_meta for parameter in layer.parameters())


def test_a_second_adapter_of_read_of_another_layout_is_refused():
    base = nn.Sequential(nn.Linear(8, 8))
    model = get_peft_model(base, READConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match=r"'0' takes .*\(B, T, d\) since .*batch_first=False, \(T, B, d\).*unload"):
        model.add_adapter("b", READConfig(r=2, target_modules=["0"], batch_first=False))
    model.add_adapter("b", READConfig(r=2, target_modules=["0"]))
    assert set(model.peft_config) == {"default", "b"}


@pytest.mark.parametrize("method", ["bottleneck", "hyperformer"])
def test_a_task_is_added_to_one_adapter_of_one_model_only(method):
    settings = {"share": "down"} if method == "bottleneck" else {}
    config = METHODS[method](tasks=["a"], target_modules=["linear2"], **settings)
    model, other = get_peft_model(encoder(), config), get_peft_model(encoder(), config)
    model.add_adapter("b", config)
    model.add_task("c", adapter_name="default")
    assert model.peft_config["default"].tasks == ["a", "c"]
    assert model.peft_config["b"].tasks == other.peft_config["default"].tasks == ["a"]
    set_task(model, "c")
    x = torch.randn(2, 5, 8)
    assert model(x).isfinite().all()
    with pytest.raises(ValueError, match="task 'c' is unknown"):
        set_task(other, "c")
    model.set_adapter("b")
    with pytest.raises(ValueError, match="task 'c' is unknown to this adapter, which has weights for: 'a'"):
        model(x)
    model.add_task("c", adapter_name="b")
    assert model(x).isfinite().all()


def test_a_cell_for_no_module_is_warned_of():
    with pytest.warns(RuntimeWarning, match=r"cell_pattern keys did not match any targeted module.*\['layers.7'\]"):
        adapted("read", cell_pattern={"layers.7": "none", r"layers\.0\.linear2": "gru"})


def test_passes_that_never_go_backward_leave_one_set_of_hooks():
    model = adapted("read").train()
    layer = next(module for module in model.modules() if isinstance(module, READLayer))
    weight = layer.readapter_up["default"].weight
    x = torch.randn(2, 5, 8)
    for _ in range(5):
        model(x)
    assert len(weight._post_accumulate_grad_hooks) == 1
    copy.deepcopy(model.base_model.model._forward_hooks)
    model(x).sum().backward()
    assert not weight._post_accumulate_grad_hooks
    model(x)
    model.unload()
    assert not weight._post_accumulate_grad_hooks
