"""READ in peft's enumeration and tables: from outside, twice, beside another's, and on every CPython we support."""

import copy
import enum
import json
import os
import pickle
import subprocess
import sys
import textwrap
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

# What must hold of an added member. Run here, and by other interpreters that have neither torch nor peft.
PROPERTIES = """
import copy, enum, json, pickle, sys

class Method(str, enum.Enum):
    A = "A"
    B = "B"

Method.__module__, Method.__qualname__ = "__main__", "Method"
sys.modules["__main__"].Method = Method
member = extend_str_enum(Method, "READ", "READ")

assert Method.READ is member and Method["READ"] is member and Method("READ") is member
assert extend_str_enum(Method, "READ", "READ") is member, "a second time"
assert list(Method) == [Method.A, Method.B, member] and len(Method) == 3
assert list(reversed(Method))[0] is member and member in list(Method)
assert Method.__members__["READ"] is member and isinstance(member, Method) and isinstance(member, str)
assert member == "READ" and hash(member) == hash("READ") and {"READ": 1}[member] == 1
assert (member.name, member.value, str(member)) == ("READ", "READ", "Method.READ")
assert format(member) == format(Method.A).replace("A", "READ")
assert repr(member) == repr(Method.A).replace("A", "READ")
assert json.dumps({"type": member}) == '{"type": "READ"}'
assert copy.copy(member) is member and copy.deepcopy(member) is member
for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
    assert pickle.loads(pickle.dumps(member, protocol)) is member
try:
    Method.READ = 1
except AttributeError:
    pass
else:
    raise AssertionError("a member can be overwritten")
try:
    Method("UNKNOWN")
except ValueError:
    pass
else:
    raise AssertionError("unknown values are accepted")
if sys.version_info >= (3, 12):
    assert "READ" in Method
for name, value in (("A", "other"), ("OTHER", "A"), ("mro", "mro")):
    try:
        extend_str_enum(Method, name, value)
    except ValueError:
        pass
    else:
        raise AssertionError((name, value))
"""


def interpreters():
    """The other Pythons of this machine, as pyenv keeps them."""
    found = {}
    for root in (os.environ.get("PYENV_ROOT"), Path.home() / ".pyenv"):
        for python in sorted(Path(root or "/nonexistent").glob("versions/*/bin/python")):
            version = python.parts[-3]
            if version.startswith(("3.10.", "3.12.", "3.13.", "3.14.")):
                found[version] = python
    return found


@pytest.mark.parametrize("version", ["3.10", "3.12", "3.13"])
def test_the_enumeration_on_other_pythons(version):
    pythons = [path for name, path in interpreters().items() if name.startswith(f"{version}.")]
    if not pythons:
        pytest.skip(f"no Python {version} below ~/.pyenv/versions")
    code = Path(enum_extension.__file__).read_text() + "\n" + PROPERTIES
    result = subprocess.run([pythons[-1], "-I", "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_enumeration_on_this_python():
    code = Path(enum_extension.__file__).read_text() + "\n" + PROPERTIES
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
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


# Each runs in a process where peft is imported and peft_read is not.
SCENARIOS = {
    "importing, reloading and importing anew": """
        import importlib, sys
        import peft_read, peft_read
        from peft import PeftType
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as configs, PEFT_TYPE_TO_TUNER_MAPPING as tuners
        first = PeftType.READ
        import peft_read.adapter
        importlib.reload(peft_read.adapter.config)
        importlib.reload(peft_read.adapter)
        assert configs["READ"] is peft_read.adapter.READConfig and PeftType.READ is first
        for name in [name for name in sys.modules if name.startswith("peft_read.adapter")]:
            del sys.modules[name]
        from peft_read.adapter import READConfig, READModel
        assert configs["READ"] is READConfig and tuners["READ"] is READModel
        assert PeftType.READ is first and list(PeftType).count("READ") == 1
        READConfig(target_modules=["fc2"])
    """,
    "a pickled configuration brings the package with it": """
        import pickle
        config = pickle.loads(PICKLED)
        assert config.peft_type.name == "READ"
    """,
    "a pickled member does not": """
        import pickle
        from peft import PeftType
        try:
            pickle.loads(pickle.dumps(PeftType.LORA).replace(b"LORA", b"READ"))
        except ValueError as error:
            assert "not a valid PeftType" in str(error)
        else:
            raise AssertionError
    """,
    "a name that is no member": """
        from peft import PeftType
        type.__setattr__(PeftType, "READ", "not a member")
        try:
            import peft_read
        except ImportError as error:
            assert "already has a READ method" in str(error) and "not a member" in str(error)
        else:
            raise AssertionError
    """,
    "another package's READ": """
        from peft.utils import PeftType, register_peft_method
        exec(open(ENUM_EXTENSION).read())
        extend_str_enum(PeftType, "READ", "READ")  # as a peft with a READ of its own would have it
        class Config: pass
        class Model: prefix = "read_"
        register_peft_method(name="read", config_cls=Config, model_cls=Model)
        try:
            import peft_read
        except ImportError as error:
            assert "already has a READ method" in str(error) and "Config" in str(error)
        else:
            raise AssertionError
    """,
    "without the import": """
        from peft import PeftConfig, PeftModel
        import torch
        for load in (
            lambda: PeftConfig.from_pretrained(FOLDER),
            lambda: PeftModel.from_pretrained(torch.nn.Linear(1, 1), FOLDER),
        ):
            try:
                load()
            except KeyError as error:
                assert str(error) == "'READ'"
            else:
                raise AssertionError
        import peft_read
        PeftConfig.from_pretrained(FOLDER)
    """,
}

DRIVER = """
import json, os, sys, traceback, warnings
warnings.simplefilter("ignore")
import peft
scenarios, names = json.loads(sys.stdin.read())
for name, code in scenarios.items():
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 0
        try:
            exec(code, {**names, "PICKLED": bytes.fromhex(names["PICKLED"])})
        except BaseException:
            print(name, traceback.format_exc(), flush=True)
            status = 1
        os._exit(status)
    if os.waitpid(child, 0)[1]:
        print("FAILED", name)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the scenarios start from copies of one process")
def test_what_happens_in_processes_of_their_own(tmp_path):
    config = READConfig(target_modules=["fc2"])
    config.save_pretrained(tmp_path)
    names = {
        "FOLDER": str(tmp_path),
        "PICKLED": pickle.dumps(config).hex(),
        "ENUM_EXTENSION": enum_extension.__file__,
    }
    scenarios = {name: textwrap.dedent(code) for name, code in SCENARIOS.items()}
    result = subprocess.run(
        [sys.executable, "-c", DRIVER], input=json.dumps([scenarios, names]), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "FAILED" not in result.stdout, result.stdout


def test_the_package_exports_what_the_adapter_room_does():
    assert peft_read.READConfig is READConfig and peft_read.READModel is READModel
