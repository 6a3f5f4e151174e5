"""Configurations of video-language models that begin as that of a plain text model."""

from __future__ import annotations

from typing import Any

__all__ = ["FIELDS_OF_THE_CLASS", "FromTextConfig"]

# What belongs to the class of a configuration and must not travel from a plain checkpoint to its multimodal sibling.
FIELDS_OF_THE_CLASS = frozenset({"model_type", "architectures", "transformers_version", "_name_or_path", "dtype"})


class FromTextConfig:
    """A mixin for configurations that add fields to `BartConfig` or `T5Config`."""

    @classmethod
    def from_plain_config(cls, plain_config: Any, **options: Any) -> Any:
        """The configuration of a plain BART or T5 model with the added fields.

        Args:
            plain_config: a `BartConfig` or `T5Config`.
            **options: the added fields, and any field of the plain configuration to override.
        """
        fields = {name: value for name, value in plain_config.to_dict().items() if name not in FIELDS_OF_THE_CLASS}
        return cls(**{**fields, **options})
