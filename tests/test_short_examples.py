"""The examples for newcomers: the video-language model, the plugin of ms-swift, the notebook."""

import importlib.util
import json
import runpy
import sys
import types
from pathlib import Path

import pytest
from peft import PeftModel
from tiny_models import build

EXAMPLES = Path(__file__).parents[1] / "examples"
SHORT = ["accelerate_loop", "adapt_any_model", "adapt_video_language_model", "align_video_and_text", "swift_plugin"]


def test_a_video_language_model_learns_under_both_losses(capsys):
    losses = runpy.run_path(str(EXAMPLES / "adapt_video_language_model.py"))["main"](["--steps", "12"])
    assert losses[-1] < losses[0] - 0.1
    assert "(16 of 21 tokens)  <->  language model.language_model.layers.1 (1, 21, 32) (3 of 21 tokens)" in (
        capsys.readouterr().out
    )


def test_the_plugin_registers_read_in_the_tuners_of_ms_swift(monkeypatch):
    """ms-swift asks for an older peft: a stand-in has the two names that the plugin takes from it."""
    package, stand_in = types.ModuleType("swift"), types.ModuleType("swift.tuner_plugin")
    stand_in.PeftTuner, stand_in.tuners_map = type("PeftTuner", (), {}), {}
    monkeypatch.setitem(sys.modules, "swift", package)
    monkeypatch.setitem(sys.modules, "swift.tuner_plugin", stand_in)
    runpy.run_path(str(EXAMPLES / "swift_plugin.py"))
    tuner = stand_in.tuners_map["read"]
    assert issubclass(tuner, stand_in.PeftTuner)
    model = tuner.prepare_model(None, build("llama"))
    assert isinstance(model, PeftModel) and model.peft_config["default"].peft_type == "READ"


@pytest.mark.parametrize("name", SHORT)
def test_a_short_example_is_short(name):
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 140


def test_help_trains_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["accelerate_loop.py", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(EXAMPLES / "accelerate_loop.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert not end.value.code and "--steps" in printed and "last task loss" not in printed


@pytest.mark.slow
def test_the_notebook_runs(monkeypatch, capsys):
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("the notebook draws with matplotlib")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    names = {"__name__": "notebook"}
    for cell in json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "quickstart.ipynb", "exec"), names)
    assert names["losses"][-1] < names["losses"][0] - 0.3
    assert names["left_out"] < 0.05
    assert "the same after loading: True" in capsys.readouterr().out
