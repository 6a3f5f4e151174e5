"""A pickled member does not."""

import pickle

from peft import PeftType

try:
    pickle.loads(pickle.dumps(PeftType.LORA).replace(b"LORA", b"READ"))
except ValueError as error:
    assert "not a valid PeftType" in str(error)
else:
    raise AssertionError
