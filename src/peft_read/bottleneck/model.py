"""The tuners of the bottleneck family, with their default targets and what they share over layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..peft_methods import AdapterModel
from ..peft_methods.default_targets import all_linear, default_targets
from ..peft_methods.endings import (
    PARTS,
    attention_endings,
    block_width,
    feed_forward_endings,
    in_and_out,
    is_inside_an_adapter,
    skips_its_last_layer,
)
from ..peft_methods.loaded import WeightsCheck
from ..peft_methods.stacks import sees_batch_first
from ..peft_methods.tuner import in_layers
from .config import CompacterConfig, HyperformerConfig
from .hooks import generate_in, keep_tasks_in, remove_hooks
from .hypernetwork import Hypernetworks
from .layer import Bottleneck, BottleneckLayer, CompacterLayer, GeneratedBottleneck, HyperformerLayer
from .positions import positions_of, stacks_of
from .samplers import LentRule
from .shared import NAME, BottleneckState, CompacterShared, HyperformerShared, SharedRule

__all__ = ["BottleneckModel", "CompacterModel", "HyperformerModel"]

CANNOT_MERGE = (
    "{} cannot be merged into the base weights: its activation is not linear, so no weight matrix computes "
    "y + Up(act(Down(y))). Keep the adapter beside the model, or drop it with `unload()`."
)
CANNOT_ADD = (
    "{} adapters cannot be combined by adding their weights: they are not linear in them. Activate several adapters "
    "at once with `model.base_model.set_adapter([...])`; their outputs are then added."
)
# The names that weights have below the name of their adapter, which peft takes for those of adapters.
RESERVED = {"down_sampler", "up_sampler", "norm_before", "norm_after", "down_rule", "up_rule", "rule", "stacks",
            "task_embeddings", "generators", NAME}  # fmt: skip


def block_endings(model: nn.Module) -> list:
    """The last linear layers of the attention and feed-forward blocks, in the model's order."""
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    endings = {ending.path: ending for ending in [*attention_endings(model), *feed_forward_endings(model)]}
    return sorted(endings.values(), key=lambda ending: order[ending.path])


ENDINGS: dict[str | None, tuple[Callable[[nn.Module], list], str]] = {
    "feed_forward": (feed_forward_endings, "feed-forward blocks"),
    "attention": (attention_endings, "attention blocks"),
    None: (block_endings, "attention or feed-forward blocks"),
}


class _Check(WeightsCheck):
    """Looks at weights before they are loaded, and at whose tasks they are."""

    settings = "r, reduction_factor, norms, tasks, share, phm_dim and the like"

    def __init__(self, prefix: str, layer_cls: type, method: str) -> None:
        super().__init__(prefix, layer_cls)
        self.method = method

    def refuse(self, unknown: list[str], missing: list[str]) -> None:
        """Name the tasks in which a checkpoint and the model differ.

        Raises:
            ValueError: if there are any.
        """
        further, lacking = self._tasks_in(unknown), self._tasks_in(missing)
        if further or lacking:
            differences = [
                text
                for text, tasks in (("has", further), ("lacks", lacking))
                for text in [f"{text} weights of {', '.join(map(repr, tasks))}"]
                if tasks
            ]
            raise ValueError(
                f"the tasks of the checkpoint differ from those of the configuration: it {' and '.join(differences)}. "
                "Load it with its own configuration; a task is added afterwards with `add_task`. Nothing was loaded"
            )

    def _tasks_in(self, keys: list[str]) -> list[str]:
        names = {part for key in keys if self.is_of_method(key) for part in key.split(".") if part.startswith("task_")}
        return sorted(part.removeprefix("task_") for part in names - {"task_embeddings"})


class BottleneckModel(AdapterModel):
    """A model with bottleneck adapters on the modules that its configuration names.

    Made by `peft.get_peft_model(model, BottleneckConfig(...))`, like every method of peft.

    Args:
        model: the model to adapt; its weights are frozen.
        peft_config: the configuration.
        adapter_name: the name of the first adapter.
        low_cpu_mem_usage: create the adapter's weights on the meta device, for loading.
    """

    prefix = "bottleneckadapter_"
    tuner_layer_cls = BottleneckState
    target_module_mapping = {}
    target_words = ("feed_forward", "attention", *PARTS, "all-linear")
    layer_cls: ClassVar[type[BottleneckLayer]] = BottleneckLayer
    method: ClassVar[str] = "Bottleneck"
    cannot_merge = CANNOT_MERGE.format("A bottleneck adapter")
    cannot_add = CANNOT_ADD.format("Bottleneck")

    def _weights_check(self) -> Callable[..., None]:
        return _Check(self.prefix, self.tuner_layer_cls, self.method)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # Weights lie at any depth below the adapter's name, which peft expects directly above them.
        before, mark, after = key.partition(f".{cls.prefix}parts.{adapter_name}.")
        if mark:
            return f"{before}.{cls.prefix}parts.{after}"
        return super()._remove_adapter_name_from_key(key, adapter_name)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        if not isinstance(model_config, Mapping):  # a model's `config` may be anything, and peft hands it on
            model_config = {"model_type": getattr(model_config, "model_type", None)}
        chosen = peft_config.target_modules
        if chosen is None or (isinstance(chosen, str) and (chosen in ENDINGS or chosen in PARTS)):
            endings_of, blocks = ENDINGS[chosen if chosen in ENDINGS else None]
            as_list = peft_config.layers_to_transform is not None
            part = chosen if chosen in PARTS else None
            peft_config.target_modules = default_targets(
                self._injected, part, as_list=as_list, endings_of=endings_of, blocks=blocks, method=self.method
            )
            if as_list:  # peft matches a name that is a whole path in every layer, layers_to_transform or not
                peft_config.target_modules = in_layers(self._injected, peft_config)
        elif isinstance(chosen, str) and chosen.lower() == "all-linear":
            peft_config.target_modules = all_linear(self._injected, peft_config.task_type)
        return super()._prepare_adapter_config(peft_config, {"model_type": None, **model_config})

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        self._check_other_methods()
        name = config.adapter_name
        tasks = {f"task_{task}" for other in self.peft_config.values() for task in getattr(other, "tasks", None) or ()}
        if name in RESERVED | tasks:
            raise ValueError(
                f"an adapter of {self.method} cannot be called {name!r}, the name of a part of its weights"
            )

    def _check_other_methods(self) -> None:
        """Refuse a model that has adapters of another method of the family, which looks for its layers as this one."""
        states = [module for module in self._injected.modules() if isinstance(module, BottleneckState)]
        other = next((state.prefix for state in states if state.prefix != self.prefix), None)
        if other is not None:
            methods = {cls.prefix: cls.method for cls in (BottleneckModel, CompacterModel, HyperformerModel)}
            raise ValueError(
                f"this model has adapters of {methods[other]} already, and {self.method} cannot be added to them: the "
                "two would take each other's layers for their own. Take the first off with `unload()`, or adapt a "
                "second base model"
            )

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put the adapter's layers into the model, and beside them what they share."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        keep_tasks_in(model)

    def _deviation(self) -> float | None:
        """The deviation that the base model draws its own linear layers with, if it tells one."""
        config: Any = getattr(self._injected, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        values = (getattr(config, name, None) for name in ("init_std", "initializer_range"))
        return next((value for value in values if isinstance(value, float)), None)

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        if skips_its_last_layer(parent):
            raise ValueError(
                f"{self.method} cannot adapt {current_key!r}: torch.nn.MultiheadAttention reads the weights of its "
                "last layer without calling it. Leave it out (exclude_modules)."
            )
        layer: BottleneckLayer
        if isinstance(target, BottleneckLayer):
            layer = target
        else:
            width = block_width(self.model, current_key) if in_and_out(target) is None else None
            batch_first = sees_batch_first(self.model, current_key)
            layer = self._new_layer(target, path=current_key, batch_first=batch_first, width=width)
        r = peft_config.width(layer.out_features, current_key)
        layer.update_layer(
            adapter_name,
            self._new_bottleneck(peft_config, adapter_name, layer, r, current_key),
            r=r,
            inference_mode=peft_config.inference_mode,
        )
        if layer is target:
            return
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter is not trainable until it is activated
        self._replace_module(parent, target_name, layer, target)

    def _new_layer(self, target: nn.Module, **kwargs: Any) -> BottleneckLayer:
        return self.layer_cls(target, **kwargs)

    def _new_bottleneck(self, config: Any, adapter_name: str, layer: BottleneckLayer, r: int, path: str) -> nn.Module:
        bottleneck = Bottleneck(layer.out_features, r, config)
        bottleneck.reset_parameters(config.init_weights, self._deviation())
        return bottleneck

    def add_task(self, task: str, *, like: str | None = None, adapter_name: str | None = None) -> None:
        """Let an adapter serve a further task, with weights of its own for what the tasks do not share.

        Optimizers made before do not know the new weights.

        Args:
            task: the name of the task.
            like: the task whose weights it begins with; newly drawn ones if absent.
            adapter_name: the adapter; the active one if absent.

        Raises:
            ValueError: if the adapter serves the task already, or no tasks at all, or does not know `like`.
        """
        adapter_name = self.active_adapters[0] if adapter_name is None else adapter_name
        config: Any = self.peft_config[adapter_name]
        if config.tasks is None:
            raise ValueError(f"adapter {adapter_name!r} knows no tasks; make it with `tasks=[...]`")
        known = ", ".join(map(repr, config.tasks))
        if task in config.tasks:
            raise ValueError(f"adapter {adapter_name!r} serves task {task!r} already; it serves {known}")
        if like is not None and like not in config.tasks:
            raise ValueError(
                f"task {like!r}, to begin with, is unknown to adapter {adapter_name!r}, which serves {known}"
            )
        type(config)(**{**config.to_dict(), "tasks": [*config.tasks, task]})  # raises where the name will not do
        # Of its own, since one configuration may have made the adapters of several models, or several of one.
        config = self.peft_config[adapter_name] = copy.copy(config)
        config.tasks = [*config.tasks, task]
        for module in self.model.modules():
            if isinstance(module, BottleneckState) and adapter_name in module.parts:
                add: Any = getattr(module.parts[adapter_name], "add_task", None)
                if add is not None:
                    add(task, like, config.init_weights, self._deviation())

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        remove_hooks(model)
        if hasattr(model, NAME):
            delattr(model, NAME)
        return model

    def _shared(self, adapter_name: str, kind: type, make: Callable[[], nn.Module]) -> Any:
        """What an adapter's layers share, a child of the adapted model; made for the first of them.

        Args:
            adapter_name: the adapter's name.
            kind: the class of the module that holds it.
            make: makes it, with initial weights.
        """
        model = self._injected
        shared: Any = getattr(model, NAME, None)
        if shared is None:
            shared = kind()
            shared.train(model.training)
            model.add_module(NAME, shared)
        if adapter_name not in shared.parts:
            own = (p for name, p in model.named_parameters() if f".{self.prefix}" not in f".{name}")
            shared.add(adapter_name, make(), like=next((p for p in own if p.is_floating_point()), None))
        return shared


class CompacterModel(BottleneckModel):
    """A model with Compacter's adapters on the modules that its configuration names.

    Made by `peft.get_peft_model(model, CompacterConfig(...))`; the arguments are those of `BottleneckModel`.
    """

    prefix = "compacter_"
    layer_cls = CompacterLayer
    method = "Compacter"
    cannot_merge = CANNOT_MERGE.format("Compacter")
    cannot_add = CANNOT_ADD.format("Compacter")

    @staticmethod
    def _new_rule(config: CompacterConfig) -> SharedRule:
        shared = SharedRule(config.phm_dim)
        shared.rule.reset_parameters(config.init_weights)
        return shared

    def _new_bottleneck(self, config: Any, adapter_name: str, layer: BottleneckLayer, r: int, path: str) -> nn.Module:
        rule = None
        if config.shared_rule == "model":
            shared = self._shared(adapter_name, CompacterShared, lambda: self._new_rule(config))
            rule = LentRule(shared.parts[adapter_name], "rule")
        bottleneck = Bottleneck(layer.out_features, r, config, rule)
        bottleneck.reset_parameters(config.init_weights, self._deviation())
        return bottleneck


class HyperformerModel(BottleneckModel):
    """A model with adapters, on the modules that its configuration names, whose weights are generated.

    Made by `peft.get_peft_model(model, HyperformerConfig(tasks=[...]))`; the arguments are those of `BottleneckModel`.
    """

    prefix = "hyperformer_"
    layer_cls = HyperformerLayer
    method = "Hyperformer"
    cannot_merge = CANNOT_MERGE.format("Hyperformer")
    cannot_add = CANNOT_ADD.format("Hyperformer")

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        self.__dict__["_positions"] = positions_of(self._target_widths(peft_config, model), peft_config, model)

    def _target_widths(self, config: Any, model: nn.Module) -> dict[str, int]:
        """The width d of the output of each target, by path."""
        widths: dict[str, int] = {}
        for path, module in model.named_modules():
            if not path or not self._check_target_module_exists(config, path) or is_inside_an_adapter(model, path):
                continue
            base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            in_and_out_widths = in_and_out(base)
            width = in_and_out_widths[1] if in_and_out_widths is not None else block_width(model, path)
            if width is not None:
                widths[path] = width
        return widths

    def _create_and_replace(self, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        self.__dict__["_networks"] = self._shared(
            adapter_name, HyperformerShared, lambda: self._new_networks(peft_config)
        )
        super()._create_and_replace(peft_config, adapter_name, *args, **kwargs)

    def _new_networks(self, config: HyperformerConfig) -> Hypernetworks:
        networks = Hypernetworks(config, list(self._positions.values()))
        networks.reset_parameters(config.init_weights, self._deviation())
        return networks

    def _new_layer(self, target: nn.Module, **kwargs: Any) -> BottleneckLayer:
        return HyperformerLayer(target, shared=self._networks, **kwargs)

    def _new_bottleneck(self, config: Any, adapter_name: str, layer: BottleneckLayer, r: int, path: str) -> nn.Module:
        return GeneratedBottleneck(self._positions[path], config)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put the adapter's layers into the model, and hooks on the stacks that generate their weights."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        stacks = stacks_of(list(self._positions), model)
        for path, position in self._positions.items():
            generate_in(model.get_submodule(stacks[path][0]), self._networks, position.stack)
