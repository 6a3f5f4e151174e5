"""What every peft method of this package needs: registration, configuration, targets, loading, cards."""

from .configuration import AdapterConfig
from .registration import add_peft_type, keep_cards_on_upload, refuse_unknown_weights, register
from .tuner import AdapterModel

__all__ = [
    "AdapterConfig",
    "AdapterModel",
    "add_peft_type",
    "keep_cards_on_upload",
    "refuse_unknown_weights",
    "register",
]
