"""READ as a method of peft; importing this package registers `PeftType.READ`."""

from .registration import add_peft_type, keep_cards_on_upload, refuse_unknown_weights, register

add_peft_type()

from .config import READConfig  # noqa: E402
from .model import READModel  # noqa: E402
from .scope import sequence_scope  # noqa: E402

register(READConfig, READModel)
keep_cards_on_upload()
refuse_unknown_weights()

__all__ = ["READConfig", "READModel", "sequence_scope"]
