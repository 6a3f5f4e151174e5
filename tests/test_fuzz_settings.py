"""Malformed settings, checkpoints and inputs of the alignment: the right value, or an error of ours that names it."""

import json
import math
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from peft_read import PVLAConfig, PVLALoss, READConfig, Stream

EXAMPLES = Path(__file__).parents[1] / "examples"
FEW = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))

numbers = st.one_of(
    st.integers(-3, 9), st.floats(allow_nan=True, allow_infinity=True), st.just(10**400),
    st.sampled_from([np.float32(0.5), np.int64(2), np.bool_(True), torch.tensor(2), torch.ones(1), np.arange(2)]),
)  # fmt: skip
names = st.sampled_from(["", "0", "layers.0", r"layers\.\d", "(", "rnn", "none", "paper", "all", "fc2", "\0", "é"])
scalars = st.one_of(st.none(), st.booleans(), numbers, names, st.binary(max_size=2))
anything = st.one_of(
    scalars, st.lists(scalars, max_size=3), st.dictionaries(names, scalars, max_size=2), st.tuples(scalars),
    st.just(object()), st.just(len), st.just(slice(1, None)),
)  # fmt: skip
READ_FIELDS = [
    "r", "cell", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
    "rank_pattern", "dropout", "use_bias", "bidirectional", "batch_first", "init_weights", "cell_pattern", "pvla",
]  # fmt: skip


@FEW
@given(st.dictionaries(st.sampled_from(READ_FIELDS), anything, min_size=1, max_size=3))
@pytest.mark.filterwarnings("ignore:init_weights='paper'")
def test_a_configuration_is_refused_or_survives_its_own_file(tmp_path_factory, values):
    try:
        config = READConfig(**values)
    except ValueError as error:
        assert any(name in str(error) for name in values), error
        return
    assert all(type(getattr(config, name)) is bool for name in ("use_bias", "bidirectional", "batch_first"))
    assert type(config.r) is int and 0 <= config.dropout < 1
    folder = tmp_path_factory.mktemp("config")
    config.save_pretrained(str(folder))
    assert READConfig.from_pretrained(str(folder)).to_dict() == config.to_dict()


@FEW
@given(st.one_of(st.binary(max_size=30), st.text(max_size=30).map(str.encode), anything), st.integers(0, 400))
@pytest.mark.filterwarnings("ignore")
def test_a_configuration_file_is_read_or_named(tmp_path_factory, content, cut):
    folder = tmp_path_factory.mktemp("config")
    READConfig(r=2).save_pretrained(str(folder))
    file = folder / "adapter_config.json"
    whole = file.read_bytes()
    if isinstance(content, bytes):
        file.write_bytes(whole[:cut] + content + whole[cut + len(content) :])
    else:
        file.write_text(json.dumps({**json.loads(whole), READ_FIELDS[cut % len(READ_FIELDS)]: content}, default=str))
    try:
        assert isinstance(READConfig.from_pretrained(str(folder)), READConfig)
    except (ValueError, KeyError) as error:  # peft's own: KeyError for another peft_type
        assert "adapter_config.json" in str(error) or any(name in str(error) for name in (*READ_FIELDS, "task_type"))\
            or isinstance(error, KeyError)  # fmt: skip


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x, attention_mask=None):
        return self.layers[1](self.layers[0](x))


CHANGES = {
    "nothing": lambda weights, key: None,
    "drop": lambda weights, key: weights.pop(key),
    "rename": lambda weights, key: weights.update({f"{key}x": weights.pop(key)}),
    "elsewhere": lambda weights, key: weights.update({key.replace("layers.0", "layers.7"): weights.pop(key)}),
    "nan": lambda weights, key: weights.update({key: weights[key] * math.nan}),
    "inf": lambda weights, key: weights.update({key: weights[key] + math.inf}),
    "int": lambda weights, key: weights.update({key: weights[key].long()}),
    "bool": lambda weights, key: weights.update({key: weights[key] > 0}),
    "half": lambda weights, key: weights.update({key: weights[key].half()}),
    "wider": lambda weights, key: weights.update({key: torch.cat([weights[key]] * 2)}),
    "extra": lambda weights, key: weights.update({"extra.lora_A.weight": torch.ones(2)}),
}


@settings(FEW, max_examples=30)
@given(st.lists(st.tuples(st.sampled_from(sorted(CHANGES)), st.integers(0, 30)), min_size=1, max_size=2))
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_an_adapter_is_applied_whole_or_refused(tmp_path_factory, changes):
    folder = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(Net(), READConfig(r=2, target_modules=r"layers\.\d", init_weights=False))
    model.save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    original = load_file(file)
    weights = dict(original)
    for name, place in changes:
        if weights:
            CHANGES[name](weights, sorted(weights)[place % len(weights)])
    save_file(weights, file)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            loaded = PeftModel.from_pretrained(Net(), str(folder))
        except ValueError as error:
            assert "the checkpoint" in str(error)
            return
        except RuntimeError as error:  # torch's own, which names the key
            assert "size mismatch for" in str(error)
            return
    applied = {key.replace(".default", ""): value for key, value in loaded.state_dict().items() if "readapter" in key}
    whole = all(torch.equal(applied[key], value.half().float() if weights[key].dtype == torch.half else value)
                for key, value in original.items() if key in weights)  # fmt: skip
    assert whole and all(torch.isfinite(value).all() for value in applied.values())
    assert set(weights) == set(original) or any("missing adapter keys" in str(w.message) for w in said)


@FEW
@given(
    st.dictionaries(
        st.sampled_from(["weight", "mass", "reg", "distance", "blocks", "method", "video", "language", "extractor"]),
        anything,
        min_size=1,
        max_size=3,
    )
)
def test_alignment_settings_are_refused_or_can_be_saved(values):
    try:
        config = PVLAConfig(**values)
    except ValueError:
        return
    json.dumps(config.record())
    for read, value in ((config.weight_at, config.weight), (config.mass_at, config.mass)):
        if not callable(value):
            assert math.isfinite(read(0.5))


@FEW
@given(
    st.dictionaries(
        st.sampled_from(["modules", "tokens", "mask", "invert_mask", "output", "input", "batch_first"]),
        anything,
        min_size=1,
    ),
    st.integers(1, 4),
)
def test_streams_are_refused_or_select_states(values, length):
    try:
        stream = Stream(**{"modules": "layers", **values})
    except ValueError:
        return
    states = torch.randn(2, length, 3)
    try:
        selected = stream.select_output((states, states), "layers")
        tokens, mask = stream.select_tokens(selected, {"layers.0": torch.ones(2, length)}, "layers")
    except (ValueError, TypeError):  # a TypeError of the user's own function
        return
    assert tokens.dim() == 3 and tokens.shape[1] and (mask is None or mask.dtype == torch.bool)


shapes = st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple)
values = st.sampled_from([0.0, 1.0, -1.0, math.nan, math.inf, -math.inf, 1e30, 1e-30])


@st.composite
def tensors(draw, shape=shapes):
    base = torch.full(draw(shape), 0.5)
    if base.numel():
        base.view(-1)[draw(st.integers(0, base.numel() - 1))] = draw(values)
    return draw(st.sampled_from([base, base.long(), base.bool(), base.double(), base.numpy(), None, "x", [base]]))


usual = st.sampled_from([(2, 3, 4), (2, 2, 4)])
masks = st.sampled_from([(2, 3), (2, 2)])


@settings(FEW, max_examples=150)
@given(
    st.one_of(tensors(usual), tensors()),
    st.one_of(tensors(usual), tensors()),
    st.one_of(st.none(), tensors(masks), tensors()),
    st.one_of(st.none(), tensors(masks)),
    st.sampled_from(["partial_ot", "avg_cosine", "max_cosine", "avg_l2", "max_l2"]),
)
def test_the_loss_is_a_number_or_an_error_of_ours(video, language, video_mask, language_mask, distance):
    try:
        loss = PVLALoss(distance=distance)(video, language, video_mask, language_mask)
    except ValueError:
        return
    # 1e30 squared is no number of float32: the squared distance alone may overflow
    assert loss.dim() == 0 and (bool(torch.isfinite(loss)) or distance.endswith("l2"))


plain = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 5), st.floats(), st.sampled_from(["", "no", "-1", "x", "é"])
)


@FEW
@given(
    st.dictionaries(
        st.sampled_from(["r", "pvla", "learning_rate", "method", "max_frames", "seed", "compare_zero_video", "other"]),
        st.one_of(plain, st.lists(plain, max_size=2), st.dictionaries(st.just("a"), plain)),
    )
)
def test_a_yaml_file_means_what_it_says_or_is_named(tmp_path_factory, values):
    sys.path.insert(0, str(EXAMPLES / "reproduction"))
    try:
        import summarise
    finally:
        sys.path.remove(str(EXAMPLES / "reproduction"))
    path = tmp_path_factory.mktemp("yaml") / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    try:
        script, training = summarise.parse([str(path), "--use_cpu"])
    except ValueError as error:
        assert "recipe.yaml" in str(error)
        return
    assert type(script.r) is int and type(script.pvla) is bool and type(training.learning_rate) is float
