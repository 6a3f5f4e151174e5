"""READModel: READ as one of peft's tuners, with its default targets."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Mapping
from typing import Any

from peft.utils import TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel

from ..peft_methods import AdapterModel
from ..peft_methods.stacks import EXPERTS, blocks_around, is_causal, sees_batch_first
from ..peft_methods.tuner import in_layers
from .config import READConfig
from .hooks import install_scopes, remove_scopes
from .layer import CANNOT_MERGE, Linear, READLayer
from .sequences import Notice
from .targets import PARTS, block_width, default_targets, in_and_out, linear_targets, sets_in
from .untrained import forget_gradients, named, watch_gradients

__all__ = ["TARGET_MODULES", "READModel"]

# The backbones of this project: the paper adapts the language model's blocks, not those of the fusion beside it, and
# the structure of UMT's blocks does not show where they end.
TARGET_MODULES: dict[str, list[str]] = {
    "moment_detr": ["linear2"],
    "umt": ["ffn.mapping.3", "ffn1.mapping.3", "ffn2.mapping.3"],
    "vg_bart": ["fc2"],
    "vg_t5": ["wo"],
}

# Moment-DETR's decoder sees queries, which are unordered, so there is no sequence for a recurrence.
CELL_PATTERNS: dict[str, dict[str, str]] = {"moment_detr": {r"decoder\.layers\.\d+\.linear2": "none"}}

logger = logging.getLogger(__name__)


def _matching(patterns: dict[str, Any] | None, path: str, default: Any) -> Any:
    """The entry whose key, a name or regular expression, the path ends with; peft's rule for `rank_pattern`."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def _check_tokens(model: nn.Module, tokens: list[int] | dict[str, list[int]] | None) -> None:
    """Refuse ids of tokens that an embedding does not have, before anything is put into the model."""
    if tokens is None:
        return
    for key, ids in (tokens if isinstance(tokens, dict) else {"": tokens}).items():
        embeddings = [module for name, module in model.named_modules() if key and f".{name}".endswith(f".{key}")]
        if not key and isinstance(model, PreTrainedModel):
            try:
                embeddings = [model.get_input_embeddings()]
            except NotImplementedError as error:
                raise ValueError(
                    f"`trainable_token_indices` is a list, and {type(model).__name__} has no input embedding of "
                    "tokens; name the embedding, as in {'embed_tokens': [1, 2]}"
                ) from error
        sizes = [size for module in embeddings if isinstance(size := getattr(module, "num_embeddings", None), int)]
        if sizes and max(ids, default=-1) >= min(sizes):
            raise ValueError(
                f"`trainable_token_indices` has the token {max(ids)}, and the embedding has {min(sizes)} of them; "
                "resize the model's embeddings first (resize_token_embeddings)"
            )


class READModel(AdapterModel):
    """A model with READ on the modules that its configuration names.

    Made by `peft.get_peft_model(model, READConfig(...))`, like every method of peft.

    Args:
        model: the model to adapt; its weights are frozen.
        peft_config: the configuration.
        adapter_name: the name of the first adapter.
        low_cpu_mem_usage: create the adapter's weights on the meta device, for loading.
    """

    # The plain "read_" would match inside names such as "thread_ff", and peft tests for prefixes with `in`.
    prefix = "readapter_"
    tuner_layer_cls = READLayer
    cannot_merge = CANNOT_MERGE
    cannot_add = (
        "READ adapters cannot be combined by adding their weights: they are not linear in them. Activate several "
        "adapters at once with `model.base_model.set_adapter([...])`; their outputs are then added."
    )
    target_module_mapping = TARGET_MODULES
    target_words = (*PARTS, "all-linear")

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        if not isinstance(model_config, Mapping):  # a model's `config` may be anything, and peft hands it on
            model_config = {"model_type": getattr(model_config, "model_type", None)}
        model_config = {"model_type": None, **model_config}
        family = self._family = model_config["model_type"]
        part = peft_config.target_modules
        if part is None and family in TARGET_MODULES:
            peft_config.target_modules = set(TARGET_MODULES[family])  # type: ignore[assignment]
        elif part is None or part in PARTS:
            as_list = peft_config.layers_to_transform is not None
            peft_config.target_modules = default_targets(self._injected, part, as_list=as_list)
            if as_list:  # peft matches a name that is a whole path in every layer, layers_to_transform or not
                peft_config.target_modules = in_layers(self._injected, peft_config)
        elif part == "all-linear":
            targets = linear_targets(self._injected)
            if targets is None and isinstance(self._injected, PreTrainedModel):
                raise ValueError(
                    f"target_modules='all-linear' finds nothing to adapt in {type(self._injected).__name__}: none of "
                    "its linear layers stands in a block and sees the tokens of a sequence. Name modules in "
                    "`target_modules`, or use a method without a recurrence, such as LoRA."
                )
            if targets is not None:
                peft_config.target_modules, left_out = targets
                if left_out:
                    logger.warning(
                        "READ leaves %s out of 'all-linear': they see no sequence of their own. Name them in "
                        "`target_modules` to adapt them anyway.",
                        named(left_out),
                    )
        if peft_config.cell_pattern is None:
            sets = sets_in(self._injected)
            if family in CELL_PATTERNS:
                peft_config.cell_pattern = dict(CELL_PATTERNS[family])
            elif sets is not None and peft_config.cell != "none":
                peft_config.cell_pattern = {sets: "none"}
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
        blocks = blocks_around(self.model, current_key)
        batch_first = peft_config.batch_first and sees_batch_first(self.model, current_key)
        if isinstance(target, READLayer):
            target.check_layout(batch_first)
            target.update_layer(adapter_name, **settings)
            return
        chunked = any(getattr(block, "chunk_size_feed_forward", 0) for block in blocks)
        if chunked and settings["cell"] != "none" and "attention" not in current_key:
            raise ValueError(
                f"READ cannot adapt {current_key!r} of a model with `chunk_size_feed_forward`: its block calls it "
                "with pieces of the sequences, and the recurrence would restart in each. Set "
                "chunk_size_feed_forward=0 in the model's configuration, which changes only the memory it "
                "needs, or use cell='none'."
            )
        layer = Linear(
            target,
            adapter_name,
            path=current_key,
            batch_first=batch_first,
            chunked=chunked,
            notice=self._notice,
            width=block_width(self.model, current_key) if in_and_out(target) is None else None,
            **settings,
        )
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter is not trainable until it is activated
        self._replace_module(parent, target_name, layer, target)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put the adapter's layers into the model, then hooks on the stacks around them."""
        _check_tokens(model, getattr(self.peft_config[adapter_name], "trainable_token_indices", None))
        if "_notice" not in self.__dict__:  # the first adapter is injected from within BaseTuner.__init__
            self._notice = Notice()
        patterns = getattr(self.peft_config[adapter_name], "cell_pattern", None)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._warn_of_unmatched(model, adapter_name, patterns)
        for name, module in list(model.named_modules()):
            if isinstance(module, READLayer):
                install_scopes(model, name, batch_first=module.batch_first)
        watch_gradients(model)

    def _warn_of_unmatched(self, model: nn.Module, adapter_name: str, patterns: dict[str, str] | None) -> None:
        """Warn of keys of `cell_pattern` that match no adapted module, as peft does of those of `rank_pattern`."""
        paths = [path for path, module in model.named_modules()
                 if isinstance(module, READLayer) and adapter_name in module.readapter_down]  # fmt: skip
        chosen = {*CELL_PATTERNS.get(self._family, {}), sets_in(model)}  # not by the user; a saved one has them too
        unmatched = [key for key in patterns or () if key not in chosen
                     and not any(_matching({key: True}, path, False) for path in paths)]  # fmt: skip
        if unmatched:
            warnings.warn(
                f"The following cell_pattern keys did not match any targeted module and were ignored: {unmatched}.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, TrainableTokensWrapper):  # its weight is computed; the embedding inside has its own
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        remove_scopes(model)
        forget_gradients(model)
        return model
