"""What READ refuses instead of taking it for something else: settings, checkpoints that do not fit, foreign cards."""

import dataclasses
import json
import re
import types

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import build
from torch import nn

from peft_read import CompacterConfig, READConfig
from peft_read.names import own_names
from peft_read.peft_methods.unmatched import absent_names, nothing_matched


class Net(nn.Module):
    def __init__(self, blocks=2, config=None):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(blocks)])
        if config is not None:
            self.config = config

    def forward(self, x, attention_mask=None):
        for layer in self.layers:
            x = layer(x)
        return x


def adapted(blocks=2, **settings):
    settings = {"target_modules": r"layers\.\d", "r": 2, "init_weights": False, **settings}
    return get_peft_model(Net(blocks), READConfig(**settings))


def test_numbers_of_numpy_and_torch_are_converted():
    config = READConfig(
        r=np.int64(4),
        dropout=np.float32(0.5),
        use_bias=np.bool_(False),
        target_modules=("fc2",),
        layers_to_transform=np.arange(2),
        layers_pattern="layers",
        rank_pattern={"fc2": torch.tensor(2)},
    )
    assert (config.r, config.dropout, config.use_bias) == (4, 0.5, False)
    assert (config.target_modules, config.layers_to_transform, config.rank_pattern) == ({"fc2"}, [0, 1], {"fc2": 2})
    json.dumps({name: list(v) if isinstance(v, set) else v for name, v in config.to_dict().items()})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_bias": "no"}, "use_bias='no' is neither"),
        ({"bidirectional": 0}, "bidirectional=0"),
        ({"batch_first": None}, "batch_first=None"),
        ({"init_weights": 0}, "`init_weights` is True, False or 'paper', got 0"),
        ({"init_weights": "PAPER"}, "got 'PAPER'"),
        ({"r": "4"}, "`r` should be a positive integer, got '4'"),
        ({"r": 4.0}, "got 4.0"),
        ({"r": True}, "got True"),
        ({"dropout": float("nan")}, "dropout=nan is not finite"),
        ({"dropout": "0.1"}, "dropout='0.1' is not a number"),
        ({"dropout": 1}, r"\[0, 1\)"),
        ({"cell": ["rnn"]}, "`cell` should be one of"),
        ({"cell_pattern": {"fc2": 3}}, r"cell_pattern\['fc2'\]"),
        ({"cell_pattern": "none"}, "maps names of modules"),
        ({"rank_pattern": [2]}, "maps names of modules"),
        ({"rank_pattern": {"(": 2}}, "not a regular expression"),
        ({"target_modules": []}, "is empty"),
        ({"target_modules": [1]}, "contains 1"),
        ({"target_modules": "("}, "not a regular expression"),
        ({"exclude_modules": 3}, "exclude_modules=3 is not a list"),
        ({"modules_to_save": "head"}, "modules_to_save='head' is not a list of names"),
        ({"layers_to_transform": "0"}, "layers_to_transform='0' is not an integer"),
        ({"layers_to_transform": [0.5]}, r"layers_to_transform\[0\]=0.5"),
        ({"layers_to_transform": [-1]}, "counts layers from 0"),
        ({"pvla": {"mass": np.float32(0.5)}}, r"pvla\['mass'\]"),
        ({"pvla": 3}, "`pvla` is the record"),
    ],
)
def test_invalid_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        READConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target_modules": ["fcc2"]},
            r"names 'fcc2', and BartFor.* Near names: 'fc2'\. .*'language', .*'all-linear'",
        ),
        ({"target_modules": ["mlp.fc2"]}, r"Near names: 'model\.encoder\.layers\.0\.fc2', 'model\.decoder"),
        ({"target_modules": ["zzz"]}, r"Its linear layers are 'model\.encoder\.layers\.\*\.self_attn\.k_proj'"),
        ({"target_modules": ["all-linear"]}, r"As a string, .*: target_modules='all-linear'$"),
        ({"target_modules": "visoin"}, "='visoin' is a string, so a regular expression .* Near names: 'vision'"),
        ({"target_modules": r".*\.fcc2"}, "Near names: 'fc2'"),
        ({"target_modules": "fc2"}, r"whose names end so: target_modules=\['fc2'\]$"),
        ({"target_modules": ["fc2"], "exclude_modules": ["fc2"]}, "exclude_modules"),  # peft's own
        (
            {"layers_to_transform": 99},
            r"=99 names the layer 99, .*2 layers \(0 to 1\) in 'model\.encoder\.layers' and",
        ),
        ({"layers_to_transform": [0, 2, 3]}, r"names the layers 2, 3, .*leave `layers_to_transform` out"),
        ({"layers_to_transform": [2], "target_modules": ["fc1"]}, r"=\[2\] names the layer 2"),
        (
            {"layers_to_transform": [0], "layers_pattern": "blocks"},
            "='blocks' is not .*; the lists there are 'layers'$",
        ),
    ],
)
def test_what_is_not_in_the_model_is_named_with_what_is(settings, message):
    base = build("bart")
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, READConfig(**settings))
    assert not base._load_state_dict_pre_hooks
    names = [name for name, _ in get_peft_model(base, READConfig()).named_modules()]
    assert sum(name.endswith("base_layer") for name in names) == 4


def test_the_names_of_a_second_method_and_of_a_second_adapter_are_those_of_the_model():
    model = get_peft_model(build("gpt2"), READConfig())
    with pytest.raises(ValueError, match=r"names .readapter_down., and .*Its linear layers") as error:
        model.add_adapter("second", READConfig(target_modules=["readapter_down"]))
    assert "base_layer" not in str(error.value) and error.value.args[0].count("readapter_") == 1
    with pytest.raises(ValueError, match=r"Near names: 'c_proj'.*'feed_forward', 'attention', 'language'"):
        get_peft_model(build("gpt2"), CompacterConfig(target_modules=["c_porj"]))


def test_layers_in_no_other_module_need_their_name():
    """peft counts the layers of lists inside a module alone."""
    bare = build("gpt2").transformer
    with pytest.raises(ValueError, match=r"names the layer 0, and none .* needs its name, layers_pattern='h'"):
        get_peft_model(bare, READConfig(layers_to_transform=[0]))
    with pytest.raises(ValueError, match=r"=\[2\] names the layer 2, and GPT2Model has 2 layers \(0 to 1\) in 'h'"):
        get_peft_model(bare, READConfig(layers_to_transform=[2], layers_pattern="h"))
    model = get_peft_model(bare, READConfig(layers_to_transform=[1], layers_pattern="h"))
    assert model.base_model.targeted_module_names == ["h.1.mlp.c_proj"]


def test_a_misspelt_name_among_others_is_said():
    with pytest.warns(UserWarning, match="names 'fcc1', and BartForConditionalGeneration has no such module"):
        get_peft_model(build("bart"), READConfig(target_modules=["fc2", "fcc1"]))


def test_modules_of_a_base_model_that_are_called_adapters_are_its_own():
    names = own_names(adapted())
    assert names and not any("readapter" in name or "base_layer" in name for name in names)
    model = nn.ModuleDict(
        {"output": nn.ModuleDict({"adapter_modules": nn.Linear(8, 8)}), "adapter_layer": nn.Linear(8, 8)}
    )
    assert own_names(model) == ["output", "output.adapter_modules", "adapter_layer"]
    assert absent_names(model, ["adapter_modules"]) == []


def test_layers_without_a_target_are_named_with_the_method():
    config = types.SimpleNamespace(target_modules=set(), layers_to_transform=[1], peft_type=READConfig().peft_type)
    assert nothing_matched(Net(), config, ()) == (
        "`layers_to_transform` names the layer 1, where Net has no module that READ adapts"
    )


def test_a_value_that_cannot_be_saved_leaves_the_saved_configuration_unchanged(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    before = (tmp_path / "adapter_config.json").read_bytes()
    model.peft_config["default"].pvla = {"mass": np.float32(0.5)}
    with pytest.raises(ValueError, match="`pvla` cannot be saved as JSON"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").read_bytes() == before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"r": "4"}', '{"peft_type": "READ", "r": 0}'])
def test_a_broken_configuration_file_is_an_error_of_ours(tmp_path, text):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"adapter_config.json|`r` should be"):
        READConfig.from_pretrained(str(tmp_path))


def saved(folder, model, change=None, **settings):
    """A checkpoint of a model, with other weights or another configuration where asked."""
    model.save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    if change is not None:
        change(weights)
        save_file(weights, file)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    return folder


def rename(weights, old, new):
    key = next(key for key in weights if old in key)
    weights[key.replace(old, new)] = weights.pop(key)


def set_value(weights, value):
    next(iter(weights.values())).flatten()[0] = value


MISFITS = {
    "NaN": ({"change": lambda w: set_value(w, float("nan"))}, 2, "NaN or infinite"),
    "infinity": ({"change": lambda w: set_value(w, float("inf"))}, 2, "NaN or infinite"),
    "integers": ({"change": lambda w: w.update({k: v.int() for k, v in w.items()})}, 2, "torch.int32"),
    "an extra key": ({"change": lambda w: w.update({"base_model.model.other": torch.ones(1)})}, 2, "no place for"),
    "a key outside the base": (
        {"change": lambda w: w.update({"extra.lora_A.weight": torch.ones(2)})},
        2,
        "no place for",
    ),
    "another part": ({"change": lambda w: rename(w, "readapter_down", "readapter_side")}, 2, "no place for"),
    "biases without use_bias": ({"use_bias": False}, 2, "no place for"),
    "a recurrence without a cell": ({"cell": "none"}, 2, "no place for"),
    "other layers": ({"target_modules": ["layers.0"]}, 2, "no place for"),
    "a base with fewer layers": ({}, 1, "no place for"),
}


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("kind", MISFITS)
def test_a_checkpoint_that_does_not_fit_is_refused(kind, low_memory, tmp_path):
    options, blocks, message = MISFITS[kind]
    saved(tmp_path, adapted(), **options)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(Net(blocks), str(tmp_path), low_cpu_mem_usage=low_memory)


def test_missing_weights_are_reported_by_every_way_of_loading(tmp_path):
    saved(tmp_path, adapted(), change=lambda weights: weights.pop(next(k for k in weights if "layers.1" in k)))
    with pytest.warns(UserWarning, match=r"lacks 1 weights of the adapter, such as .*layers\.1"):
        adapted().load_adapter(str(tmp_path), "default", is_trainable=True)


def test_what_fits_loads_as_before(tmp_path):
    model, x = adapted(cell="gru"), torch.randn(2, 3, 8)
    saved(tmp_path, model)
    base = Net()
    base.load_state_dict({key.replace(".base_layer", ""): v for key, v in model.get_base_model().state_dict().items()
                          if "readapter" not in key})  # fmt: skip
    loaded = PeftModel.from_pretrained(base, str(tmp_path))
    assert torch.equal(loaded(x), model(x))
    loaded.load_state_dict(model.state_dict())
    bare = loaded.unload()
    assert not bare._load_state_dict_pre_hooks


@dataclasses.dataclass
class Settings:
    width: int = 8


@pytest.mark.parametrize("config", [None, object(), Settings(), types.SimpleNamespace(model_type=3), {"a": 1}, [1]])
def test_a_models_configuration_may_be_anything(config):
    base = Net(config=0)
    base.config = config
    model = get_peft_model(base, READConfig(target_modules=r"layers\.\d"))
    assert model(torch.randn(2, 3, 8)).shape == (2, 3, 8)
    base = Net(config=0)
    base.config = config
    with pytest.raises(ValueError, match="specify `target_modules`"):
        get_peft_model(base, READConfig())


@pytest.mark.parametrize(
    "text", ["Projekt f\xfcr Videos".encode("latin-1"), b"---\nsome text\n---\nmore", b"---\ntitle: a: b\n---\n"]
)
def test_a_foreign_readme_above_is_neither_read_nor_written(text, tmp_path):
    (tmp_path / "README.md").write_bytes(text)
    adapted().save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "README.md").read_bytes() == text
    assert "# READ adapter" in (tmp_path / "adapter" / "README.md").read_text()


def test_the_card_of_another_adapter_above_is_left_alone(tmp_path):
    lora = get_peft_model(Net(), LoraConfig(target_modules=["layers.0"]))
    lora.save_pretrained(tmp_path)
    before = (tmp_path / "README.md").read_bytes()
    adapted().save_pretrained(tmp_path / "read_variant")
    assert (tmp_path / "README.md").read_bytes() == before


def test_a_readme_in_a_named_adapters_folder_that_is_no_card_stays(tmp_path):
    model = get_peft_model(Net(), READConfig(target_modules=r"layers\.\d"), adapter_name="other")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "README.md").write_bytes(b"\xff\xfe notes")
    with pytest.warns(UserWarning, match="is not a model card"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "other" / "README.md").read_bytes() == b"\xff\xfe notes"
    assert "# READ adapter" in (tmp_path / "README.md").read_text()


def test_the_saved_configuration_is_the_same_file_every_time(tmp_path):
    model = get_peft_model(build("bart"), READConfig(target_modules=["fc2", "fc1"], modules_to_save=["lm_head"]))
    model.save_pretrained(tmp_path)
    names = re.search(r'"target_modules": \[(.*?)\]', (tmp_path / "adapter_config.json").read_text(), re.DOTALL)
    assert re.findall(r"\w+", names.group(1)) == ["fc1", "fc2"]
