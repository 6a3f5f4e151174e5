"""The bottleneck family: known answers, agreement with plain code, the original's figures."""

import json
import math

import pytest
import torch
import transformers as t
from peft import PeftModel, get_peft_model
from tiny_models import DECODERS, build, padded_batch
from torch import nn
from torch.nn import functional as F

from peft_read import BottleneckConfig, CompacterConfig, HyperformerConfig, set_task
from peft_read.bottleneck.hypernetwork import Position, StackHypernetwork
from peft_read.bottleneck.layer import BottleneckLayer
from peft_read.bottleneck.samplers import LowRankLinear, PHMLinear, Rule
from peft_read.bottleneck.shared import BottleneckState, SharedRule

TASKS = ["vqa", "gqa", "nlvr", "caption"]
SCRIPTS = {"phm_dim": 2, "shared_rule": None, "factorized_rank": None}
CONFIGS = {
    "bottleneck": lambda **s: BottleneckConfig(**{"r": 4, **s}),
    "normed": lambda **s: BottleneckConfig(**{"r": 4, "norm_before": True, "norm_after": True, **s}),
    "low rank": lambda **s: BottleneckConfig(**{"r": 4, "low_rank": 2, **s}),
    "half": lambda **s: BottleneckConfig(**{"r": 4, "tasks": TASKS, "share": "down", **s}),
    "compacter": lambda **s: CompacterConfig(**{"r": 4, **s}),
    "compacter of the scripts": lambda **s: CompacterConfig(**{"r": 4, **SCRIPTS, **s}),
    "compacter over tasks": lambda **s: CompacterConfig(
        **{"r": 4, "tasks": TASKS, **SCRIPTS, "shared_rule": "tasks", **s}),
    "hyperformer": lambda **s: HyperformerConfig(**{"r": 4, "tasks": TASKS, **s}),
    "efficient": lambda **s: HyperformerConfig(
        **{"r": 4, "tasks": TASKS, "shared_generator": True, "norm_after": True, **s}),
}  # fmt: skip


def inputs_of(family):
    ids, mask = padded_batch(family)
    inputs = {"input_ids": ids, "attention_mask": mask}
    return inputs if family in DECODERS else {**inputs, "decoder_input_ids": ids}


def adapted(name="bottleneck", family="bart", task="gqa", **settings):
    """A random model whose adapter is not the identity, serving a task."""
    model = build(family)
    torch.manual_seed(1)
    model = get_peft_model(model, CONFIGS[name](**{"init_weights": False, **settings})).eval()
    set_task(model, task)
    return model


def logits(model, family="bart", **extra):
    with torch.no_grad():
        return model(**inputs_of(family), **extra).logits


# Known answers


def test_the_formula_by_hand():
    model = get_peft_model(
        nn.Sequential(nn.Linear(2, 2)), BottleneckConfig(r=1, target_modules=["0"], activation="relu")
    )
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.base_layer.weight.copy_(torch.eye(2))
        layer.base_layer.bias.zero_()
        parts = layer.parts["default"]
        parts.down_sampler.weight.copy_(torch.tensor([[1.0, 2.0]]))
        parts.down_sampler.bias.fill_(-1.0)
        parts.up_sampler.weight.copy_(torch.tensor([[10.0], [0.5]]))
        parts.up_sampler.bias.copy_(torch.tensor([0.25, 0.0]))
    # y = (1, 1): Down gives 1 + 2 - 1 = 2, Up gives (20.25, 1); y = (1, -1): relu(-2) = 0.
    expected = torch.tensor([[21.25, 2.0], [1.25, -1.0]])
    torch.testing.assert_close(model(torch.tensor([[1.0, 1.0], [1.0, -1.0]])), expected)


def test_a_sum_of_kronecker_products_by_hand():
    layer = PHMLinear(4, 2, n=2, rank=None)
    with torch.no_grad():
        layer.rule.weight.copy_(torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 1.0], [0.0, 0.0]]]))
        layer.weight.copy_(torch.tensor([[[1.0], [10.0]], [[100.0], [1000.0]]]))
        layer.bias.copy_(torch.tensor([0.5, 0.0]))
    # A_1 kron B_1 = [[1, 2], [10, 20], [3, 4], [30, 40]]; A_2 kron B_2 has 100 and 1000 in the second column alone.
    expected = torch.tensor([[1.0, 102.0], [10.0, 1020.0], [3.0, 4.0], [30.0, 40.0]])
    torch.testing.assert_close(layer.matrix(), expected)
    torch.testing.assert_close(layer(torch.tensor([1.0, 0.0, 1.0, 0.0])), torch.tensor([4.5, 106.0]))


@pytest.mark.parametrize("rank", [None, 1, 3])
def test_kronecker_products_equal_torchs(rank):
    layer = PHMLinear(12, 8, n=4, rank=rank)
    layer.reset_parameters(False, zero=False)
    factor = layer.weight if rank is None else layer.left @ layer.right
    expected = sum(torch.kron(a, b) for a, b in zip(layer.rule.weight, factor, strict=True))
    torch.testing.assert_close(layer.matrix(), expected)


def test_a_low_rank_sampler_equals_its_product():
    layer = LowRankLinear(6, 4, rank=2)
    layer.reset_parameters(False, zero=False)
    x = torch.randn(3, 5, 6)
    torch.testing.assert_close(layer(x), x @ (layer.left @ layer.right) + layer.bias)


class Houlsby(nn.Module):
    """A plain adapter, as anybody would write it."""

    def __init__(self, linear, parts):
        super().__init__()
        self.linear, self.parts = linear, parts

    @property
    def weight(self):
        return self.linear.weight

    def forward(self, x):
        y = self.linear(x)
        hidden = F.linear(y, self.parts.down_sampler.weight, self.parts.down_sampler.bias)
        hidden = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        return y + F.linear(hidden, self.parts.up_sampler.weight, self.parts.up_sampler.bias)


@pytest.mark.parametrize("family", ["bart", "t5", "llama", "gpt2"])
def test_values_and_gradients_of_plain_adapters_at_houlsbys_positions(family):
    model = adapted("bottleneck", family)
    plain = build(family)
    for name in model.base_model.targeted_module_names:
        parent, _, last = name.rpartition(".")
        parts = model.base_model.model.get_submodule(name).parts["default"]
        setattr(plain.get_submodule(parent), last, Houlsby(plain.get_submodule(name), parts))
    inputs = inputs_of(family)
    weights = [p for p in model.parameters() if p.requires_grad]
    results = [each(**inputs).logits for each in (model, plain)]
    torch.testing.assert_close(*results, rtol=0, atol=2e-5)
    gradients = [torch.autograd.grad(result.square().mean(), weights) for result in results]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("name", ["normed", "low rank", "half", "compacter", "compacter over tasks"])
def test_every_form_is_the_sum_of_the_output_and_the_parts(name):
    model = get_peft_model(nn.Sequential(nn.Linear(6, 8)), CONFIGS[name](target_modules=["0"], init_weights=False))
    set_task(model, "nlvr")
    layer = model.base_model.model[0]
    parts = layer.parts["default"]
    x = torch.randn(3, 5, 6)
    y = layer.base_layer(x)
    down, up = (half["task_nlvr"] if isinstance(half, nn.ModuleDict) else half
                for half in (parts.down_sampler, parts.up_sampler))  # fmt: skip
    hidden = y if parts.norm_before is None else parts.norm_before(y)
    delta = up(F.gelu(down(hidden), approximate="tanh"))
    torch.testing.assert_close(model(x), y + (delta if parts.norm_after is None else parts.norm_after(delta)))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("family", ["bart", "t5", "llama"])
def test_the_identity_to_begin_with_and_trainable_everywhere(name, family):
    expected = logits(build(family), family)
    model = get_peft_model(build(family), CONFIGS[name](init_weights=True)).eval()
    set_task(model, "vqa")
    assert torch.equal(logits(model, family), expected)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=1e-3)
    moved = set()
    for _ in range(3):  # Up, or the norm after it, is zero in the first step, and hides what is before it
        optimizer.zero_grad()
        model(**inputs_of(family)).logits.square().mean().backward()
        moved |= {n for n, p in trained.items() if p.grad is not None and p.grad.any()}
        optimizer.step()
    assert set(trained) - moved == {n for n in trained if any(f"task_{task}" in n for task in TASKS[1:])}
    assert not torch.equal(logits(model, family), expected)


# Positions


@pytest.mark.parametrize(
    ("family", "chosen", "expected"),
    [
        ("bart", None, {"self_attn.out_proj", "encoder_attn.out_proj", "fc2"}),
        ("bart", "feed_forward", {"fc2"}),
        ("bart", "attention", {"self_attn.out_proj", "encoder_attn.out_proj"}),
        ("t5", None, {"SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo"}),
        ("t5", "feed_forward", {"DenseReluDense.wo"}),
        ("llama", None, {"self_attn.o_proj", "mlp.down_proj"}),
        ("gpt2", None, {"attn.c_proj", "mlp.c_proj"}),
        ("opt", None, {"self_attn.out_proj", "fc2"}),
        ("bert", None, {"attention.output.dense", "output.dense"}),
    ],
)
def test_default_positions(family, chosen, expected):
    model = get_peft_model(build(family), BottleneckConfig(r=4, target_modules=chosen))
    names = model.base_model.targeted_module_names
    ends = {name for name in names if any(name.endswith(f".{end}") for end in expected)}
    assert ends == set(names)
    assert all(any(name.endswith(f".{end}") for name in names) for end in expected)
    # One at the end of each attention and each feed-forward block, none twice.
    per_stack = {"bart": 2 * 2 + 2 * 3, "t5": 2 * 2 + 2 * 3}.get(family, 4)
    if chosen is None:
        assert len(names) == per_stack


def test_positions_within_chosen_layers():
    model = get_peft_model(build("bart"), BottleneckConfig(r=4, layers_to_transform=[1]))
    names = model.base_model.targeted_module_names
    assert len(names) == 5 and all(".layers.1." in name for name in names)


def test_weights_read_without_a_call_are_not_positions():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.self_attn = nn.MultiheadAttention(8, 2)
            self.up, self.down, self.norm = nn.Linear(8, 16), nn.Linear(16, 8), nn.LayerNorm(8)

    model = nn.Module()
    model.blocks = nn.ModuleList([Block(), Block()])
    actual = get_peft_model(model, BottleneckConfig(r=2)).base_model.targeted_module_names
    assert actual == ["blocks.0.down", "blocks.1.down"]
    with pytest.raises(ValueError, match="reads the weights of its last layer without calling it"):
        get_peft_model(model, BottleneckConfig(r=2, target_modules=["out_proj"]))


def test_a_packed_attention_that_calls_its_last_layer_has_a_position():
    from peft_read.models import MomentDetrConfig, MomentDetrForTemporalGrounding

    config = MomentDetrConfig(video_feature_dim=8, text_feature_dim=8, d_model=8, ffn_dim=8, encoder_layers=1)
    model = get_peft_model(MomentDetrForTemporalGrounding(config), BottleneckConfig(r=2, init_weights=False))
    found = [name for name in model.base_model.targeted_module_names if name.endswith("out_proj")]
    assert len(found) == 1 + 2 * 2, "self-attention of the encoder, and both attentions of two decoder layers"
    batch = {"video_features": torch.randn(1, 3, 8), "video_mask": torch.ones(1, 3)}
    batch |= {"text_features": torch.randn(1, 2, 8), "text_mask": torch.ones(1, 2)}
    sum(output.sum() for output in model(**batch).values() if torch.is_tensor(output)).backward()
    weights = [
        p for n, p in model.named_parameters() if "encoder" in n and "out_proj.bottleneck" in n and "weight" in n
    ]
    assert weights and all(weight.grad is not None and weight.grad.any() for weight in weights)


# The original's figures


@pytest.fixture(scope="module")
def counts(reference_data):
    counts_of_original = json.loads(reference_data("golden/vl_adapter/data/parameter_counts.json").read_text())
    return {**counts_of_original["from_scripts"], **counts_of_original["variants"]}


BASES = {
    "bart": lambda: t.BartForConditionalGeneration(t.BartConfig(d_model=768, encoder_layers=6, decoder_layers=6,
        encoder_ffn_dim=3072, decoder_ffn_dim=3072, encoder_attention_heads=12, decoder_attention_heads=12)),
    "t5": lambda: t.T5ForConditionalGeneration(t.T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12,
        num_heads=12)),
}  # fmt: skip
COUNTED = {
    "image_single_adapter": lambda: BottleneckConfig(),
    "image_multiple_adapters": lambda: BottleneckConfig(tasks=TASKS),
    "adapter_half_shared_down": lambda: BottleneckConfig(tasks=TASKS, share="down"),
    "adapter_half_shared_up": lambda: BottleneckConfig(tasks=TASKS, share="up"),
    "adapter_single_no_cross_attention": lambda: BottleneckConfig(
        exclude_modules=r".*(encoder_attn\.out_proj|EncDecAttention\.o)"
    ),
    "adapter_single_r4": lambda: BottleneckConfig(reduction_factor=4),
    "image_single_compacter": lambda: CompacterConfig(**SCRIPTS),
    "image_multiple_compacters": lambda: CompacterConfig(tasks=TASKS, **SCRIPTS),
    "compacter_scripts_shared_rule_over_tasks": lambda: CompacterConfig(
        tasks=TASKS, **{**SCRIPTS, "shared_rule": "tasks"}
    ),
    "compacter_code_defaults_single": lambda: CompacterConfig(tasks=TASKS, share="all"),
    "compacter_code_defaults_multiple": lambda: CompacterConfig(tasks=TASKS),
    "low_rank_adapter_single": lambda: BottleneckConfig(low_rank=1),
    "image_hyperformer": lambda: HyperformerConfig(tasks=TASKS),
    "hyperformer_efficient_8": lambda: HyperformerConfig(tasks=TASKS, shared_generator=True),
    "hyperformer_unique_64": lambda: HyperformerConfig(tasks=TASKS, projected_dim=64),
}


@pytest.mark.parametrize("family", BASES)
def test_the_originals_numbers_of_parameters(family, counts):
    with torch.device("meta"):
        base = BASES[family]()
        for case, config in COUNTED.items():
            if family == "t5" and case not in COUNTED_OF_T5:
                continue
            groups = counts[case][family]["by_group"]
            expected = sum(groups.get(name, 0) for name in ("adapters", "hypernet", "task_embeddings"))
            model = get_peft_model(base, config())
            actual = sum(p.numel() for p in model.parameters() if p.requires_grad)
            assert actual == expected, (case, actual, expected)
            base = model.unload()


def base_width(family):
    """One layer of each stack, at width 768."""
    if family == "bart":
        config = t.BartConfig(vocab_size=40, d_model=768, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8,
                              decoder_ffn_dim=8, max_position_embeddings=8)  # fmt: skip
        return t.BartForConditionalGeneration(config)
    config = t.T5Config(vocab_size=40, d_model=768, d_ff=8, num_layers=1, num_heads=2, d_kv=8)
    return t.T5ForConditionalGeneration(config)


INITIAL = {
    "adapter_single": lambda: BottleneckConfig(init_weights="original"),
    "compacter_scripts": lambda: CompacterConfig(init_weights="original", **SCRIPTS),
    "compacter_code_defaults": lambda: CompacterConfig(init_weights="original"),
    "low_rank_adapter": lambda: BottleneckConfig(low_rank=1, init_weights="original"),
    "hyperformer_unique": lambda: HyperformerConfig(tasks=TASKS, init_weights="original"),
}
COUNTED_OF_T5 = {"adapter_single_r4", "image_single_compacter", "image_hyperformer"}  # the rest differs in nothing
PLACES = [
    ("attn_adapter", "encoder", "self_attn.out_proj", "SelfAttention.o"),
    ("ff_adapter", "encoder", "fc2", "DenseReluDense.wo"),
    ("enc_attn_adapter", "decoder", "encoder_attn.out_proj", "EncDecAttention.o"),
]


WEIGHTS = {"phm_rule": "rule.weight", "W": "weight", "W_left": "left", "W_right": "right", "b": "bias"}


def our_name(original, family):
    """The name in a model of a weight of the original, or its beginning and end; None where it is none of ours."""
    shared = "shared_over_layers"
    original = original.removeprefix("model.")
    if original == "phm_rule":
        return f"{shared}.compacter_parts.default.rule.weight"
    if "task_to_embeddings" in original:
        return f"{shared}.hyperformer_parts.default.task_embeddings.task_{original.rpartition('.')[2]}"
    if ".adapter_layers_hyper_net." in original:
        stack, _, rest = original.partition(".adapter_layers_hyper_net.")
        rest = rest.replace("layer_id_embeddings", "layer_embedding").replace("LayerNorm", "norm")
        rest = rest.replace("task_hypernet.task_embeding_generator", "mlp")
        for half in ("down_sampler", "up_sampler"):
            if f"_{half}_hyper_net" in rest:
                kind, _, weight = rest.partition(f"_{half}_hyper_net.")
                rest = f"generators.{kind}.{half}.{weight.replace('.0.', '.')}"
        return f"{shared}.hyperformer_parts.default.stacks.{stack}.{rest}"
    for adapter, stack, bart, t5 in PLACES:
        if f".{adapter}." in original and original.startswith(stack):
            before, _, weight = original.partition(f".{adapter}.adapters.vqa.")
            half, _, weight = weight.partition(".")
            weight = WEIGHTS.get(weight, weight)
            return (
                f"{'model.' if family == 'bart' else ''}{before}.{bart if family == 'bart' else t5}",
                f"{half}.{weight}",
            )
    return None


@pytest.mark.parametrize("family", ["bart", "t5"])
@pytest.mark.parametrize("case", INITIAL)
def test_the_originals_initial_values(reference_data, family, case):
    stats = json.loads(reference_data("golden/vl_adapter/data/initial_values.json").read_text())["stats"]
    model = get_peft_model(base_width(family), INITIAL[case]()).base_model.model
    deviation = getattr(model.config, "init_std", None)
    draws: dict[str, list] = {}
    for _ in range(3 if case == "hyperformer_unique" else 20):
        for module in model.modules():
            if isinstance(module, BottleneckState):
                for part in module.parts.values():
                    if isinstance(part, SharedRule):
                        part.rule.reset_parameters("original")
                    elif hasattr(part, "reset_parameters"):
                        part.reset_parameters("original", deviation)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                draws.setdefault(name, []).append(parameter.detach().clone())
    seen = 0
    for original, figures in stats[f"{family}/{case}"].items():
        name = our_name(original, family)
        if name is None:
            continue
        if isinstance(name, tuple):
            path, end = name
            (name,) = [key for key in draws if key.startswith(f"{path}.") and key.endswith(f".{end}")]
        assert list(draws[name][0].shape) == figures["shape"], name
        ours, count = torch.stack(draws[name]), draws[name][0].numel()
        if figures["std"] == 0:
            assert torch.equal(ours, torch.full_like(ours, figures["mean"])), name
        else:  # theirs is one draw, whose mean and deviation have the errors s / √n and s / √(2 n)
            error = ours.std() / math.sqrt(count) * math.sqrt(1 + 1 / len(ours))
            assert abs(ours.mean() - figures["mean"]) < 3 * error + 1e-5, name
            assert abs(ours.std() - figures["std"]) < 3 * error / math.sqrt(2) + 1e-5, name
            assert ours.abs().max() < 1.4 * figures["max_abs"] or count < 1000, name  # uniform or normal
        seen += 1
    assert seen >= 12, seen


@pytest.mark.parametrize(
    ("case", "prefix"), [("vl_bart/hyperformer_unique", "model."), ("vl_t5/hyperformer_efficient", "")]
)
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_the_originals_generated_weights(reference_data, case, prefix, stack):
    from safetensors.torch import load_file

    tensors = load_file(reference_data(f"golden/vl_adapter/{case}.safetensors"))
    efficient = case.endswith("efficient")
    config = HyperformerConfig(
        tasks=["vqa"], task_embedding_dim=8, hidden_dim=6, projected_dim=4, shared_generator=efficient
    )
    kinds = ["feed_forward", "self_attention"] + ["cross_attention"] * (stack == "decoder")
    network = StackHypernetwork(config, [Position(stack, kind, i, 32, 4) for kind in kinds for i in (0, 1)])
    start = f"state_dict/{prefix}{stack}.adapter_layers_hyper_net."
    weights = {}
    for key, value in tensors.items():
        if key.startswith(start):
            rest = key.removeprefix(start).replace("adapters_block_type", "kind_embedding")
            rest = f"shared_{rest}" if rest.startswith(("down_", "up_")) else rest
            name = our_name(f"{stack}.adapter_layers_hyper_net.{rest}", "bart")
            weights[name.partition(f".stacks.{stack}.")[2]] = value
    network.load_state_dict(weights)
    task = tensors[f"state_dict/{prefix}shared_task_embed.task_to_embeddings.vqa"]
    generated = network.generate(task)
    assert len(generated) == 2 * len(kinds)
    for (kind, layer), actual in generated.items():
        place = f"hidden/vqa.generated.{prefix}{stack}.adapter_layers_hyper_net.layer{layer}.{kind}"
        for half in ("down", "up"):
            for index, part in enumerate(("weight", "bias")):
                expected = tensors[f"{place}.{half}.{part}"]
                torch.testing.assert_close(getattr(actual, half)[index], expected, rtol=0, atol=2e-6)
        alone = network.generate(task, (kind, layer))[kind, layer]
        torch.testing.assert_close(alone.up[0], actual.up[0], rtol=0, atol=1e-6)


# Hyperformer


def test_weights_are_generated_once_per_forward_pass_of_a_stack(monkeypatch):
    calls = []
    generate = StackHypernetwork.generate
    monkeypatch.setattr(
        StackHypernetwork, "generate", lambda self, task, only=None: calls.append(only) or generate(self, task, only)
    )
    model = adapted("hyperformer")
    logits(model)
    assert calls == [None, None]  # the encoder's and the decoder's, not one for each of the ten layers
    calls.clear()
    model.generate(input_ids=inputs_of("bart")["input_ids"], max_new_tokens=3, min_new_tokens=3)
    assert calls == [None] * 4  # the encoder once, the decoder once per token


def test_a_layer_outside_its_stack_generates_its_own_weights():
    model = adapted("hyperformer")
    layer = model.base_model.model.model.encoder.layers[0].fc2
    assert isinstance(layer, BottleneckLayer) and layer.path == "model.encoder.layers.0.fc2"
    x = torch.randn(2, 3, 32)
    shared = model.base_model.model.shared_over_layers
    weights = shared.hypernetworks("default").stacks["encoder"].generate(shared.task_embedding("default"))
    expected = layer.base_layer(x)
    actual = weights["feed_forward", 0]
    expected = expected + F.linear(F.gelu(F.linear(expected, *actual.down), approximate="tanh"), *actual.up)
    torch.testing.assert_close(layer(x), expected)


def test_layers_in_stages_of_several_widths_are_counted_through_and_generated_apart():
    config = t.SwinConfig(image_size=16, patch_size=2, window_size=4, embed_dim=8, depths=[2, 2], num_heads=[2, 2])
    model = get_peft_model(t.SwinModel(config), HyperformerConfig(r=2, tasks=["a"]))
    positions = model.base_model._positions
    assert {position.stack for position in positions.values()} == {"encoder"}
    assert sorted((position.kind, position.layer) for position in positions.values()) == [
        (f"{kind}_{width}", layer)
        for kind in ("feed_forward", "self_attention")
        for layers, width in (((2, 3), 16), ((0, 1), 8))
        for layer in layers
    ]
    assert model(torch.randn(1, 3, 16, 16)).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("name", ["hyperformer", "efficient"])
def test_tasks_and_layers_get_different_weights(name):
    model = adapted(name)
    shared = model.base_model.model.shared_over_layers
    decoder = shared.hypernetworks("default").stacks["decoder"]
    generated_down = {}
    for task in ("vqa", "gqa"):
        set_task(model, task)
        for place, weights in decoder.generate(shared.task_embedding("default")).items():
            generated_down[task, *place] = weights.down[0]
    assert len(generated_down) == 2 * 3 * 2
    flat = torch.stack([weight.flatten() for weight in generated_down.values()])
    assert (torch.cdist(flat, flat) + torch.eye(len(flat)) > 1e-3).all()


class TwoHalves(nn.Module):
    """A block with two feed-forward parts of the same names, as those of DaViT, and a third one without names."""

    def __init__(self):
        super().__init__()
        for name in ("spatial_block", "channel_block"):
            half = nn.Module()
            half.ffn = nn.ModuleDict({"fc1": nn.Linear(8, 16), "fc2": nn.Linear(16, 8)})
            setattr(self, name, half)
        self.mlp = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.last = nn.Linear(8, 8)


def test_no_two_modules_of_a_layer_have_the_same_generated_weights():
    model = nn.Module()
    model.layers = nn.ModuleList([TwoHalves(), TwoHalves()])
    config = HyperformerConfig(r=2, tasks=["a"], target_modules=["fc2", "mlp.0", "mlp.2", "last"])
    adapted = get_peft_model(model, config)
    places = {layer.path: layer.parts["default"].position
              for layer in adapted.modules() if isinstance(layer, BottleneckLayer)}  # fmt: skip
    assert len(places) == 2 * 5 == len({(place.stack, place.kind, place.layer) for place in places.values()})
    for number in (0, 1):
        kinds = {path.removeprefix(f"layers.{number}."): place.kind for path, place in places.items()
                 if path.startswith(f"layers.{number}")}  # fmt: skip
        assert kinds == {
            "spatial_block.ffn.fc2": "feed_forward_spatial_block_ffn_fc2",
            "channel_block.ffn.fc2": "feed_forward_channel_block_ffn_fc2",
            "mlp.0": "feed_forward_mlp_0",
            "mlp.2": "feed_forward_mlp_2",
            "last": "feed_forward_layers_last",  # it needs no more than two names, and has the key that it had
        }


def test_the_rule_of_a_whole_model_is_stored_once(tmp_path):
    from safetensors.torch import load_file

    model = adapted("compacter")
    model.save_pretrained(tmp_path)
    rules = [key for key in load_file(tmp_path / "adapter_model.safetensors") if "rule" in key]
    assert rules == ["base_model.model.shared_over_layers.compacter_parts.rule.weight"]
    loaded = PeftModel.from_pretrained(build("bart"), tmp_path)
    own = [module for module in loaded.modules() if isinstance(module, Rule)]
    used = {id(module.rule) for module in loaded.modules() if isinstance(module, PHMLinear)}
    assert len(own) == 1 and used == {id(own[0])}
    assert torch.equal(logits(loaded), logits(model))
