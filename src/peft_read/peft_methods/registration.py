"""Registering methods with peft: the only file that touches peft's enumeration and tables."""

from __future__ import annotations

import functools
from typing import Any

import peft
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method

from .card import renew_model_cards
from .enum_extension import extend_str_enum
from .undo import Before, undone_on_error

TABLES: tuple[dict[Any, Any], dict[Any, Any]] = (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING)
OURS: set[str] = set()  # the names of the methods that this package has registered

__all__ = ["add_peft_type", "keep_cards_on_upload", "refuse_unknown_weights", "register"]


def _claimed_by_someone_else(name: str, owner: object) -> ImportError:
    return ImportError(
        f"peft {peft.__version__} already has a {name} method ({owner!r}), which is not this package's. Adapters "
        "saved by one cannot be read by the other; install a version of peft-read made for this peft, or a peft "
        "without it."
    )


def add_peft_type(name: str, package: str) -> None:
    """Make `PeftType.<name>` exist.

    Args:
        name: of the method, in capitals.
        package: which adds it; a second call by the same one changes nothing.

    Raises:
        ImportError: if peft has a method of this name of its own.
    """
    existing = getattr(PeftType, name, None)
    if existing is not None and getattr(existing, "added_by", None) != package:
        raise _claimed_by_someone_else(name, TABLES[0].get(name, existing))
    try:
        member: Any = extend_str_enum(PeftType, name, name)
    except ValueError as error:
        raise _claimed_by_someone_else(name, error) from error
    member.added_by = package


def register(name: str, config_cls: type, model_cls: Any) -> None:
    """Enter the two classes in peft's tables; a reloaded module replaces what it had entered before.

    Args:
        name: of the method, in capitals.
        config_cls: its configuration.
        model_cls: its tuner, whose `prefix` all parameters, files and tables of the method carry. peft tests for
            prefixes with `in`, so it must not be a part of other names.

    Raises:
        ImportError: if another package has registered a method of this name.
    """
    owner = TABLES[0].get(name)
    OURS.add(name)
    if owner is None:
        register_peft_method(name=name.lower(), config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix)
        return
    if owner.__module__ != config_cls.__module__:
        raise _claimed_by_someone_else(name, owner)
    for table, cls in zip(TABLES, (config_cls, model_cls), strict=True):
        table[getattr(PeftType, name)] = cls


def keep_cards_on_upload() -> None:
    """Let `PeftModel.push_to_hub` upload the card of an adapter of this package.

    transformers' `push_to_hub` saves the model, card and all, and then writes a card for transformers models over it.
    Between that and the upload there is one door, this method; models of other methods pass through it unchanged.
    """
    upload = getattr(PeftModel, "_upload_modified_files", None)
    if upload is None or getattr(upload, "keeps_our_cards", False):
        return

    @functools.wraps(upload)
    def upload_with_card(self: PeftModel, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        if any(config.peft_type in OURS for config in self.peft_config.values()):
            self.create_or_update_model_card(str(working_dir))
            renew_model_cards(working_dir, self.peft_config)
        return upload(self, working_dir, *args, **kwargs)

    upload_with_card.keeps_our_cards = True  # type: ignore[attr-defined]
    PeftModel._upload_modified_files = upload_with_card  # type: ignore[method-assign, assignment]


def refuse_unknown_weights() -> None:
    """Let `PeftModel` load an adapter of this package completely or not at all.

    The hooks of the base model see its own keys only, and peft silently drops what else a file holds. After a refusal
    the model is as it was before, without the adapter if the call was to add it: peft would keep its configuration,
    and its layers. Other methods pass through unchanged.
    """
    load, create = PeftModel.load_adapter, PeftModel.from_pretrained.__func__  # type: ignore[attr-defined]
    if getattr(load, "refuses_unknown_weights", False):
        return

    @functools.wraps(load)
    def load_whole(self: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        if self.peft_type not in OURS:
            return load(self, model_id, adapter_name, *args, **kwargs)
        with undone_on_error(self):
            check = self.register_load_state_dict_pre_hook(functools.partial(_refuse_unknown, source=model_id))
            try:
                return load(self, model_id, adapter_name, *args, **kwargs)
            finally:
                check.remove()

    @functools.wraps(create)
    def create_whole(cls: type[PeftModel], model: Any, *args: Any, **kwargs: Any) -> Any:
        before = Before(model)
        try:
            return create(cls, model, *args, **kwargs)
        except Exception:
            configs = getattr(model, "peft_config", None)
            if isinstance(configs, dict) and any(config.peft_type in OURS for config in configs.values()):
                before.restore()
            raise

    load_whole.refuses_unknown_weights = True  # type: ignore[attr-defined]
    PeftModel.load_adapter = load_whole  # type: ignore[method-assign, assignment]
    PeftModel.from_pretrained = classmethod(create_whole)  # type: ignore[method-assign, assignment]


def _refuse_unknown(module: Any, state_dict: dict[str, Any], prefix: str, *_: Any, source: Any) -> None:
    """Pre-hook of a `PeftModel` before weights are loaded: refuse those that it has no place for."""
    own = module.state_dict(keep_vars=True)
    unknown = sorted(key for key in state_dict if key.startswith(prefix) and key not in own)
    if not unknown:
        return
    base = f"{prefix}base_model.model."
    module.base_model.check_weights(base, {key: value for key, value in state_dict.items() if key.startswith(base)})
    raise ValueError(
        f"the checkpoint {source} has {len(unknown)} weights that this model has no place for, such as "
        f"{unknown[0]!r}. Nothing was loaded"
    )
