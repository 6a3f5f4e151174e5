"""READ as a method of peft; importing this package registers `PeftType.READ`."""

from ..peft_methods import add_peft_type, enum_extension, keep_cards_on_upload, refuse_unknown_weights, register

add_peft_type("READ", __package__)

from .config import READConfig  # noqa: E402
from .model import READModel  # noqa: E402
from .running import sequence_scope  # noqa: E402

register("READ", READConfig, READModel)
keep_cards_on_upload()
refuse_unknown_weights()

__all__ = ["READConfig", "READModel", "enum_extension", "sequence_scope"]
