"""The command `peft-read`, on configurations in folders: no weights, no network."""

import os
import subprocess
import sys

import pytest
from peft import get_peft_model
from tiny_models import build
from transformers import AutoConfig, BartConfig, BertConfig

from peft_read import READConfig
from peft_read.command_line import main
from peft_read.inspection import inspect_model

BART_BASE = {
    "d_model": 768, "encoder_layers": 6, "decoder_layers": 6, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072,
    "architectures": ["BartForConditionalGeneration"],
}  # fmt: skip


@pytest.fixture(scope="module")
def bart_base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bart")
    BartConfig(**BART_BASE).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def adapter(tmp_path):
    model = get_peft_model(build("gpt2"), READConfig(r=4, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def failure(capsys, *arguments):
    """The one line on the standard error."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert not captured.out and len(captured.err.splitlines()) == 1
    return captured.err


def test_the_count_of_bart_base_is_that_of_the_formula(bart_base, capsys):
    assert inspect_model(bart_base, READConfig(r=4)).trained == 83_472
    assert inspect_model(bart_base, READConfig(r=4, use_bias=False)).trained == 74_112
    assert main(["inspect", bart_base]) == 0
    out = capsys.readouterr().out
    assert "READ on 12 modules trains 83,472 of" in out
    assert "| model.encoder.layers.0-5.fc2 | Linear | 768 | 4 | rnn  | 6     | 6,956" in out
    assert "└── fc2  d=768  k=4  rnn  6,956 parameters, 6 times" in out


@pytest.mark.parametrize("family", ["gpt2", "t5", "llama", "bert"])
def test_an_inspection_says_what_peft_counts(family, tmp_path):
    model = build(family)
    inspection = inspect_model(build(family), READConfig(r=3, cell="gru"))
    trained, parameters = get_peft_model(model, READConfig(r=3, cell="gru")).get_nb_trainable_parameters()
    assert (inspection.trained, inspection.base_parameters + inspection.trained) == (trained, parameters)


def test_a_configuration_without_a_class_is_a_bare_model(tmp_path, capsys):
    BertConfig(num_hidden_layers=2, vocab_size=50).save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path), "--target-modules", "intermediate.dense", "--cell", "lstm"]) == 0
    assert "BertModel: READ on 2 modules" in capsys.readouterr().out


def test_widths_and_recurrences_are_counted_side_by_side(bart_base, capsys):
    assert main(["count", bart_base, "--r", "4", "8", "--cell", "rnn", "none", "--no-bias"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| rnn", "| none"))]
    assert [row.split("|")[4].strip() for row in rows] == ["74,112", "148,992", "73,728", "147,456"]


def test_the_card_is_printed_and_written(adapter, capsys):
    before = (adapter / "README.md").read_text()
    (adapter / "README.md").unlink()
    assert main(["card", str(adapter)]) == 0
    assert "# READ adapter" in capsys.readouterr().out
    assert not (adapter / "README.md").exists()
    assert main(["card", str(adapter), "--write"]) == 0
    written = (adapter / "README.md").read_text()
    assert "import peft_read" in written and "arxiv:2312.06950" in written and "# READ adapter" in before


def test_bad_input_is_one_line(bart_base, adapter, tmp_path, capsys):
    assert "should be a positive integer, got 0" in failure(capsys, "inspect", bart_base, "--r", "0")
    assert "`cell` should be one of" in failure(capsys, "count", bart_base, "--cell", "rwkv")
    assert "no such folder" in failure(capsys, "inspect", str(tmp_path / "nothing"))
    assert "fc9" in failure(capsys, "inspect", bart_base, "--target-modules", "fc9")
    assert "no adapter_config.json" in failure(capsys, "card", str(tmp_path))
    assert "--steps should be a positive number" in failure(capsys, "demo", "--steps", "0")
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "README.md").unlink()
    assert "holds no adapter weights" in failure(capsys, "card", str(adapter))
    config = AutoConfig.from_pretrained(bart_base)
    config.architectures = ["OneOfItsOwn"]
    config.save_pretrained(tmp_path / "own")
    assert "OneOfItsOwn, which is no class of transformers" in failure(capsys, "inspect", str(tmp_path / "own"))


def test_the_demonstration_and_the_check(capsys):
    assert main(["demo", "--steps", "3"]) == 0
    assert "READ: 5,344 of 110,048 parameters trained" in capsys.readouterr().out
    assert main(["check"]) == 0
    out = capsys.readouterr().out
    assert "transformers " in out and "in use: on the CPU" in out


def test_the_module_runs_as_a_program(tmp_path):
    """As a user's shell runs it: bad input has no traceback."""
    command = [sys.executable, "-m", "peft_read.command_line", "inspect", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert result.returncode == 2
    assert result.stderr.startswith("peft-read inspect: ") and "Traceback" not in result.stderr
