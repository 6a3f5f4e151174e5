"""READ in peft's enumeration and tables: from outside, twice, beside another's, and on every CPython we support."""

import copy
import enum
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftConfig, PeftType, get_peft_config
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

import peft_read
from peft_read import READConfig, READModel
from peft_read.adapter import enum_extension

PROGRAMS = Path(__file__).with_name("programs")


def interpreters():
    """The other Pythons of this machine, as pyenv keeps them."""
    interpreters = {}
    for root in (os.environ.get("PYENV_ROOT"), Path.home() / ".pyenv"):
        for python in sorted(Path(root or "/nonexistent").glob("versions/*/bin/python")):
            version = python.parts[-3]
            if version.startswith(("3.10.", "3.12.", "3.13.", "3.14.")):
                interpreters[version] = python
    return interpreters


@pytest.mark.parametrize("version", ["3.10", "3.12", "3.13"])
def test_the_enumeration_on_other_pythons(version):
    pythons = [path for name, path in interpreters().items() if name.startswith(f"{version}.")]
    if not pythons:
        pytest.skip(f"no Python {version} below ~/.pyenv/versions")
    command = [pythons[-1], "-I", PROGRAMS / "enum_member.py", enum_extension.__file__]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_enumeration_on_this_python():
    command = [sys.executable, "-I", PROGRAMS / "enum_member.py", enum_extension.__file__]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_peft_knows_read():
    member = PeftType.READ
    assert list(PeftType)[-1] is member and PeftType("READ") is member and isinstance(member, enum.Enum)
    assert PEFT_TYPE_TO_CONFIG_MAPPING["READ"] is READConfig and PEFT_TYPE_TO_TUNER_MAPPING[member] is READModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == "readapter_" == READModel.prefix
    assert member not in PEFT_TYPE_TO_MIXED_MODEL_MAPPING
    assert isinstance(get_peft_config({"peft_type": "READ", "r": 8}), READConfig)


def test_a_configuration_goes_through_json_and_pickle(tmp_path):
    config = READConfig(r=8, cell="gru", target_modules=["fc2"], rank_pattern={"fc1": 2}, pvla={"mass": 0.5})
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "READ"
    assert not (tmp_path / "README.md").exists()  # a configuration alone is no adapter
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert loaded == config and loaded.peft_type is PeftType.READ
    assert pickle.loads(pickle.dumps(config)) == config == copy.deepcopy(config)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the scenarios start from copies of one process")
def test_registration_in_separate_processes(tmp_path):
    config = READConfig(target_modules=["fc2"])
    config.save_pretrained(tmp_path)
    environment = {
        **os.environ,
        "FOLDER": str(tmp_path),
        "PICKLED": pickle.dumps(config).hex(),
        "ENUM_EXTENSION": enum_extension.__file__,
    }
    command = [sys.executable, PROGRAMS / "registration"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "FAILED" not in result.stdout and result.stdout.count("ran ") == 6, result.stdout


def test_the_package_exports_what_the_adapter_room_does():
    assert peft_read.READConfig is READConfig and peft_read.READModel is READModel
