"""Another package's READ."""

import importlib
import os
import runpy

from peft.utils import PeftType, register_peft_method

extend_str_enum = runpy.run_path(os.environ["ENUM_EXTENSION"])["extend_str_enum"]
extend_str_enum(PeftType, "READ", "READ")  # as a peft with a READ of its own would have it


class Config:
    pass


class Model:
    prefix = "read_"


register_peft_method(name="read", config_cls=Config, model_cls=Model)
try:
    importlib.import_module("peft_read")
except ImportError as error:
    assert "already has a READ method" in str(error) and "Config" in str(error)
else:
    raise AssertionError
