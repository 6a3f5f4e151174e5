"""The example of the adapter alone, run as a function."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "adapt_any_model.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("adapt_any_model", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_recurrence_learns_what_the_bottleneck_alone_does_not(example, capsys):
    read = example.main([])
    houlsby = example.main(["--cell", "none"])
    assert read["same"] and houlsby["same"]
    assert read["last_loss"] < houlsby["last_loss"] - 0.2 < houlsby["first_loss"] - 0.4
    assert "trainable params: " in capsys.readouterr().out


def test_a_model_from_a_folder(example, tmp_path):
    example.base_model(None).save_pretrained(tmp_path)
    result = example.main(["--model", str(tmp_path), "--steps", "3", "--cell", "lstm", "--target_modules", "c_proj"])
    assert result["same"]
