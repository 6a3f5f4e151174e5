"""AdapterModel: the tuner of a method whose adapters stay beside the weights and cannot be merged into them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import NoMatchingPeftModuleError
from torch import nn

from .fast_path import keep_slow_paths, restore_fast_paths
from .loaded import WeightsCheck
from .mixed import copies_in_generate, mixed_batch
from .undo import undone_on_error
from .unmatched import absent_names, check_layers, nothing_matched
from .wrapped import AsUnwrapped, without_wrappers

__all__ = ["AdapterModel", "in_layers"]


def in_layers(model: nn.Module, config: Any) -> set[str]:
    """The targets of a configuration without those that are paths of layers it does not transform.

    Raises:
        ValueError: the model does not have a layer that the configuration names.
    """
    check_layers(model, config)
    indices, patterns = config.layers_to_transform, config.layers_pattern or r"[^.]+"
    chosen = {indices} if isinstance(indices, int) else set(indices or ())
    names = "|".join([patterns] if isinstance(patterns, str) else patterns)
    layers = {name: re.search(rf"(?:^|\.)(?:{names})\.(\d+)(?:\.|$)", name) for name in config.target_modules or ()}
    return {name for name, layer in layers.items() if layer is None or int(layer[1]) in chosen}


class AdapterModel(BaseTuner):
    """A model with adapters on the outputs of its modules; merging is refused, mixed batches are served.

    Attributes:
        cannot_merge: why, for the message.
        target_words: what `target_modules` may be beside names and expressions, for the message.
        cannot_add: why adapters cannot be combined by adding their weights.
    """

    cannot_merge: ClassVar[str]
    cannot_add: ClassVar[str]
    target_words: ClassVar[tuple[str, ...]]

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        configs = getattr(model, "peft_config", None)
        before = dict(configs) if isinstance(configs, dict) else {}
        try:
            super().__init__(model, *args, **kwargs)
        except Exception:
            if before:  # peft puts the new one among them, in the place of one of its name, before anything is checked
                configs.clear()  # type: ignore[union-attr]
                configs.update(before)  # type: ignore[union-attr]
            raise

    def _weights_check(self) -> Callable[..., None]:
        """The hook that looks at weights before they are loaded."""
        return WeightsCheck(self.prefix, self.tuner_layer_cls)

    def check_weights(self, prefix: str, weights: dict[str, Any]) -> None:
        """Look at weights as the hook does that looks at them before they are loaded.

        Args:
            prefix: of the base model's keys.
            weights: those below it.
        """
        self._weights_check()(self.model, weights, prefix)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        given = {without_wrappers(key): value for key, value in state_dict.items()}
        view: Any = AsUnwrapped(model)
        chosen = super()._get_adapter_state_dict(view, config, adapter_name, given, unwanted_adapter_names)
        if given and not chosen:  # processes that hold no part of a gathered model are given an empty dictionary
            raise ValueError(
                f"none of the {len(given)} weights, such as {next(iter(given))!r}, is one of the adapter "
                f"{adapter_name!r}, so nothing would be saved: the modules around it are renamed by a wrapper that is "
                "not known here, or these are the weights of another model. Save the model that is inside the wrapper"
            )
        return chosen

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        given = {without_wrappers(key): value for key, value in state_dict.items()}
        view: Any = AsUnwrapped(model)
        placed = super()._remap_adapter_state_dict_for_load(view, config, adapter_name, given)
        return view.own_keys(placed)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put the adapter's layers into the model; a configuration that is refused leaves the model as it was.

        Raises:
            ValueError: nothing in the model is what the configuration names; near names are listed.
        """
        try:
            with undone_on_error(model):
                self._inject(model, adapter_name, *args, **kwargs)
        except Exception:
            self.peft_config.pop(adapter_name, None)
            raise

    def _inject(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        self.__dict__["_injected"] = model  # not a submodule; peft hands the next method its configuration alone
        if "_load_check" not in self.__dict__:  # from within BaseTuner.__init__
            self._load_check = model.register_load_state_dict_pre_hook(self._weights_check())
        # No fields: they tell about the base model, and are for the card and the saved configuration.
        config: Any = self.peft_config[adapter_name]
        config.base_mapping = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
        config.base_parameters = self._base_parameters(model)
        config.adapter_name = adapter_name
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except NoMatchingPeftModuleError as error:
            message = nothing_matched(model, config, self.target_words)
            if message is None:
                raise
            raise NoMatchingPeftModuleError(message) from error
        keep_slow_paths(model, self.tuner_layer_cls)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        peft_config = super()._prepare_adapter_config(peft_config, model_config)
        check_layers(self._injected, peft_config)
        absent = absent_names(self._injected, peft_config.target_modules)
        # The names that a family's mapping gives are those of all its variants, which no model has all of.
        own = self.target_module_mapping.get(str(model_config.get("model_type")), ())
        unknown = [name for name in absent if name not in own]
        if unknown and len(absent) < len(peft_config.target_modules) and not peft_config.inference_mode:
            warnings.warn(
                f"`target_modules` names {', '.join(map(repr, unknown))}, and {type(self._injected).__name__} has no "
                "such module: the others alone are adapted",
                stacklevel=2,
            )
        return peft_config

    def _base_parameters(self, model: nn.Module) -> int:
        """How many parameters a model has without its adapters and the copies that are trained as a whole."""
        added = (f".{self.prefix}", ".modules_to_save.", ".trainable_tokens_")
        return sum(p.numel() for name, p in model.named_parameters() if not any(part in f".{name}" for part in added))

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        model: Any = super()._unload_and_optionally_merge(*args, **kwargs)  # type: ignore[func-returns-value]
        self._load_check.remove()
        restore_fast_paths(model)
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
        with mixed_batch(self.model, names, copies=copies_in_generate(self.model, args, kwargs)):
            yield

    def _check_merge_allowed(self) -> None:
        # Called before any module is touched, so a refused merge leaves the model as it was.
        raise NotImplementedError(self.cannot_merge)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: a weighted sum of the weights is not the weighted sum of what they compute."""
        raise NotImplementedError(self.cannot_add)
