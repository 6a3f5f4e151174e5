"""Bottleneck adapters, Compacter and Hyperformer as methods of peft; importing this package registers them."""

from ..peft_methods import add_peft_type, keep_cards_on_upload, refuse_unknown_weights, register

NAMES = ("BOTTLENECK", "COMPACTER", "HYPERFORMER")

for name in NAMES:
    add_peft_type(name, __package__)

from .config import BottleneckConfig, CompacterConfig, HyperformerConfig  # noqa: E402
from .model import BottleneckModel, CompacterModel, HyperformerModel  # noqa: E402

register("BOTTLENECK", BottleneckConfig, BottleneckModel)
register("COMPACTER", CompacterConfig, CompacterModel)
register("HYPERFORMER", HyperformerConfig, HyperformerModel)
keep_cards_on_upload()
refuse_unknown_weights()

__all__ = [
    "BottleneckConfig",
    "BottleneckModel",
    "CompacterConfig",
    "CompacterModel",
    "HyperformerConfig",
    "HyperformerModel",
]
