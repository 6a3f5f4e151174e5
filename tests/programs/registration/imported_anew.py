"""Importing, reloading and importing anew."""

import importlib
import sys

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as configs
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as tuners

adapter = importlib.import_module("peft_read.adapter")
first = PeftType.READ
importlib.reload(adapter.config)
importlib.reload(adapter)
assert configs["READ"] is adapter.READConfig and PeftType.READ is first
for name in [name for name in sys.modules if name.startswith("peft_read.adapter")]:
    del sys.modules[name]
adapter = importlib.import_module("peft_read.adapter")
assert configs["READ"] is adapter.READConfig and tuners["READ"] is adapter.READModel
assert PeftType.READ is first and list(PeftType).count("READ") == 1
adapter.READConfig(target_modules=["fc2"])
