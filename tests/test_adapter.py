"""What READ computes: the formula, the start, the gradients, the parameters, and what no layer may leak."""

import copy
import math

import pytest
import torch
from peft import PeftType, get_peft_model
from tiny_models import DECODERS, FAMILIES, adapted, build, padded_batch, read_layers
from torch import nn

from peft_read import READConfig

CELLS = ("rnn", "gru", "lstm", "none")


class TwoLayers(nn.Module):
    """Two feed-forward blocks on whatever shape they are given."""

    def __init__(self, width=6):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, width))
        self.second = nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, width))

    def forward(self, x):
        return self.second(self.first(x))


def one_layer(cell="rnn", *, width=6, out=8, dtype=torch.float64, **settings):
    """READ on one linear layer, with random weights and biases everywhere."""
    model = get_peft_model(
        nn.Sequential(nn.Linear(width, out)).to(dtype), READConfig(target_modules=["0"], cell=cell, **settings)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "readapter_" in name:
                parameter.uniform_(-0.8, 0.8)
    return model


def gelu(x):
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def by_hand(layer, cell, x):
    """Equation (5), number by number in Python floats, for one sequence."""
    w = {
        name.removeprefix("readapter_").replace(".default", ""): value.tolist()
        for name, value in layer.state_dict().items()
    }

    def affine(weight, bias, vector):
        return [
            b + sum(a * v for a, v in zip(row, vector, strict=True)) for row, b in zip(w[weight], w[bias], strict=True)
        ]

    rank = len(w["down.weight"])
    h, c = [0.0] * rank, [0.0] * rank
    results = []
    for token in x.tolist():
        o = affine("base_layer.weight", "base_layer.bias", token)
        z = affine("down.weight", "down.bias", o)
        if cell == "none":
            h = z
        else:
            i, g = affine("cell.weight_ih", "cell.bias_ih", z), affine("cell.weight_hh", "cell.bias_hh", h)
            k = rank
            if cell == "rnn":
                h = [math.tanh(a + b) for a, b in zip(i, g, strict=True)]
            elif cell == "gru":
                r = [sigmoid(i[j] + g[j]) for j in range(k)]
                u = [sigmoid(i[k + j] + g[k + j]) for j in range(k)]
                n = [math.tanh(i[2 * k + j] + r[j] * g[2 * k + j]) for j in range(k)]
                h = [(1 - u[j]) * n[j] + u[j] * h[j] for j in range(k)]
            else:
                s = [a + b for a, b in zip(i, g, strict=True)]
                c = [sigmoid(s[k + j]) * c[j] + sigmoid(s[j]) * math.tanh(s[2 * k + j]) for j in range(k)]
                h = [sigmoid(s[3 * k + j]) * math.tanh(c[j]) for j in range(k)]
        delta = affine("up.weight", "up.bias", [gelu(v) for v in h])
        results.append([a + b for a, b in zip(o, delta, strict=True)])
    return torch.tensor(results, dtype=torch.float64)


@pytest.mark.parametrize("cell", CELLS)
def test_the_formula_number_by_number(cell):
    model = one_layer(cell)
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    expected = torch.stack([by_hand(read_layers(model)[0], cell, row) for row in x])
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)


def test_dropout_acts_between_gelu_and_the_up_projection():
    model = one_layer(dropout=0.5).train()
    layer = read_layers(model)[0]
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    torch.manual_seed(4)
    ours = model(x)
    output = layer.base_layer(x)
    hidden = nn.functional.gelu(layer.readapter_cell["default"](layer.readapter_down["default"](output))[0])
    torch.manual_seed(4)
    expected = output + layer.readapter_up["default"](nn.functional.dropout(hidden, 0.5))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cell", CELLS)
def test_the_adapter_starts_as_the_identity_and_every_weight_gets_a_gradient(family, cell):
    model = build(family)
    ids, mask = padded_batch(family)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    with torch.no_grad():
        before = model(**inputs).logits
    model = get_peft_model(model, READConfig(cell=cell))
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # W_up moves first, all else from the second step
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        optimizer.step()
    assert all("readapter_" in name for name in gradients)
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.any()] == []


def test_the_printed_initialisation_cannot_be_trained():
    with pytest.warns(UserWarning, match="cannot be trained"):
        config = READConfig(init_weights="paper", target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(6, 8)), config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 5, 6)).square().sum().backward()
        optimizer.step()
        moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert moved == {"base_model.model.0.readapter_up.default.bias"}


def test_random_initialisation_is_not_the_identity():
    model = get_peft_model(nn.Sequential(nn.Linear(6, 8)), READConfig(target_modules=["0"], init_weights=False))
    x = torch.randn(2, 5, 6)
    with torch.no_grad():
        changed = (model(x) - read_layers(model)[0].base_layer(x)).abs().amax(-1)
    assert (changed > 1e-3).all()


def test_down_is_kaiming_normal_and_biases_are_zero():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 2048)), READConfig(target_modules=["0"], r=64))
    layer = read_layers(model)[0]
    down = layer.readapter_down["default"]
    assert down.weight.std().item() == pytest.approx((2 / 2048) ** 0.5, rel=0.02)
    assert not layer.readapter_up["default"].weight.any()
    assert not down.bias.any() and not layer.readapter_up["default"].bias.any()


@pytest.mark.parametrize(("bias", "expected"), [(True, 83_472), (False, 74_112)])
def test_the_parameter_count_for_bart_base(bias, expected):
    from transformers import BartConfig, BartForConditionalGeneration

    with torch.device("meta"):
        model = BartForConditionalGeneration(BartConfig(encoder_layers=6, decoder_layers=6, d_model=768))
    model = get_peft_model(model, READConfig(use_bias=bias))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == expected == 12 * (2 * 768 * 4 + 2 * 16 + (3 * 4 + 768 if bias else 0))


def test_parameters_carry_the_decided_names_and_shapes():
    model = one_layer("gru", r=2, out=10)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if "readapter_" in name}
    stem = "base_model.model.0.readapter_"
    assert shapes == {
        f"{stem}down.default.weight": (2, 10),
        f"{stem}down.default.bias": (2,),
        f"{stem}cell.default.weight_ih": (6, 2),
        f"{stem}cell.default.weight_hh": (6, 2),
        f"{stem}cell.default.bias_ih": (6,),
        f"{stem}cell.default.bias_hh": (6,),
        f"{stem}up.default.weight": (10, 2),
        f"{stem}up.default.bias": (10,),
    }


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_no_row_of_a_batch_sees_another(cell):
    model = one_layer(cell)
    x = torch.randn(4, 5, 6, dtype=torch.float64, requires_grad=True)
    model(x)[1].sum().backward()
    assert x.grad[1].any() and not x.grad[[0, 2, 3]].any()
    y = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)  # four vectors: four sequences of one token
    with pytest.warns(UserWarning, match="sequence of one token"):
        rows = model(y)
    rows[1].sum().backward()
    assert y.grad[1].any() and not y.grad[[0, 2, 3]].any()
    torch.testing.assert_close(rows, model(y[:, None])[:, 0])


def test_vectors_without_a_sequence_are_warned_of_once():
    model = get_peft_model(TwoLayers(), READConfig(target_modules=["first.2", "second.2"]))
    with pytest.warns(UserWarning, match="sequence of one token") as caught:
        model(torch.randn(3, 6))
        model(torch.randn(3, 6))
    assert len(caught) == 1


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_no_token_sees_a_later_one(cell):
    model = one_layer(cell)
    x = torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True)
    model(x)[:, 3].sum().backward()
    assert x.grad[:, :4].abs().sum(-1).gt(0).all() and not x.grad[:, 4:].any()


def test_both_directions_see_the_whole_sequence():
    model = one_layer(bidirectional=True)
    x = torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True)
    model(x)[:, 3].sum().backward()
    assert x.grad.abs().sum(-1).gt(0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_recurrence_matters_in_every_family(family):
    model = adapted(family)
    ids, mask = padded_batch(family)
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if family not in DECODERS:
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        before = model(**inputs).logits
        for layer in read_layers(model):
            layer.readapter_cell["default"].weight_hh.zero_()
        after = model(**inputs).logits
    assert (before - after).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_bases_and_autocast(dtype):
    base = build("bart").to(dtype)
    model = get_peft_model(base, READConfig(init_weights=False)).eval()
    assert {p.dtype for n, p in model.named_parameters() if "readapter_" in n} == {torch.float32}  # peft's default
    ids, mask = padded_batch("bart")
    with torch.no_grad():
        assert model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids).logits.dtype == dtype
    model = get_peft_model(build("bart").to(dtype), READConfig(init_weights=False), autocast_adapter_dtype=False)
    assert {p.dtype for n, p in model.named_parameters() if "readapter_" in n} == {dtype}
    with torch.no_grad():
        assert model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids).logits.isfinite().all()
    model = adapted("bart")
    with torch.no_grad():
        exact = model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids).logits
    assert rough.isfinite().all() and (exact - rough.float()).abs().max() < 0.1 * exact.abs().max()


def test_input_casting_can_be_turned_off():
    from peft.helpers import disable_input_dtype_casting

    model = one_layer(dtype=torch.float32)
    x = torch.randn(2, 5, 6)
    with torch.no_grad():
        expected = model(x)
        with disable_input_dtype_casting(model):
            assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "`r` should be a positive integer, got 0"),
        ({"r": 2.0}, "`r` should be a positive integer, got 2.0"),
        ({"rank_pattern": {"fc2": -1}}, r"rank_pattern\['fc2'\]` should be a positive integer"),
        ({"r": 3, "bidirectional": True}, "is odd"),
        ({"cell": "RNN"}, "`cell` should be one of 'rnn', 'gru', 'lstm', 'none', got 'RNN'"),
        ({"cell_pattern": {"fc2": "no"}}, "should be one of"),
        ({"dropout": 1.0}, r"probability in \[0, 1\), got 1.0"),
        ({"init_weights": "gaussian"}, "True, False or 'paper', got 'gaussian'"),
        ({"target_modules": "fc2", "layers_to_transform": [0]}, "`layers_to_transform` cannot be used when"),
        ({"target_modules": "fc2", "layers_pattern": ["layers"]}, "`layers_pattern` cannot be used when"),
        ({"target_modules": ["fc2"], "layers_pattern": ["layers"]}, "must also be specified"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        READConfig(**settings)


@pytest.mark.parametrize(
    "module", [nn.Conv1d(4, 4, 1), nn.Embedding(4, 4), nn.LayerNorm(4), nn.MultiheadAttention(4, 2)]
)
def test_modules_that_are_not_linear_layers_are_refused(module):
    with pytest.raises(ValueError, match="is not supported"):
        get_peft_model(nn.ModuleDict({"target": module}), READConfig(target_modules=["target"]))


def test_an_unknown_architecture_needs_targets():
    with pytest.raises(ValueError, match="Please specify `target_modules` in `peft_config`"):
        get_peft_model(TwoLayers(), READConfig())


def test_default_targets_are_the_last_linear_of_each_feed_forward_block():
    expected = {"gpt2": "mlp.c_proj", "t5": "DenseReluDense.wo", "bart": "fc2", "opt": "fc2", "bert": "output.dense"}
    for family in (*FAMILIES, "bert"):
        names = get_peft_model(build(family), READConfig()).base_model.targeted_module_names
        assert len(names) == (4 if family in ("bart", "t5") else 2)
        assert all(name.endswith(expected.get(family, "mlp.down_proj")) for name in names)


class SetDecoder(nn.Module):
    """The shape of a DETR-like model: an encoder over tokens and a decoder over a set of queries."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear1, self.linear2 = nn.Linear(6, 12), nn.Linear(12, 6)

        def forward(self, x):
            return x + self.linear2(self.linear1(x).relu())

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(SetDecoder.Block() for _ in range(2))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    def __init__(self):
        super().__init__()
        self.config = {"model_type": "moment_detr"}
        self.encoder, self.decoder = self.Stack(), self.Stack()

    def forward(self, x, queries):
        return self.encoder(x), self.decoder(queries)


def test_a_set_of_queries_has_no_recurrence():
    model = get_peft_model(SetDecoder(), READConfig(init_weights=False, cell="gru"))
    cells = {layer.path: layer.cell_name["default"] for layer in read_layers(model)}
    assert cells == {f"{part}.layers.{i}.linear2": cell for part, cell in (("encoder", "gru"), ("decoder", "none"))
                     for i in range(2)}  # fmt: skip
    queries, order = torch.randn(2, 5, 6), torch.tensor([3, 0, 4, 1, 2])
    x = torch.randn(2, 7, 6)
    with torch.no_grad():
        torch.testing.assert_close(model(x, queries[:, order])[1], model(x, queries)[1][:, order])
    everywhere = get_peft_model(SetDecoder(), READConfig(cell_pattern={}))
    assert {layer.cell_name["default"] for layer in read_layers(everywhere)} == {"rnn"}


def test_experts_are_refused_unless_they_have_no_recurrence():
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
            self.shared_expert = nn.Linear(6, 6)

        def forward(self, x):
            flat = x.flatten(0, 1)
            return (self.experts[0](flat[::2]).sum() + self.experts[1](flat[1::2]).sum()) + self.shared_expert(x)

    with pytest.raises(ValueError, match="one expert of a mixture"):
        get_peft_model(Mixture(), READConfig(target_modules="all-linear"))
    model = get_peft_model(Mixture(), READConfig(target_modules=["shared_expert"]))
    assert model(torch.randn(2, 4, 6)).shape == (2, 4, 6)
    settings = READConfig(target_modules="all-linear", cell_pattern={r"experts\.\d+": "none"})
    assert get_peft_model(Mixture(), settings)(torch.randn(2, 4, 6)).shape == (2, 4, 6)


def test_a_decoder_cannot_be_bidirectional():
    for family in FAMILIES:
        with pytest.raises(ValueError, match="a token must not depend on those after it"):
            get_peft_model(build(family), READConfig(bidirectional=True))
    for family, targets in (("bart", r".*encoder\..*fc2"), ("t5", r"encoder\..*wo")):
        model = get_peft_model(
            build(family), READConfig(bidirectional=True, target_modules=targets, init_weights=False)
        )
        ids, mask = padded_batch(family)
        assert model.eval().generate(input_ids=ids, attention_mask=mask, max_new_tokens=3).shape[0] == 3


def test_the_configuration_is_read_and_its_type_is_the_member():
    config = READConfig(target_modules=["fc2"], exclude_modules=["lm_head"])
    assert config.peft_type is PeftType.READ
    assert config.target_modules == {"fc2"} and config.exclude_modules == {"lm_head"}
    assert copy.deepcopy(config) == config
