"""The command `peft-read`, on configurations in folders: no weights, no network."""

import copy
import logging
import runpy
import subprocess
import sys
import tomllib
import warnings
from importlib import metadata
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from tiny_models import build
from transformers import AutoConfig, AutoModelForSeq2SeqLM, BartConfig, BertConfig, MambaConfig

import peft_read_command
from peft_read import BottleneckConfig, CompacterConfig, HyperformerConfig, READConfig, set_task
from peft_read.command_line import main
from peft_read.inspection import inspect_model
from peft_read.recurrence import CELLS

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
    assert (inspection.trained, inspection.parameters) == (trained, parameters)


CONFIGS = {
    "bottleneck": BottleneckConfig(r=4),
    "tasks with a half of their own": BottleneckConfig(r=4, tasks=["vqa", "gqa"], share="down"),
    "compacter": CompacterConfig(r=4),
    "hyperformer": HyperformerConfig(r=4, tasks=["vqa", "gqa"], task_embedding_dim=8),
    "lora": LoraConfig(r=2, modules_to_save=["lm_head"], ensure_weight_tying=False, bias="all"),
    "ia3": IA3Config(),
    "prompt tuning": PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM"),
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("name", CONFIGS)
def test_an_inspection_of_any_method_says_what_peft_counts(name):
    model = get_peft_model(build("bart"), CONFIGS[name])
    inspection = inspect_model(build("bart"), copy.deepcopy(CONFIGS[name]))
    assert (inspection.trained, inspection.parameters) == model.get_nb_trainable_parameters()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_with_weights_has_an_adapter_with_weights_after_it_was_inspected(name):
    model = build("bart")
    inspect_model(model, copy.deepcopy(CONFIGS[name]))
    assert not any(weight.is_meta for weight in model.state_dict().values())
    set_task(model, "vqa")
    assert model(input_ids=torch.tensor([[3, 4]])).logits.isfinite().all()


def test_the_counts_of_other_methods_on_bart_base_are_those_of_their_formulas(bart_base, capsys):
    assert main(["inspect", bart_base, "--method", "bottleneck", "--set", "reduction_factor=8"]) == 0
    out = capsys.readouterr().out
    # 30 positions of 2 d r + d + r with d = 768, r = 96
    assert "BOTTLENECK on 30 modules trains 4,449,600 of" in out
    assert "| model.decoder.layers.0-5.encoder_attn.out_proj | Linear | 768 | 96 | 6     | 148,320" in out
    assert main(["inspect", bart_base, "--method", "bottleneck", "--target-modules", "feed_forward"]) == 0
    assert "BOTTLENECK on 12 modules trains 1,779,840 of" in capsys.readouterr().out
    # the rules, 4 of 4 x 4, are the whole model's
    assert main(["inspect", bart_base, "--method", "compacter"]) == 0
    out = capsys.readouterr().out
    assert "| shared_over_layers                             | CompacterShared |     |    | 1     | 64 " in out
    assert "└── shared_over_layers  64 parameters" in out
    assert main(["inspect", bart_base, "--method", "LoRA", "--r", "4", "--target-modules", "q_proj"]) == 0
    out = capsys.readouterr().out
    assert "LORA on 18 modules trains 110,592 of" in out  # 18 (768 + 768) 4
    assert "q_proj  d=768  r=4  6,144 parameters, 6 times" in out


def test_methods_are_counted_side_by_side(bart_base, capsys):
    assert main(["count", bart_base, "--method", "read", "lora", "ia3", "--r", "4", "--cell", "none"]) == 0
    rows = [line.split("|")[1:6] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["method", "cell", "r", "modules", "trained parameters"],
        ["-" * 6, "-" * 4, "-", "-" * 7, "-" * 18],
        ["READ", "none", "4", "12", "82,992"],
        ["LORA", "", "4", "36", "221,184"],
        ["IA3", "", "", "48", "64,512"],
    ]


def test_a_saved_adapter_is_inspected_on_its_own_base_model(tmp_path, capsys):
    build("bart").save_pretrained(tmp_path / "base")
    base = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, BottleneckConfig(tasks=["vqa", "gqa"], share="up"))
    model.save_pretrained(tmp_path / "adapter")
    for arguments in ([], [str(tmp_path / "base")]):
        assert main(["inspect", *arguments, "--adapter", str(tmp_path / "adapter")]) == 0
        trained = model.get_nb_trainable_parameters()[0]
        assert f"trains {trained:,} of" in capsys.readouterr().out


def test_settings_that_mean_nothing_are_one_line(bart_base, adapter, tmp_path, capsys):
    inspect = ("inspect", bart_base, "--method")
    assert "peft has no method 'magic'; it has adalora" in failure(capsys, *inspect, "magic")
    assert "BOTTLENECK has no setting 'ratio'" in failure(capsys, *inspect, "bottleneck", "--set", "ratio=2")
    assert "'share' is not a setting; write" in failure(capsys, *inspect, "bottleneck", "--set", "share")
    assert "is given twice" in failure(capsys, *inspect, "bottleneck", "--set", "r=2", "r=3")
    assert "cannot be read" in failure(capsys, *inspect, "hyperformer", "--set", "tasks=[vqa")
    assert "sets what another option sets" in failure(capsys, *inspect, "lora", "--r", "2", "--set", "r=3")
    assert "name them in `tasks`" in failure(capsys, *inspect, "hyperformer")
    assert "--cell, --no-bias and --bidirectional are READ's" in failure(capsys, *inspect, "lora", "--cell", "gru")
    assert "LORA does not fit" in failure(capsys, *inspect, "lora", "--set", "r=four")
    assert "needs a task_type" in failure(capsys, *inspect, "prompt_tuning", "--set", "num_virtual_tokens=3")
    assert "--r is not a setting of IA3" in failure(capsys, "count", bart_base, "--method", "ia3", "--r", "4")
    assert "which model?" in failure(capsys, "inspect")
    given = failure(capsys, "inspect", "--adapter", str(adapter), "--method", "lora")
    assert "--adapter brings the method" in given
    (adapter / "adapter_config.json").write_text('{"peft_type": "MAGIC"}')
    assert "has a peft_type that is not known here" in failure(capsys, "inspect", bart_base, "--adapter", str(adapter))


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


def test_a_card_without_a_base_model_has_no_empty_name_and_no_empty_tag(adapter, capsys):
    for card in (adapter / "README.md", None):
        if card is None:
            assert main(["card", str(adapter), "--write"]) == 0
            said = capsys.readouterr().err
            assert said.count("\n") == 1 and "adapter_config.json does not name the base model" in said
        _, data, text = (adapter / "README.md").read_text().split("---\n", 2)
        assert "base_model" not in data and "- read\n" in data
        assert "| base model | `unknown` |" in text
    config = adapter / "adapter_config.json"
    named = config.read_text().replace('"base_model_name_or_path": null', '"base_model_name_or_path": "openai/gpt2"')
    before = config.read_text()
    config.write_text(named)
    assert main(["card", str(adapter)]) == 0
    captured = capsys.readouterr()
    assert not captured.err and "base_model: openai/gpt2\n" in captured.out
    assert captured.out.count("base_model:adapter:openai/gpt2") == 1
    config.write_text(before)
    config.write_text(config.read_text().replace('"base_model_name_or_path": null', '"base_model_name_or_path": ""'))
    for arguments in (["inspect", "--adapter", str(adapter)], ["inspect", "", "--adapter", str(adapter)]):
        assert f"which model? {adapter} does not name its base model." in failure(capsys, *arguments)
    assert "which model? Name a folder" in failure(capsys, "inspect", "")


def test_a_card_keeps_the_base_model_that_the_adapter_names(tmp_path, capsys):
    build("bart").save_pretrained(tmp_path / "base")
    base = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, READConfig()).save_pretrained(tmp_path / "adapter")
    capsys.readouterr()  # progress bars of transformers
    assert main(["card", str(tmp_path / "adapter")]) == 0
    captured = capsys.readouterr()
    assert f"base_model: {tmp_path / 'base'}" in captured.out and "base_model:adapter:" in captured.out
    assert not captured.err


def test_bad_input_is_one_line(bart_base, adapter, tmp_path, capsys):
    assert "should be a positive integer, got 0" in failure(capsys, "inspect", bart_base, "--r", "0")
    assert "`cell` should be one of" in failure(capsys, "count", bart_base, "--cell", "rwkv")
    assert "no such folder" in failure(capsys, "inspect", str(tmp_path / "nothing"))
    assert "no such folder" in failure(capsys, "inspect", "outputs/adapters/nothing")  # no name on the Hub either
    assert "no such folder" in failure(capsys, "inspect", "--adapter", str(tmp_path / "nothing"))
    assert "no such folder" in failure(capsys, "card", str(tmp_path / "nothing"))
    assert "it has no config.json\n" in failure(capsys, "inspect", str(tmp_path))
    assert "it holds an adapter: peft-read inspect --adapter" in failure(capsys, "inspect", str(adapter))
    missing = failure(capsys, "inspect", bart_base, "--target-modules", "fc9")
    assert "names 'fc9'" in missing and "Near names: 'fc2'" in missing
    assert missing.endswith("Here that is --target-modules NAME ...\n")
    assert "no adapter_config.json" in failure(capsys, "card", str(tmp_path))
    assert "--steps should be a positive number" in failure(capsys, "demo", "--steps", "0")
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "README.md").unlink()
    assert "holds no adapter weights" in failure(capsys, "card", str(adapter))
    config = AutoConfig.from_pretrained(bart_base)
    config.architectures = ["OneOfItsOwn"]
    config.save_pretrained(tmp_path / "own")
    assert "OneOfItsOwn, which is not a class of transformers" in failure(capsys, "inspect", str(tmp_path / "own"))


def test_damaged_files_of_an_adapter_are_one_line_that_names_them(adapter, capsys):
    weights, old = adapter / "adapter_model.safetensors", adapter / "adapter_model.bin"
    content = weights.read_bytes()
    for damaged in (content[:100], content[:-10], b""):
        weights.write_bytes(damaged)
        assert f"{weights} holds no whole weights" in failure(capsys, "card", str(adapter))
    weights.unlink()
    torch.save({"a": torch.zeros(3)}, old)
    content = old.read_bytes()
    for damaged in (content[:100], content[: len(content) // 2], b"not a pickle", b""):
        old.write_bytes(damaged)
        assert f"{old} holds no whole weights" in failure(capsys, "card", str(adapter))
    torch.save({"a": "no tensor"}, old)
    assert f"{old} holds no whole weights" in failure(capsys, "card", str(adapter))
    config = adapter / "adapter_config.json"
    for damaged in (config.read_bytes()[:50], b"\xff\xfe", b""):
        config.write_bytes(damaged)
        for command in (["card", str(adapter)], ["inspect", "--adapter", str(adapter)]):
            assert f"{config} is no configuration" in failure(capsys, *command)


def test_without_a_network_the_error_says_that_there_is_no_folder_either(capsys, monkeypatch):
    def unreachable(name, **options):
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        raise OSError("We couldn't connect to 'https://huggingface.co'")

    monkeypatch.setattr(AutoConfig, "from_pretrained", unreachable)
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "handlers", [logging.StreamHandler(sys.stderr)])
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "level", logging.WARNING)
    message = failure(capsys, "inspect", "someone/model")
    assert "there is no folder someone/model, and no model of that name came from the Hub: We couldn't" in message


def test_a_model_without_feed_forward_blocks_names_the_option(tmp_path, capsys):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 50}
    MambaConfig(**sizes, architectures=["MambaForCausalLM"]).save_pretrained(tmp_path)
    message = failure(capsys, "inspect", str(tmp_path))
    assert "no feed-forward blocks" in message and message.endswith("Here that is --target-modules NAME ...\n")


def test_lora_on_gpt2_prints_the_table_alone(tmp_path, capsys):
    build("gpt2").config.save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert main(["inspect", str(tmp_path), "--method", "lora"]) == 0
    assert "LORA on" in capsys.readouterr().out and not caught


@pytest.mark.parametrize("code", [0, 1])
def test_the_check_of_the_kernels_is_run_as_a_script_is(tmp_path, monkeypatch, capsys, code):
    """With the modules beside it, and its exit status."""
    folder = tmp_path / "examples" / "benchmarks"
    folder.mkdir(parents=True)
    (folder / "gpu_check.py").write_text("import sys\nfrom beside_the_check import CODE\nsys.exit(CODE)\n")
    (folder / "beside_the_check.py").write_text(f"CODE = {code}\n")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main(["check", "--checkout", str(tmp_path)]) == code
    assert main(["check", "--checkout", str(folder)]) == 0
    assert "is not a checkout of peft_read" in capsys.readouterr().out


def test_the_demonstration_and_the_check(capsys):
    assert main(["demo", "--steps", "3"]) == 0
    assert "READ: 5,344 of 110,048 parameters trained" in capsys.readouterr().out
    assert main(["check"]) == 0
    out = capsys.readouterr().out
    assert "transformers " in out and "in use: on the CPU" in out


def test_the_check_of_a_source_tree_says_that_it_is_not_installed(capsys, monkeypatch):
    version = metadata.version

    def missing(name):
        if name == "peft-read":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert main(["check"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("peft-read of a source tree that is not installed\ntorch ")


def test_the_module_runs_as_a_program(tmp_path, capsys, monkeypatch):
    """As a user's shell runs it: bad input ends with a number, which has no traceback."""
    monkeypatch.setattr(sys, "argv", ["peft_read", "inspect", str(tmp_path)])
    monkeypatch.delitem(sys.modules, "peft_read.__main__", raising=False)
    with pytest.raises(SystemExit) as end:
        runpy.run_module("peft_read", run_name="__main__")
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("peft-read inspect: ")


@pytest.mark.parametrize("module", ["peft_read", "peft_read.command_line", "peft_read_command"])
def test_every_way_to_run_it_shows_the_same_help(module, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["peft-read", "--help"])
    monkeypatch.delitem(sys.modules, module if module != "peft_read" else "peft_read.__main__", raising=False)
    with pytest.raises(SystemExit) as end:
        runpy.run_module(module, run_name="__main__")
    help_text = capsys.readouterr().out
    assert not end.value.code and help_text.startswith("usage: peft-read ")
    assert all(command in help_text for command in ("inspect", "count", "card", "demo", "check"))


def test_help_and_wrong_options_import_nothing_that_takes_seconds():
    code = """
import sys
from peft_read_command import main
for arguments in (["--help"], ["inspect", "--help"], ["--version"], ["inspect", "--nothing"]):
    try:
        main(arguments)
    except SystemExit:
        pass
print(sorted({"torch", "transformers", "peft", "numpy", "peft_read"} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "[]", result.stderr


def test_the_installed_command_is_the_one_that_starts_without_them():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"peft-read": f"{peft_read_command.__name__}:main"}
    folder = Path(peft_read_command.__file__).relative_to(Path(__file__).parents[1])
    assert str(folder) in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]


def test_the_help_names_the_recurrences_that_there_are():
    assert tuple(CELLS) == peft_read_command.CELLS
