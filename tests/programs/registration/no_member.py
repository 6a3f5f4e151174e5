"""A name that is no member."""

import importlib

from peft import PeftType

type.__setattr__(PeftType, "READ", "not a member")
try:
    importlib.import_module("peft_read")
except ImportError as error:
    assert "already has a READ method" in str(error) and "not a member" in str(error)
else:
    raise AssertionError
