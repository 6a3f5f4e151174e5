"""What READ must hold on a family: measured on READ, on LoRA at the same places, and on the bare model."""

from __future__ import annotations

import copy
import math
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from peft_read import READConfig
from peft_read.adapter.layer import READLayer

from .configurations import FEED_FORWARDS, WIDTH, WORDS
from .families import DROPPED, GENERATES, Case, arguments_of, copied, tensors_of

__all__ = ["CHECKS", "SETTINGS", "check_family", "faults", "feed_forward_targets"]

TOLERANCE = 2e-4  # of the largest output; float32 rounding through two layers stays two orders below
SETTINGS = ("default", "suffix", "all-linear")
IN_A_BLOCK = re.compile(r"\.\d+\..*[a-z]")
USUAL_NAME = re.compile(r"(mlp|ffn|feed_forward)\.(down_proj|fc2|linear_fc2|linear2|lin2|w2|dense_4h_to_h|c_proj|wo)$")
BETWEEN_STACKS = re.compile(
    r"merger|projector|connector|aligner|prompts_generator"
)  # they carry images over to a text
EXPERTS = re.compile(r"(^|\.)(local_)?experts(\.|$)")


def linear_names(model: nn.Module) -> dict[str, tuple[int, int]]:
    """The widths (in, out) of the linear layers by name."""
    widths = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            widths[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            widths[name] = (module.weight.shape[0], module.nf)
    return widths


def feed_forward_targets(model: nn.Module) -> list[str]:
    """The last linear layer of each feed-forward block, told by its widths or name, by full name; experts left out."""
    return [
        name
        for name, widths in linear_names(model).items()
        if IN_A_BLOCK.search(name)
        and not BETWEEN_STACKS.search(name)
        and not EXPERTS.search(name)
        and ((widths[0] in FEED_FORWARDS and widths[1] == WIDTH) or USUAL_NAME.search(name))
    ]


def numberless(name: str) -> str:
    """A name with N for the numbers of blocks."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "N", name)


def targets_of(model: nn.Module, setting: str) -> Any:
    """`target_modules` of a setting; None if there is no feed-forward block to be seen."""
    if setting == "all-linear":
        return "all-linear"
    names = feed_forward_targets(model)
    if not names:
        return None
    suffixes = {name.rpartition(".")[2] for name in names}
    reached = [name for name in linear_names(model) if name.rpartition(".")[2] in suffixes]
    if set(reached) == set(names):
        return sorted(suffixes)
    shapes = {numberless(name) for name in names}
    return "|".join(sorted(re.escape(shape).replace("N", r"\d+") for shape in shapes))


def fill(model: nn.Module) -> nn.Module:
    """Random adapter weights of one size, so that no adapter is the identity."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "readapter_" in name or "lora_" in name:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.5)
    return model


def adapted(base: nn.Module, method: str, targets: Any) -> PeftModel:
    """A copy of a model with READ or LoRA."""
    config = READConfig(r=4, target_modules=targets) if method == "read" else LoraConfig(r=4, target_modules=targets)
    return get_peft_model(copy.deepcopy(base), config).eval()


def run(model: nn.Module, inputs: dict[str, Any], *, examples: int = 2) -> dict[str, torch.Tensor]:
    """The outputs that belong to the examples."""
    torch.manual_seed(0)
    return tensors_of(model(**{name: copied(value) for name, value in inputs.items()}), examples=examples)


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], half: int | None = None) -> float:
    """The largest difference in proportion to the largest output (at least 1), over one example if `half` is given."""
    worst = 0.0
    for name in ours.keys() & theirs.keys():
        a, b = ours[name].detach(), theirs[name].detach()
        if half is not None:
            a, b = a.chunk(2)[half], b.chunk(2)[half]
        if a.shape != b.shape:
            raise ValueError(f"{name}: shapes {tuple(a.shape)} and {tuple(b.shape)}")
        finite = torch.isfinite(a) & torch.isfinite(b)
        if not bool(finite.any()):
            raise ValueError(f"{name}: no finite value")
        scale = max(1.0, float(b[finite].abs().max()))
        worst = max(worst, float((a - b)[finite].abs().max()) / scale)
    return worst


# Measures: a number of a model, or None if there is nothing to measure


def leak(kind: str) -> Callable[[nn.Module, Case], float | None]:
    """How far example 1 moves when one input of example 0 changes."""

    def measure(model: nn.Module, case: Case) -> float | None:
        inputs = dict(case.inputs)
        changed = False
        for name, value in case.inputs.items():
            if not isinstance(value, torch.Tensor) or value.shape[0] % 2:
                continue
            other = value.clone()
            half = other.shape[0] // 2
            if kind == "text" and name in ("input_ids", "decoder_input_ids"):
                other[0, case.placeholders if name == "input_ids" else 0 :] = torch.randint(
                    *WORDS, other[0, case.placeholders if name == "input_ids" else 0 :].shape,
                    generator=torch.Generator().manual_seed(8)
                )  # fmt: skip
            elif kind == "media" and value.is_floating_point():
                start = 2 if name == "flattened_patches" else 0
                fresh = torch.randn(other[:half].shape, generator=torch.Generator().manual_seed(8))
                other[:half, ..., start:] = fresh[..., start:]
            else:
                continue
            inputs[name], changed = other, True
        if not changed:
            return None
        with torch.no_grad():
            return distance(run(model, inputs), run(model, case.inputs), half=1)

    return measure


def example(inputs: dict[str, Any], index: int) -> dict[str, Any]:
    """One of the two examples."""
    return {
        name: value.chunk(2)[index] if isinstance(value, torch.Tensor) and value.shape[0] % 2 == 0 else value
        for name, value in inputs.items()
    }


def padding(side: str) -> Callable[[nn.Module, Case], float | None]:
    """How far the shorter of two examples, padded, is from itself without padding."""

    def measure(model: nn.Module, case: Case) -> float | None:
        inputs = case.inputs
        if "input_ids" not in inputs or "attention_mask" not in inputs:
            return None
        length = inputs["input_ids"].shape[1]
        per_token = [
            name
            for name, value in inputs.items()
            if isinstance(value, torch.Tensor)
            and name not in ("decoder_input_ids", "pixel_values")
            and value.shape[:2] == (2, length)
        ]
        pad = getattr(model.config, "pad_token_id", None)
        if pad is None and hasattr(model.config, "get_text_config"):
            pad = getattr(model.config.get_text_config(), "pad_token_id", None)
        short, padded = example(inputs, 1), dict(inputs)
        for name in per_token:
            kept = short[name][:, : length - DROPPED]
            filler = torch.full_like(short[name][:, :DROPPED], pad or 0) if name == "input_ids" else torch.zeros_like(
                short[name][:, :DROPPED])  # fmt: skip
            short[name] = kept
            row = torch.cat((filler, kept) if side == "left" else (kept, filler), 1)
            padded[name] = torch.cat((inputs[name][:1], row))
        if "position_ids" in arguments_of(_inner(model)) and case.family.head == "causal":
            padded["position_ids"] = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
            short["position_ids"] = short["attention_mask"].cumsum(1) - 1
        with torch.no_grad():
            alone, together = run(model, short, examples=1), run(model, padded)
        largest = None
        for name in alone.keys() & together.keys():
            one, both = alone[name], together[name].chunk(2)[1]
            if one.dim() < 2 or both.shape[0] != 1:
                continue
            if one.shape != both.shape:
                if one.dim() < 3 or both.shape[1] - one.shape[1] != DROPPED:
                    continue
                both = both[:, DROPPED:] if side == "left" else both[:, :-DROPPED]
            elif one.dim() >= 3 and one.shape[1] == length:
                continue
            largest = max(largest or 0.0, distance({name: both}, {name: one}))
        return largest

    return measure


def _inner(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _placeholders(model: nn.Module) -> list[int]:
    """The tokens that stand for images or sound, which a model of random weights might write into its text."""
    config: Any = getattr(model, "config", None)
    names = (f"{kind}_token_{what}" for kind in ("image", "video", "audio", "speech") for what in ("id", "index"))
    return sorted({value for name in names if isinstance(value := getattr(config, name, None), int)})


def cached(model: nn.Module, case: Case) -> float | None:
    """How far the scores of generation with a cache are from those without, as long as the tokens are the same."""
    if case.family.head not in GENERATES or not hasattr(_inner(model), "generate"):
        return None
    inputs = {name: copied(value) for name, value in case.inputs.items() if name != "decoder_input_ids"}
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "num_beams": 1,
                "suppress_tokens": _placeholders(_inner(model)) or None,
                "return_dict_in_generate": True, "output_logits": True}  # fmt: skip
    with torch.no_grad():
        fast, slow = (model.generate(**copy.deepcopy(inputs), **settings, use_cache=use) for use in (True, False))
    worst, width = 0.0, fast.sequences.shape[1] - len(fast.logits)
    for step, (a, b) in enumerate(zip(fast.logits, slow.logits, strict=True)):
        alike = (fast.sequences[:, : width + step] == slow.sequences[:, : width + step]).all(1)
        if bool(alike.any()):
            worst = max(worst, distance({"logits": a[alike]}, {"logits": b[alike]}))
    return worst


def _backward(model: nn.Module, case: Case, *, training: bool = False) -> dict[str, torch.Tensor | None]:
    """The gradients of the adapters under a random linear loss on all outputs."""
    model.train(training)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.eval()  # its statistics would move from one measure to the next
    model.zero_grad(set_to_none=True)
    outputs = run(model, case.inputs)
    generator = torch.Generator().manual_seed(9)
    loss = sum(
        (torch.nan_to_num(value, neginf=0.0, posinf=0.0) * torch.randn(value.shape, generator=generator)).sum()
        for value in outputs.values()
    )
    loss.backward()
    model.eval()
    return {name: p.grad for name, p in model.named_parameters() if "readapter_" in name or "lora_" in name}


def dead_parameters(model: nn.Module, case: Case) -> list[str]:
    """The adapter parameters that no gradient reaches."""
    gradients = _backward(model, case)
    dead = [name for name, grad in gradients.items() if grad is None or not bool((grad != 0).any())]
    return [name.removeprefix("base_model.model.").replace(".default", "") for name in dead]


def read_at_starts_only(model: nn.Module, case: Case) -> set[str]:
    """The layers of which the loss reads no more than the first token of each sequence (a class token, mostly)."""
    read: dict[str, bool] = {}
    hooks = []

    def watch(name: str) -> Callable:
        def hook(layer: nn.Module, args: tuple, output: torch.Tensor) -> None:
            def backward(grad: torch.Tensor) -> None:
                tokens = (grad != 0).any(-1)
                later = tokens.reshape(-1, tokens.shape[-1])[:, 1:] if tokens.dim() > 1 else tokens[1:]
                read[name] = read.get(name, False) or bool(later.any())

            if output.requires_grad:
                output.register_hook(backward)

        return hook

    for name, module in _inner(model).named_modules():
        if isinstance(module, READLayer):
            hooks.append(module.register_forward_hook(watch(name)))
    try:
        _backward(model, case)
    finally:
        for hook in hooks:
            hook.remove()
    return {name for name, later in read.items() if not later}


def checkpointed(model: nn.Module, case: Case) -> float | None:
    """How far gradients with checkpointing are from those without."""
    inner = _inner(model)
    if not getattr(inner, "supports_gradient_checkpointing", False):
        return None
    plain = {name: grad for name, grad in _backward(model, case, training=True).items() if grad is not None}
    inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        again = _backward(model, case, training=True)
    finally:
        inner.gradient_checkpointing_disable()
    missing = [name for name in plain if again[name] is None]
    if missing:
        raise ValueError(f"no gradient with checkpointing: {missing[0]} and {len(missing) - 1} others")
    # Some gradients are zero but for rounding (a bias on attention's keys), hence a floor by the largest.
    largest, worst = max(float(grad.abs().max()) for grad in plain.values()), 0.0
    for name, grad in plain.items():
        scale = max(float(grad.abs().max()), 1e-4 * largest, 1e-6)
        worst = max(worst, float((again[name] - grad).abs().max()) / scale)
    return worst


def reloaded(model: nn.Module, case: Case, base: nn.Module) -> float:
    """How far a saved and loaded adapter is from itself."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
        with torch.no_grad():
            return distance(run(again, case.inputs), run(model, case.inputs))


def recurrences(model: nn.Module, case: Case) -> dict[str, Any]:
    """Over what the recurrence of each layer runs, seen from outside.

    A token's share O~ - O is a function of its own O alone exactly where a sequence starts, so counting those tokens
    counts the sequences.

    Returns:
        by layer (numbers as N): the shape of its output, and how many sequences are in it.
    """
    seen: dict[str, Any] = {}
    hooks = []

    def watch(name: str) -> Callable:
        def hook(layer: Any, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
            own = layer.base_layer(*args, **kwargs)
            if isinstance(own, tuple):  # a mixture and the scores of its router
                own, output = own[0], output[0]
            if not own.numel():
                return  # no token of this kind in the batch
            down, cell, up = (part["default"] for part in
                              (layer.readapter_down, layer.readapter_cell, layer.readapter_up))  # fmt: skip
            step = F.linear(down(own), cell.weight_ih, cell.bias_ih) + cell.bias_hh
            alone = up(F.gelu(torch.tanh(step)))
            starts = ((output - own - alone).abs().amax(-1) < 1e-5 * max(1.0, float(output.abs().max()))).sum()
            seen.setdefault(numberless(name), {"shape": list(output.shape), "sequences": int(starts)})

        return hook

    for name, module in _inner(model).named_modules():
        if isinstance(module, READLayer) and module.is_recurrent:
            hooks.append(module.register_forward_hook(watch(name), with_kwargs=True))
    try:
        with torch.no_grad():
            run(model, case.inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


MEASURES: dict[str, Callable[[nn.Module, Case], float | None]] = {
    "leak of text": leak("text"),
    "leak of media": leak("media"),
    "left padding": padding("left"),
    "right padding": padding("right"),
    "cache": cached,
    "checkpointing": checkpointed,
}
CHECKS = ("identity", "gradients", "order", *MEASURES, "reload")


def attempt(function: Callable, *args: Any) -> dict[str, Any]:
    """{"value": ...} or {"error": message}."""
    try:
        return {"value": function(*args)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]}


def verdict(read: dict, base: Callable[[], dict], tolerance: float = TOLERANCE) -> str:
    """exact, differs, refused, stopped in forward, not measured, or base too where the bare model does no better."""
    if "error" in read:
        if read["error"].startswith("NotImplementedError") and "READ" in read["error"]:
            return "refused"
        if "some of them padding by the mask of its stack, and it is unknown which" in read["error"]:
            return "refused"  # of padded batches alone
        return "base too" if "error" in base() else "stopped in forward"
    if read["value"] is None:
        return "not measured"
    if read["value"] <= tolerance:
        return "exact"
    reference = base()
    return "base too" if "error" in reference or (reference["value"] or 0.0) > tolerance else "differs"


@contextmanager
def _every_token_indexed(model: nn.Module) -> Iterator[None]:
    """Sparse attention whose indexer picks every token."""
    indexers = [module for module in model.modules() if isinstance(getattr(module, "index_topk", None), int)]
    before = [module.index_topk for module in indexers]
    for module in indexers:
        module.index_topk = 1024
    try:
        yield
    finally:
        for module, picks in zip(indexers, before, strict=True):
            module.index_topk = picks


class _Trial:
    """One setting of one family: the models, made when they are first asked for, and what was measured on them."""

    def __init__(self, case: Case, targets: Any, base: dict[str, dict]) -> None:
        self.case = case
        self.targets = targets
        self.base = base
        self.read = attempt(adapted, case.model, "read", targets)
        self._lora: dict | None = None

    @property
    def lora(self) -> dict:
        """LoRA at the same places."""
        if self._lora is None:
            targets = self.targets
            if targets in (None, "all-linear") and "value" in self.read:  # READ's own choice, not LoRA's
                layers = _inner(self.read["value"]).named_modules()
                readers = {name: module.get_base_layer() for name, module in layers if isinstance(module, READLayer)}
                targets = [name for name, base in readers.items() if isinstance(base, nn.Linear | Conv1D)]
            self._lora = attempt(adapted, self.case.model, "lora", targets)
            if "value" in self._lora:
                fill(self._lora["value"])
        return self._lora

    def beside(self, measure: Callable, *args: Any) -> dict:
        """A measure of LoRA."""
        if "error" in self.lora:
            return {"error": f"LoRA: {self.lora['error']}"}
        return attempt(measure, self.lora["value"], self.case, *args)

    def of_base(self, name: str, measure: Callable) -> dict:
        """A measure of the bare model, made once for all settings."""
        if name not in self.base:
            self.base[name] = attempt(measure, self.case.model, self.case)
        return self.base[name]

    def check(self, name: str, measure: Callable, *args: Any, tolerance: float = TOLERANCE) -> dict[str, Any]:
        """Measure READ; where it is not exact, LoRA and the bare model too."""
        ours = attempt(measure, self.read["value"], self.case, *args)
        if name in ("checkpointing", "reload"):
            reference = lambda: self.beside(measure, *args)  # noqa: E731
        else:
            reference = lambda: self.of_base(name, measure)  # noqa: E731
        results: dict[str, Any] = {"verdict": verdict(ours, reference, tolerance), "read": ours}
        if results["verdict"] == "differs" and name.endswith("padding"):
            with _every_token_indexed(self.read["value"]):
                dense = attempt(measure, self.read["value"], self.case, *args)
            if dense.get("value", math.inf) <= tolerance:
                reason = "sparse attention breaks ties between tokens by their place, and padding moves them"
                results |= {"verdict": "explained", "reasons": [reason], "dense": dense}
        if results["verdict"] not in ("exact", "not measured"):
            results["lora"] = self.beside(measure, *args)
            if name not in ("checkpointing", "reload"):
                results["base"] = self.of_base(name, measure)
        return results


def check_family(case: Case, settings: tuple[str, ...] = SETTINGS) -> dict[str, Any]:
    """Every check of a family, by setting.

    Returns:
        {"feed_forward": names, "settings": {setting: {"targets", "state", "checks": {check: {"verdict", ...}}}}}.
    """
    warnings.simplefilter("ignore")
    feed_forward = sorted({numberless(name) for name in feed_forward_targets(case.model)})
    base: dict[str, dict] = {}
    return {"feed_forward": feed_forward, "settings": {s: _check_setting(case, s, base) for s in settings}}


def _check_setting(case: Case, setting: str, base: dict[str, dict]) -> dict[str, Any]:
    targets = None if setting == "default" else targets_of(case.model, setting)
    if setting == "suffix" and targets is None:
        return {"state": "no feed-forward block seen"}
    trial = _Trial(case, targets, base)
    results: dict[str, Any] = {"targets": targets}
    if "error" in trial.read:
        message = trial.read["error"]
        missing = setting == "default" and "target_modules" in message
        results["lora"] = trial.lora.get("error")
        return results | {"state": "no default" if missing else "stopped at get_peft_model", "message": message}
    model = trial.read["value"]
    layers = {name for name, module in _inner(model).named_modules() if isinstance(module, READLayer)}
    results |= {"state": "adapted", "layers": sorted(map(numberless, layers)), "checks": {}}
    results["layers"] = sorted(set(results["layers"]))
    checks = results["checks"]

    checks["identity"] = _identity(trial)
    if "error" in checks["identity"]["read"]:
        return results | {"state": "stopped in forward", "message": checks["identity"]["read"]["error"]}
    fill(model)
    results["effect"] = attempt(_effect, model, case).get("value")
    checks["gradients"] = _gradients(trial)
    order = attempt(recurrences, model, case)
    checks["order"] = {"verdict": _order_verdict(order), "read": order}
    for name, measure in MEASURES.items():
        checks[name] = trial.check(name, measure, tolerance=1e-2 if name == "checkpointing" else TOLERANCE)
    checks["reload"] = trial.check("reload", reloaded, case.model)
    if checks["order"]["verdict"] == "differs" and checks["leak of media"]["verdict"] == "exact":
        of_all = [layer["shape"][0] == 1 for layer in order["value"].values() if layer["sequences"] < 2]
        if of_all and all(of_all):
            checks["order"] |= {"verdict": "explained", "reasons": ["learned queries, which all examples share"]}
    return results


def _effect(model: nn.Module, case: Case) -> float:
    with torch.no_grad():
        return distance(run(model, case.inputs), run(case.model, case.inputs))


def _identity(trial: _Trial) -> dict[str, Any]:
    ours = attempt(_effect, trial.read["value"], trial.case)
    if ours.get("value") == 0.0:
        return {"verdict": "exact", "read": ours}
    if ours.get("value", 1.0) <= 2e-6:
        return {"verdict": "rounding", "read": ours}
    lora = attempt(adapted, trial.case.model, "lora", trial.targets)
    beside = attempt(_effect, lora["value"], trial.case) if "value" in lora else lora
    return {"verdict": "stopped in forward" if "error" in ours else "differs", "read": ours, "lora": beside}


def _gradients(trial: _Trial) -> dict[str, Any]:
    ours = attempt(dead_parameters, trial.read["value"], trial.case)
    if "error" in ours:
        beside = trial.beside(dead_parameters)
        same = beside.get("error") == ours["error"]
        return {"verdict": "as LoRA" if same else "stopped in forward", "read": ours, "lora": beside}
    if not ours["value"]:
        return {"verdict": "exact", "read": {"value": 0}}
    beside = trial.beside(dead_parameters)
    unused = {name.partition(".lora_")[0] for name in beside.get("value", [])}
    first = read_at_starts_only(trial.read["value"], trial.case)
    reasons, left = set(), []
    for name in ours["value"]:
        layer, _, parameter = name.partition(".readapter_")
        if layer in unused:
            reasons.add("the model does not use the layer")
        elif layer in first and parameter == "cell.weight_hh":
            reasons.add("the model reads the first token only")
        else:
            left.append(name)
    results = {"read": _named(ours), "lora": _named(beside), "reasons": sorted(reasons)}
    return results | {"verdict": "differs" if left else "explained", "left": sorted({numberless(n) for n in left})}


def _named(dead: dict) -> dict:
    if "error" in dead:
        return dead
    return {"value": len(dead["value"]), "names": sorted({numberless(name) for name in dead["value"]})}


def _order_verdict(order: dict) -> str:
    """Whether every layer in a block sees at least two sequences, and none of them of one token only."""
    if "error" in order:
        return "stopped in forward"
    for name, layer in order["value"].items():
        rows = math.prod(layer["shape"][:-1])
        if len(layer["shape"]) > 2 and layer["shape"][-2] == 1:
            continue  # one token each, as the keys of so small an image, pooled, may be
        if ".N" in name and (layer["sequences"] >= rows or layer["sequences"] < 2):
            return "differs"
    return "exact"


# Verdicts that are no fault of READ's: equal, nothing to compare, the bare model no better, or said aloud.
FAULTLESS = ("exact", "rounding", "explained", "not measured", "base too", "refused", "as LoRA")


def faults(setting: dict[str, Any]) -> dict[str, Any]:
    """The checks of one setting that READ fails, with what was measured."""
    if setting["state"] == "stopped in forward":
        return {"forward": setting["message"]}
    return {name: check for name, check in setting.get("checks", {}).items() if check["verdict"] not in FAULTLESS}
