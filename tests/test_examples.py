"""The scripts and the README, run as a user runs them, on one small How2 folder."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_read.data import generate_how2_mini, write_how2_mini

REPOSITORY = Path(__file__).parents[1]
EXAMPLES = REPOSITORY / "examples"
BACKBONE = EXAMPLES / "how2_mini_backbone"
SMALL = "--num_train_epochs 1 --per_device_train_batch_size 8 --generation_num_beams 1 --use_cpu --disable_tqdm true"


@pytest.fixture(scope="module")
def how2(tmp_path_factory):
    splits = {"sum_train": (24, 1), "sum_val": (8, 2), "sum_test": (12, 3)}
    clips = {name: generate_how2_mini(count, seed=seed, prefix=name) for name, (count, seed) in splits.items()}
    return write_how2_mini(tmp_path_factory.mktemp("how2"), clips)


@pytest.fixture
def summarize(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import how2_summarize

    return lambda *arguments: how2_summarize.main([*SMALL.split(), *map(str, arguments)])


def test_the_readme_runs_as_written(tmp_path):
    code = re.search(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL).group(1)
    code = code.replace("outputs/readme", str(tmp_path)).replace("max_steps=20", "max_steps=2, report_to='none'")
    script = tmp_path / "readme.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, script], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "trainable params" in done.stdout
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 1e6


def test_the_imports_of_the_first_line():
    done = subprocess.run([sys.executable, "-c", "import peft_read; from peft import get_peft_model"])
    assert done.returncode == 0


def test_one_run_writes_adapter_report_and_picture(how2, tmp_path, summarize):
    result = summarize(
        "--data_dir", how2, "--output_dir", tmp_path, "--compare_zero_video", "true", "--logging_steps", 1
    )
    assert result["method"] == "read + PVLA"
    assert result["reloaded_is_identical"]
    assert result["adapter_bytes"] < 1e6
    assert result["trainable"] / result["parameters"] < 0.03
    assert {"rouge_before", "rouge_after", "rouge_zeroed_at_test", "without_video"} <= set(result)
    assert {"task_loss", "pvla_loss"} <= set(result["log"][0])
    report = (tmp_path / "report.md").read_text()
    for part in ("trainable parameters", "ROUGE-L", "PVLA loss", "reference:", "video zeroed"):
        assert part in report
    assert (tmp_path / "learning_curve.png").stat().st_size > 1000
    assert json.loads((tmp_path / "results.json").read_text())["world_size"] == 1
    assert not list(tmp_path.rglob("checkpoint-*")), "a finished run leaves the adapter, not its checkpoints"


def test_a_yaml_file_gives_arguments_and_the_command_line_wins(how2, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import how2_summarize

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"data_dir: {how2}\nr: 3\nlearning_rate: 0.5\n")
    script, training = how2_summarize.parse([str(recipe), "--learning_rate", "0.25"])
    assert (script.data_dir, script.r, training.learning_rate) == (str(how2), 3, 0.25)
    recipe.write_text("ranks: 3\n")
    with pytest.raises(ValueError, match=r"unknown arguments \['ranks'\]"):
        how2_summarize.parse([str(recipe)])


@pytest.mark.parametrize("method", ["full", "lora", "adapter", "prompt", "bias", "partial", "proj", "none"])
def test_every_method_runs(method, how2, tmp_path, summarize):
    arguments = ("--num_train_samples", 8, "--num_test_samples", 4, "--method", method)
    result = summarize("--data_dir", how2, "--output_dir", tmp_path, *arguments, "--no_pvla")
    assert result["method"] == method
    assert 0 < result["rouge_after"]["rouge_score"]["rougeL"] <= 100


def plain_model(kind, vocab_size):
    if kind == "bart":
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
        return BartForConditionalGeneration(
            BartConfig(vocab_size=vocab_size, max_position_embeddings=128, **sizes, **heads)
        )
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2, "feed_forward_proj": "gated-gelu"}
    tokens = {"pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}  # of the test's tokenizer
    return T5ForConditionalGeneration(T5Config(vocab_size=vocab_size, **sizes, **tokens))


@pytest.mark.parametrize(("kind", "norm"), [("bart", "final_layer_norm"), ("t5", "custom_layer_norm")])
@pytest.mark.parametrize("method", ["read", "prompt"])
def test_a_plain_model_gets_new_visual_modules_that_are_trained_and_saved(
    kind, norm, method, how2, tmp_path, summarize
):
    tokenizer = AutoTokenizer.from_pretrained(BACKBONE)
    plain = tmp_path / "plain"
    plain_model(kind, len(tokenizer)).save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    arguments = ("--model_name_or_path", plain, "--num_train_samples", 8, "--num_test_samples", 4, "--method", method)
    arguments += ("--new_visual_modules", '{"img_trans_layers": 1}', "--backbone", f"vg_{kind}")
    arguments += ("--no_pvla",) if method == "prompt" else ()
    result = summarize("--data_dir", how2, "--output_dir", tmp_path / "run", *arguments)
    names = ("_linear_1", "_linear_2", "fg", "img_transformer", norm)
    assert set(result["new_modules"]) == {f"encoder.{name}" for name in names}
    assert result["reloaded_is_identical"]
    saved = (tmp_path / "run" / "adapter").glob("*.safetensors")
    keys = {key for file in saved for key in load_file(file)}
    assert all(any(f"encoder.{name}" in key for key in keys) for name in names)
    assert not any("decoder" in key and "readapter" not in key for key in keys), "the frozen text model is not saved"
    report = (tmp_path / "run" / "report.md").read_text()
    assert "new visual modules, trained and saved with the adapter: encoder." in report


def test_a_small_vg_t5_is_pretrained_and_adapted(how2, tmp_path, summarize):
    import pretrain_summariser

    sizes = "--backbone vg_t5 --num_items 32 --d_model 16 --ffn_dim 16 --layers 1 --heads 2 --img_trans_layers 1"
    output = ["--output_dir", str(tmp_path / "backbone"), "--use_cpu", "--disable_tqdm", "true"]
    pretrain_summariser.main([*sizes.split(), *output])
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "backbone")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "backbone")
    assert model.config.model_type == "vg_t5"
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert (model.config.decoder_start_token_id, model.config.eos_token_id) == (0, 1)
    arguments = ("--num_train_samples", 16, "--num_test_samples", 4, "--compare_zero_video", "true")
    result = summarize(
        "--data_dir", how2, "--output_dir", tmp_path, "--model_name_or_path", tmp_path / "backbone", *arguments
    )
    assert result["new_modules"] == []
    assert result["reloaded_is_identical"]
    assert result["trainable"] / result["parameters"] < 0.3
    assert {"rouge_zeroed_at_test", "without_video"} <= set(result)


def test_an_interrupted_run_goes_on_from_its_checkpoint(how2, tmp_path, summarize, monkeypatch):
    import transformers

    arguments = ("--data_dir", how2, "--num_test_samples", 4, "--num_train_epochs", 3)
    whole = summarize(*arguments, "--output_dir", tmp_path / "whole")

    class Interruption(transformers.TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            if state.epoch and state.epoch >= 2:
                raise KeyboardInterrupt

    import how2_summarize

    trainer_class = how2_summarize.SummarisationTrainer
    monkeypatch.setattr(
        how2_summarize,
        "SummarisationTrainer",
        lambda *args, **kwargs: trainer_class(*args, callbacks=[Interruption()], **kwargs),
    )
    with pytest.raises(KeyboardInterrupt):
        summarize(*arguments, "--output_dir", tmp_path / "cut")
    monkeypatch.undo()
    assert (tmp_path / "cut" / "checkpoint-6").is_dir()
    with pytest.raises(ValueError, match=r"interrupted run with other arguments: r was 16, is 4"):
        summarize(*arguments, "--output_dir", tmp_path / "cut", "--r", 4)
    resumed = summarize(*arguments, "--output_dir", tmp_path / "cut")
    assert resumed["rouge_after"] == whole["rouge_after"]
    saved = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "cut")]
    assert saved[0].read_bytes() == saved[1].read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "prefix"], "'prefix' is not one of"),
        (["--r", "0"], "--r 0 must be positive"),
        (["--push_to_hub", "true"], "--push_to_hub needs --hub_model_id"),
        (["--require_world_size", "2"], "1 process.es. run"),
        (["--features", "nowhere"], "no video features at nowhere"),
        (["--test_split", "sum_nothing"], "sum_nothing does not exist"),
        (["--decoder_start", "zero"], "neither 'model' nor 'original'"),
        (["--backbone", "vg_gpt"], "'vg_gpt' is not one of vg_bart, vg_t5"),
        (["--backbone", "vg_t5"], "--backbone vg_t5, but .* is a 'vg_bart', which gives vg_bart"),
        (["--method", "prompt"], "would align the prompts as frames; add --no_pvla"),
        (["--new_visual_modules", '{"mask_fusion": false}'], "is a vg_bart with its own"),
    ],
)
def test_bad_arguments_end_before_training(arguments, message, how2, tmp_path, summarize):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        summarize("--data_dir", how2, "--output_dir", tmp_path, *arguments)


def test_bad_input_is_one_line_for_the_user(how2, tmp_path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(how2, broken)
    lines = (broken / "sum_train" / "desc.tok.txt").read_text().splitlines()
    (broken / "sum_train" / "desc.tok.txt").write_text("\n".join([lines[0], lines[1].split()[0], *lines[2:]]))
    command = [sys.executable, EXAMPLES / "how2_summarize.py", "--data_dir", broken, "--output_dir", tmp_path / "out"]
    done = subprocess.run([*command, "--use_cpu"], capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(
        r"^how2_summarize.py: .*desc\.tok\.txt, line 2: the text of 'sum_train1_1' is empty$", done.stderr, re.M
    )
    assert "Traceback" not in done.stderr


def test_features_of_another_width_are_refused(tmp_path, summarize):
    clips = generate_how2_mini(4, seed=1)
    narrow = [dataclasses.replace(clip, features=clip.features[:, :32]) for clip in clips]
    folder = write_how2_mini(tmp_path / "narrow", {f"sum_{name}": narrow for name in ("train", "val", "test")})
    with pytest.raises(ValueError, match=r"features are 32 wide, but .* takes 64"):
        summarize("--data_dir", folder, "--output_dir", tmp_path)


def test_an_adapter_loaded_without_the_import_fails_with_the_key_error_that_the_docs_name(how2, tmp_path, summarize):
    arguments = ("--num_train_samples", 8, "--num_test_samples", 2)
    result = summarize("--data_dir", how2, "--output_dir", tmp_path, *arguments)
    code = f"from peft import PeftConfig; PeftConfig.from_pretrained({result['adapter']!r})"
    without = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "KeyError: 'READ'" in without.stderr
    with_import = subprocess.run([sys.executable, "-c", f"import peft_read; {code}"], capture_output=True, text=True)
    assert with_import.returncode == 0
    assert "import peft_read" in (Path(result["adapter"]) / "README.md").read_text()


def test_the_alignment_picture_and_the_loop_without_trainer(how2, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import accelerate_loop
    import align_video_and_text

    arguments = ["--data_dir", how2, "--num_items", "12", "--output_dir", tmp_path]
    monkeypatch.setattr(sys, "argv", ["align_video_and_text.py", *map(str, arguments)])
    align_video_and_text.main()
    printed = capsys.readouterr().out
    assert "| backbone | 0." in printed
    assert len(list(tmp_path.glob("plan_*.png"))) == 1
    accelerate_loop.main(steps=2)
    assert "last task loss" in capsys.readouterr().out


def test_the_comparison_runs_once_and_resumes(how2, tmp_path):
    script = EXAMPLES / "method_comparison" / "summarization.py"
    command = [sys.executable, script, "--output_dir", tmp_path, "--suite", "table6", "--learning_rates", "0.01"]
    rest = ["--data_dir", how2, *SMALL.split(), "--num_train_samples", "8", "--num_test_samples", "4"]
    for attempt in range(2):
        done = subprocess.run([*command, "--only", "VLA", "--", *rest], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "| VLA | " in done.stdout
        (row,) = json.loads((tmp_path / "table6.json").read_text())
        assert row["name"] == "VLA"
        (folder,) = [path for path in tmp_path.iterdir() if path.is_dir()]
        if attempt == 0:
            (folder / "log.txt").unlink()
    assert not (folder / "log.txt").exists(), "what has a result is not run again"


def test_two_processes_see_the_loss_of_one(how2, tmp_path):
    losses, rouge = {}, {}
    for processes, batch in ((1, 8), (2, 4)):
        output = tmp_path / str(processes)
        arguments = f"--data_dir {how2} --output_dir {output} --num_test_samples 4 --num_train_epochs 1 --use_cpu"
        arguments += f" --per_device_train_batch_size {batch} --dropout 0 --generation_num_beams 1 --logging_steps 1"
        arguments += f" --require_world_size {processes} --ddp_backend gloo"
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
        done = subprocess.run(
            [*command, EXAMPLES / "how2_summarize.py", *arguments.split()],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        result = json.loads((output / "results.json").read_text())
        assert result["world_size"] == processes
        rouge[processes] = result["rouge_before"]
        losses[processes] = [
            (entry["loss"], entry["task_loss"], entry["pvla_loss"]) for entry in result["log"] if "loss" in entry
        ]
    assert len(losses[1]) == 3
    assert rouge[1] == rouge[2]
    assert torch.allclose(torch.tensor(losses[1]), torch.tensor(losses[2]), rtol=1e-4)
