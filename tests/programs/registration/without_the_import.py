"""Without the import."""

import importlib
import os

import torch
from peft import PeftConfig, PeftModel

for load in (
    lambda: PeftConfig.from_pretrained(os.environ["FOLDER"]),
    lambda: PeftModel.from_pretrained(torch.nn.Linear(1, 1), os.environ["FOLDER"]),
):
    try:
        load()
    except KeyError as error:
        assert str(error) == "'READ'"
    else:
        raise AssertionError
importlib.import_module("peft_read")
PeftConfig.from_pretrained(os.environ["FOLDER"])
