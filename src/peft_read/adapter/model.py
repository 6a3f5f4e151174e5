"""READModel: READ as one of peft's tuners, with its default targets."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from .config import READConfig
from .layer import CANNOT_MERGE, Linear, READLayer
from .loaded import check_loaded_weights
from .mixed import copies_in_generate, mixed_batch
from .registration import PREFIX
from .sequences import Notice
from .stacks import install_scope, is_causal, keep_slow_path, remove_scopes

__all__ = ["TARGET_MODULES", "READModel"]

# The last linear layer of each feed-forward block, so that O is what the paper adapts: the block's output before
# dropout and the residual.
TARGET_MODULES: dict[str, list[str]] = {
    # the backbones of this project
    "moment_detr": ["linear2"],
    "umt": ["ffn.mapping.3", "ffn1.mapping.3", "ffn2.mapping.3"],
    "vg_bart": ["fc2"],
    "vg_t5": ["wo"],
    # encoder-decoders
    "bart": ["fc2"],
    "blenderbot": ["fc2"],
    "blenderbot-small": ["fc2"],
    "m2m_100": ["fc2"],
    "marian": ["fc2"],
    "mbart": ["fc2"],
    "mt5": ["wo"],
    "pegasus": ["fc2"],
    "speech_to_text": ["fc2"],
    "t5": ["wo"],
    "umt5": ["wo"],
    "whisper": ["fc2"],
    # decoders
    "biogpt": ["fc2"],
    "bloom": ["dense_4h_to_h"],
    "cohere": ["down_proj"],
    "falcon": ["dense_4h_to_h"],
    "gemma": ["down_proj"],
    "gemma2": ["down_proj"],
    "gemma3_text": ["down_proj"],
    "glm": ["down_proj"],
    "gpt2": ["mlp.c_proj"],
    "gpt_bigcode": ["mlp.c_proj"],
    "gpt_neo": ["mlp.c_proj"],
    "gpt_neox": ["dense_4h_to_h"],
    "gptj": ["fc_out"],
    "granite": ["down_proj"],
    "llama": ["down_proj"],
    "mistral": ["down_proj"],
    "olmo": ["down_proj"],
    "olmo2": ["down_proj"],
    "opt": ["fc2"],
    "phi": ["fc2"],
    "phi3": ["down_proj"],
    "qwen2": ["down_proj"],
    "qwen3": ["down_proj"],
    "smollm3": ["down_proj"],
    "stablelm": ["down_proj"],
    "starcoder2": ["c_proj"],
    # encoders
    "bert": ["output.dense"],
    "clip": ["fc2"],
    "deberta": ["output.dense"],
    "deberta-v2": ["output.dense"],
    "distilbert": ["lin2"],
    "electra": ["output.dense"],
    "modernbert": ["mlp.Wo"],
    "roberta": ["output.dense"],
    "siglip": ["fc2"],
    "vit": ["mlp.fc2"],
    "wav2vec2": ["output_dense"],
    "xlm-roberta": ["output.dense"],
}

# In these families the attention's output projection, or the pooling head, ends with the target's name too.
EXCLUDED_MODULES: dict[str, list[str]] = {
    family: ["attention.output.dense"]
    for family in ("bert", "deberta", "deberta-v2", "electra", "roberta", "xlm-roberta")
} | {"siglip": ["head.mlp.fc2"]}

# Moment-DETR's decoder sees queries, which are a set: there is no order for a recurrence to run along.
CELL_PATTERNS: dict[str, dict[str, str]] = {"moment_detr": {r"decoder\.layers\.\d+\.linear2": "none"}}


def _matching(patterns: dict[str, Any] | None, path: str, default: Any) -> Any:
    """The entry whose key, a name or regular expression, the path ends with; peft's rule for `rank_pattern`."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def _base_parameters(model: nn.Module) -> int:
    """How many parameters a model has without its adapters and the copies that are trained as a whole."""
    added = (f".{PREFIX}", ".modules_to_save.", ".trainable_tokens_")
    return sum(p.numel() for name, p in model.named_parameters() if not any(part in f".{name}" for part in added))


# The tokens that a router sends to an expert are no sequence. Shared experts see all tokens, and are none of these.
EXPERTS = re.compile(r"(^|\.)(local_)?experts(\.|$)")


def _batch_first_of(parent: nn.Module, configured: bool) -> bool:
    """The layout of a module: what its block's attention says, where torch's own attention stands beside it."""
    attention = getattr(parent, "self_attn", None)
    return attention.batch_first if isinstance(attention, nn.MultiheadAttention) else configured


class READModel(BaseTuner):
    """A model with READ on the modules that its configuration names.

    Made by `peft.get_peft_model(model, READConfig(...))`, like every method of peft.

    Args:
        model: the model to adapt; its weights are frozen.
        peft_config: the configuration.
        adapter_name: the name of the first adapter.
        low_cpu_mem_usage: create the adapter's weights on the meta device, for loading.
    """

    prefix = PREFIX
    tuner_layer_cls = READLayer
    target_module_mapping = TARGET_MODULES

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        if not isinstance(model_config, Mapping):  # a model's `config` may be anything, and peft hands it on
            model_config = {"model_type": getattr(model_config, "model_type", None)}
        model_config = {"model_type": None, **model_config}
        family = model_config["model_type"]
        if peft_config.target_modules is None and peft_config.exclude_modules is None and family in EXCLUDED_MODULES:
            peft_config.exclude_modules = set(EXCLUDED_MODULES[family])  # type: ignore[assignment]
        if peft_config.cell_pattern is None and family in CELL_PATTERNS:
            peft_config.cell_pattern = dict(CELL_PATTERNS[family])
        return super()._prepare_adapter_config(peft_config, model_config)

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: READConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        settings = {
            "r": _matching(peft_config.rank_pattern, current_key, peft_config.r),
            "cell": _matching(peft_config.cell_pattern, current_key, peft_config.cell),
            "config": peft_config,
        }
        if settings["cell"] != "none" and EXPERTS.search(current_key):
            raise ValueError(
                f"READ cannot adapt {current_key!r}, one expert of a mixture: it sees only the tokens routed to it, "
                "in no order, so there is no sequence for the recurrence to run along. Leave the experts out "
                "(exclude_modules), or use cell='none' for them (cell_pattern)."
            )
        if peft_config.bidirectional and settings["cell"] != "none" and is_causal(self.model, current_key):
            raise ValueError(
                f"READ cannot be bidirectional on {current_key!r}: it belongs to a decoder, where a token must not "
                "depend on those after it. Adapt the encoder only (target_modules), or use bidirectional=False."
            )
        if isinstance(target, READLayer):
            target.update_layer(adapter_name, **settings)
            return
        layer = Linear(
            target,
            adapter_name,
            path=current_key,
            batch_first=_batch_first_of(parent, peft_config.batch_first),
            notice=self._notice,
            **settings,
        )
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter is not trainable until it is activated
        self._replace_module(parent, target_name, layer, target)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put the adapter's layers into the model, then hooks on the stacks around them."""
        if "_notice" not in self.__dict__:  # the first adapter is injected from within BaseTuner.__init__
            self._notice = Notice()
            self._load_check = model.register_load_state_dict_pre_hook(check_loaded_weights)
        # No fields: the card tells them, the configuration on disk does not.
        self.peft_config[adapter_name].base_parameters = _base_parameters(model)  # type: ignore[attr-defined]
        self.peft_config[adapter_name].adapter_name = adapter_name  # type: ignore[attr-defined]
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        for name, module in list(model.named_modules()):
            if not isinstance(module, READLayer):
                continue
            if module.is_recurrent:
                install_scope(model, name)
            parent = model.get_submodule(name.rpartition(".")[0])
            if isinstance(parent, nn.TransformerEncoderLayer):
                keep_slow_path(parent)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        model: Any = super()._unload_and_optionally_merge(*args, **kwargs)  # type: ignore[func-returns-value]
        remove_scopes(model)
        self._load_check.remove()
        return model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if torch.compiler.is_compiling():
            raise NotImplementedError("`adapter_names` does not work under torch.compile; call the model uncompiled.")
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        unknown = sorted(set(names) - {"__base__"} - set(self.peft_config))
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        with mixed_batch(self.model, names, copies=copies_in_generate(kwargs)):
            yield

    def _check_merge_allowed(self) -> None:
        # Called before any module is touched, so a refused merge leaves the model as it was.
        raise NotImplementedError(CANNOT_MERGE)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: a weighted sum of READ's weights is not the weighted sum of what they compute."""
        raise NotImplementedError(
            "READ adapters cannot be combined by adding their weights: they are not linear in them. Activate several "
            "adapters at once with `set_adapter([...])`; their outputs are then added."
        )
