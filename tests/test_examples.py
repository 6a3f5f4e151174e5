"""The scripts and the README, run as a user runs them, on one small How2 folder."""

import dataclasses
import json
import logging
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from processes import in_two_processes
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from peft_read.data import generate_how2_mini, write_how2_mini
from peft_read.models import VGBartConfig, VGBartForConditionalGeneration

REPOSITORY = Path(__file__).parents[1]
EXAMPLES = REPOSITORY / "examples"
BACKBONE = EXAMPLES / "how2_mini_backbone"
SMALL = "--num_train_epochs 1 --per_device_train_batch_size 8 --generation_num_beams 1 --use_cpu --disable_tqdm true"
SMALL += " --generation_max_length 20"


@pytest.fixture(scope="module")
def how2(tmp_path_factory):
    splits = {"sum_train": (24, 1), "sum_val": (8, 2), "sum_test": (12, 3)}
    clips = {name: generate_how2_mini(count, seed=seed, prefix=name) for name, (count, seed) in splits.items()}
    return write_how2_mini(tmp_path_factory.mktemp("how2"), clips)


@pytest.fixture
def summarize(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES / "reproduction"))
    import summarise

    return lambda *arguments: summarise.main([*SMALL.split(), *map(str, arguments)])


def readme_snippets():
    return re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)


def test_the_readme_runs_without_a_checkout(tmp_path, monkeypatch, capsys):
    code = readme_snippets()[0]
    assert len(code.splitlines()) <= 25
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert "trainable params: 1,240 " in capsys.readouterr().out
    assert (tmp_path / "outputs/readme/adapter/adapter_model.safetensors").stat().st_size < 1e5


def test_the_readme_runs_as_written(tmp_path, monkeypatch, capsys):
    code = readme_snippets()[1]
    code = code.replace("outputs/readme", str(tmp_path)).replace("max_steps=20", "max_steps=2, report_to='none'")
    monkeypatch.chdir(REPOSITORY)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert "trainable params" in capsys.readouterr().out
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 1e6


def test_one_run_writes_adapter_report_and_picture(how2, tmp_path, summarize):
    arguments = ("--compare_zero_video", "true", "--logging_steps", 1, "--num_test_samples", 6)
    result = summarize("--data_dir", how2, "--output_dir", tmp_path, *arguments)
    assert result["method"] == "read + PVLA"
    assert result["reloaded_is_identical"]
    assert result["adapter_bytes"] < 1e6
    assert result["trainable"] / result["parameters"] < 0.03
    assert {"rouge_before", "rouge_after", "rouge_zeroed_at_test", "without_video"} <= set(result)
    assert {"task_loss", "pvla_loss"} <= set(result["log"][0])
    report = (tmp_path / "report.md").read_text()
    for part in ("trainable parameters", "ROUGE-L", "PVLA loss", "lower = better aligned", "reference:", "zeroed"):
        assert part in report
    assert (tmp_path / "learning_curve.png").stat().st_size > 1000
    assert json.loads((tmp_path / "results.json").read_text())["world_size"] == 1
    assert not list(tmp_path.rglob("checkpoint-*")), "a finished run leaves the adapter, not its checkpoints"


def test_a_yaml_file_gives_arguments_and_the_command_line_wins(how2, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES / "reproduction"))
    import summarise

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"data_dir: {how2}\nr: 3\nlearning_rate: 0.5\n")
    script, training = summarise.parse([str(recipe), "--learning_rate", "0.25"])
    assert (script.data_dir, script.r, training.learning_rate) == (str(how2), 3, 0.25)
    recipe.write_text("ranks: 3\n")
    with pytest.raises(ValueError, match=r"unknown arguments \['ranks'\]"):
        summarise.parse([str(recipe)])


@pytest.mark.parametrize("method", ["full", "lora", "adapter", "prompt", "bias", "partial", "proj", "none"])
def test_every_method_runs(method, how2, tmp_path, summarize):
    arguments = ("--num_train_samples", 8, "--num_test_samples", 4, "--method", method)
    result = summarize("--data_dir", how2, "--output_dir", tmp_path, *arguments, "--no_pvla")
    assert result["method"] == method
    assert 0 < result["rouge_after"]["rouge_score"]["rougeL"] <= 100


def test_a_second_run_in_the_folder_of_the_first_is_what_is_loaded(how2, tmp_path, summarize):
    """transformers puts an adapter that lies beside `model.safetensors` on top of it."""
    short = ("--num_train_samples", 8, "--num_test_samples", 2, "--no_pvla", "--no_measure_before")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "notes.txt").write_text("mine")
    for method in ("read", "bias"):
        summarize("--data_dir", how2, "--output_dir", tmp_path, *short, "--method", method)
    saved = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert "model.safetensors" in saved and "notes.txt" in saved
    assert not any("adapter" in name for name in saved)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / "model.safetensors")
    assert not any("readapter" in name for name, _ in model.named_modules())
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in weights.items())


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

    import summarise

    trainer_class = summarise.SummarisationTrainer
    monkeypatch.setattr(
        summarise,
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
        (["--r", "0"], "--r 0 must be at least 1"),
        (["--push_to_hub", "true"], "--push_to_hub needs --hub_model_id"),
        (["--require_world_size", "2"], "1 process.es. run"),
        (["--features", "nowhere"], "no video features at nowhere"),
        (["--test_split", "sum_nothing"], "sum_nothing does not exist"),
        (["--decoder_start", "zero"], "neither 'model' nor 'original'"),
        (["--backbone", "vg_gpt"], "'vg_gpt' is not one of vg_bart, vg_t5"),
        (["--backbone", "vg_t5"], "--backbone vg_t5, but .* is a 'vg_bart', which gives vg_bart"),
        (["--method", "prompt"], "would align the prompts as frames; add --no_pvla"),
        (["--new_visual_modules", '{"mask_fusion": false}'], "is a vg_bart with its own"),
        (["--new_visual_modules", '{"masks": false}'], r"must be options among \['cross_attn_type'"),
        (["--new_visual_modules", "no"], "'no' is not valid JSON"),
    ],
)
def test_bad_arguments_end_before_training(arguments, message, how2, tmp_path, summarize):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        summarize("--data_dir", how2, "--output_dir", tmp_path, *arguments)


def test_bad_input_is_one_line_for_the_user(how2, tmp_path, monkeypatch, capsys):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(how2, broken)
    lines = (broken / "sum_train" / "desc.tok.txt").read_text().splitlines()
    (broken / "sum_train" / "desc.tok.txt").write_text("\n".join([lines[0], lines[1].split()[0], *lines[2:]]))
    arguments = ["--data_dir", str(broken), "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    monkeypatch.setattr(sys, "argv", ["how2_summarize.py", *arguments])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(EXAMPLES / "how2_summarize.py"), run_name="__main__")
    # A text that a script ends with is printed, and its code is 1.
    printed = f"{capsys.readouterr().err}{end.value.code}\n"
    assert end.value.code not in (None, 0)
    assert re.search(
        r"^how2_summarize.py: .*desc\.tok\.txt, line 2: the text of 'sum_train1_1' is empty$", printed, re.M
    )
    assert "Traceback" not in printed


def test_what_the_lengths_cut_is_reported_before_training(how2, tmp_path, summarize):
    with pytest.warns(UserWarning, match="transcript entries are longer than max_source_length=3 tokens"):
        summarize("--data_dir", how2, "--output_dir", tmp_path, "--max_source_length", 3, "--num_test_samples", 2)


def test_features_of_another_width_are_refused(tmp_path, summarize):
    clips = generate_how2_mini(4, seed=1)
    narrow = [dataclasses.replace(clip, features=clip.features[:, :32]) for clip in clips]
    folder = write_how2_mini(tmp_path / "narrow", {f"sum_{name}": narrow for name in ("train", "val", "test")})
    with pytest.raises(ValueError, match=r"features are 32 wide, but .* takes 64"):
        summarize("--data_dir", folder, "--output_dir", tmp_path)


@pytest.mark.slow
def test_an_adapter_loaded_without_the_import_fails_with_the_key_error_that_the_docs_name(how2, tmp_path, summarize):
    arguments = ("--num_train_samples", 8, "--num_test_samples", 2)
    result = summarize("--data_dir", how2, "--output_dir", tmp_path, *arguments)
    load = f"PeftConfig.from_pretrained({result['adapter']!r})"
    lines = ["from peft import PeftConfig", "try:", f"    {load}", "except KeyError as error:", "    print(error)"]
    code = "\n".join([*lines, "import peft_read; from peft import get_peft_model", f"print({load}.peft_type.value)"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["'READ'", "READ"], done.stdout + done.stderr[-2000:]
    assert "import peft_read" in (Path(result["adapter"]) / "README.md").read_text()


def test_the_alignment_picture_and_the_loop_without_trainer(how2, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import accelerate_loop
    import align_video_and_text

    arguments = ["--data_dir", how2, "--num_items", "12", "--output_dir", tmp_path]
    monkeypatch.setattr(sys, "argv", ["align_video_and_text.py", *map(str, arguments)])
    align_video_and_text.main()
    printed = capsys.readouterr().out
    row = re.search(r"\| backbone \| ([\d.]+) \| ([\d.]+) \| (\S+) \|", printed)
    own, other, difference = map(float, row.groups())
    assert difference == pytest.approx(other - own, abs=1e-3) and "difference: the other minus its own" in printed
    assert len(list(tmp_path.glob("plan_*.png"))) == 1
    accelerate_loop.main(["--steps", "2"])
    assert "last task loss" in capsys.readouterr().out


def test_the_mean_of_the_last_checkpoints_and_the_figures_of_every_item(how2, tmp_path, summarize):
    given = ("--num_train_samples", 8, "--num_test_samples", 4, "--measure_before", "false", "--no_pvla")
    arguments = ("--compare_zero_video", "false", "--num_train_epochs", 3, "--average_checkpoints", 2, *given)
    result = summarize("--data_dir", how2, "--output_dir", tmp_path, "--method", "bottleneck", *arguments)
    assert result["averaged_steps"] == [2, 3] and result["reloaded_is_identical"]
    each = json.loads((tmp_path / "each_test.json").read_text())
    assert len(each["ids"]) == 4
    for name, values in each["figures"].items():
        assert sum(values) / 4 == pytest.approx(result["rouge_after"]["rouge_score"][name], abs=0.01)


@pytest.mark.parametrize("tied", [True, False])
def test_resuming_reports_missing_weights_but_not_those_that_are_tied(tmp_path, monkeypatch, tied):
    monkeypatch.syspath_prepend(str(EXAMPLES / "reproduction"))
    from progress import show_progress

    class Messages(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())

    messages: list[str] = []
    handler = Messages()
    logger, verbosity = logging.getLogger("transformers.trainer"), transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()  # the command line, called by another test, may have lowered it
    logger.addHandler(handler)
    sizes = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    config = BartConfig(vocab_size=20, d_model=8, encoder_layers=1, decoder_layers=1, **sizes)
    rows = [{"input_ids": [3, 4], "labels": [5, 6]}] * 2
    try:
        for steps in (1, 2):
            options = {"save_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True}
            arguments = TrainingArguments(str(tmp_path), max_steps=steps, **options)
            trainer = Trainer(BartForConditionalGeneration(config), arguments, train_dataset=rows)
            show_progress(trainer)
            if not tied and steps == 2:  # a weight that is really missing
                path = tmp_path / "checkpoint-1" / "model.safetensors"
                weights = load_file(path)
                del weights["model.encoder.layers.0.fc1.weight"]
                save_file(weights, path, {"format": "pt"})
            trainer.train(resume_from_checkpoint=steps == 2)
    finally:
        logger.removeHandler(handler)
        transformers.logging.set_verbosity(verbosity)
    missing = [message for message in messages if "missing keys" in message]
    assert len(missing) == (0 if tied else 1) and all("layers.0.fc1.weight" in message for message in missing)


def test_the_comparison_runs_once_and_resumes(how2, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES / "reproduction"))
    monkeypatch.syspath_prepend(str(EXAMPLES / "method_comparison"))
    import summarise
    import summarization

    def in_process(command, **options):
        assert command[:2] == [sys.executable, str(EXAMPLES / "how2_summarize.py")]
        started.append(command)
        summarise.main(command[2:])
        return type("Done", (), {"returncode": 0})

    started, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", in_process)
    options = ["--output_dir", str(tmp_path), "--suite", "table6", "--learning_rates", "0.01", "--only", "VLA"]
    rest = ["--data_dir", str(how2), *SMALL.split(), "--num_train_samples", "8", "--num_test_samples", "4"]
    rows = summarization.main([*options, "--", *rest])
    assert [row["name"] for row in rows] == ["VLA"]
    assert (tmp_path / "method_read_pvla_mass_1.0_lr0.01_seed0" / "results.json").exists()
    assert "| VLA | 14,912 | " in summarization.markdown(rows)
    assert summarization.main([*options, "--", *rest]) == rows
    assert len(started) == 1, "what has a result is not run again"
    assert json.loads((tmp_path / "table6.json").read_text()) == rows
    monkeypatch.setattr(subprocess, "run", run)
    assert set(summarization.SUITES["main"]) < set(summarization.SUITES["methods"])


@pytest.mark.parametrize("launcher", ["forks", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_two_processes_see_the_loss_of_one(launcher, how2, tmp_path, summarize):
    def arguments(processes, batch):
        given = f"--data_dir {how2} --output_dir {tmp_path / str(processes)} --num_test_samples 4 --dropout 0"
        given += f" --per_device_train_batch_size {batch} --require_world_size {processes} --logging_steps 1"
        return f"{SMALL} {given} --eval_strategy no --save_strategy no".split()

    one = summarize(*arguments(1, 8))
    two = [*arguments(2, 4), "--ddp_backend", "gloo"]
    if launcher == "forks":
        in_two_processes(lambda: summarize(*two), tmp_path)
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command += [EXAMPLES / "how2_summarize.py", *two]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((tmp_path / "2" / "results.json").read_text())
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert one["rouge_before"] == two["rouge_before"]
    losses = [
        torch.tensor(
            [[entry[name] for name in ("loss", "task_loss", "pvla_loss")] for entry in log if "loss" in entry]
        )
        for log in (one["log"], two["log"])
    ]
    assert len(losses[0]) == 3
    assert torch.allclose(*losses, rtol=1e-4)


@pytest.fixture
def recipe_trainer(monkeypatch, tmp_path):
    """A trainer of a tiny new VG-BART with the arguments of the recipe file and the command line."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "reproduction"))
    import summarise
    from summarisation_models import adapted
    from summarisation_training import SummarisationTrainer

    def build(*arguments, items=30):
        recipe = str(EXAMPLES / "recipes" / "how2_original.yaml")
        given = ["--output_dir", str(tmp_path), "--use_cpu", *map(str, arguments)]
        script, training = summarise.parse([recipe, *given])
        summarise.check_arguments(script, training)
        sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
        sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 16}
        options = {**json.loads(script.new_visual_modules), "visual_feature_dim": 8, "img_trans_heads": 2}
        config = VGBartConfig(vocab_size=20, **sizes, **options, img_trans_layers=2, img_trans_ffn_dim=8)
        names = ("visual_lr_factor", "lr_step_epochs", "lr_step_factor")
        return SummarisationTrainer(
            adapted(VGBartForConditionalGeneration(config), [], script),
            training,
            train_dataset=[{}] * items,
            eval_dataset=[{}],
            **{name: getattr(script, name) for name in names},
        )

    return build


def test_every_trained_parameter_has_one_rate_also_where_values_are_equal(recipe_trainer):
    trainer = recipe_trainer()
    model = trainer.model
    with torch.no_grad():  # what the original compares: now every parameter equals every other of its shape
        for parameter in model.parameters():
            parameter.zero_()
    optimizer = trainer.create_optimizer()
    assert (type(optimizer).__name__, trainer.args.weight_decay) == ("AdamW", 0.0)
    rates = [(id(p), group["lr"]) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(i for i, _ in rates) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    encoder = model.model.encoder
    fast = {id(p) for name in ("_linear_1", "_linear_2", "fg") for p in encoder.get_submodule(name).parameters()}
    assert len(fast) == 6
    assert dict(rates) == {id(p): pytest.approx(1.5e-4 if id(p) in fast else 3e-5) for p in model.parameters()}
    slow = [*encoder.img_transformer.parameters(), encoder.final_layer_norm.bias]  # the original forgets 21 of these
    assert all(dict(rates)[id(p)] == 3e-5 for p in slow)
    groups = len(optimizer.param_groups)
    assert len(trainer.create_optimizer().param_groups) == groups, "a second call cuts nothing again"
    with pytest.raises(ValueError, match=r"visual_lr_factor=5\.0, but no module of the fusion is trained"):
        recipe_trainer("--method", "proj").create_optimizer()


def test_the_rates_fall_in_steps_of_epochs(recipe_trainer):
    trainer = recipe_trainer("--lr_step_epochs", 2)  # 30 items in steps of 4 x 5: two steps per epoch
    optimizer = trainer.create_optimizer()
    scheduler = trainer.create_scheduler(num_training_steps=200)
    rates = []
    for _ in range(9):
        rates.append([group["lr"] for group in optimizer.param_groups if group["params"]])
        optimizer.step()
        scheduler.step()
    slow, fast = min(rates[0]), max(rates[0])
    assert fast == pytest.approx(5 * slow)
    assert [min(rate) for rate in rates] == pytest.approx([3e-5] * 4 + [3e-5 * 0.95] * 4 + [3e-5 * 0.95**2])
    assert [max(rate) for rate in rates] == pytest.approx([5 * min(rate) for rate in rates])
    with pytest.raises(ValueError, match="it needs --lr_scheduler_type constant"):
        recipe_trainer("--lr_scheduler_type", "cosine")
    with pytest.raises(ValueError, match="rouge2 needs --predict_with_generate"):
        recipe_trainer("--predict_with_generate", "false")


def test_the_originals_recipe_runs_and_keeps_the_best_validation_rouge(how2, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES / "reproduction"))
    import summarise

    tokenizer = AutoTokenizer.from_pretrained(BACKBONE)
    plain_model("bart", len(tokenizer)).save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    rouge = iter([10.0, 30.0, 20.0])
    measured = summarise.Run.validation_rouge
    monkeypatch.setattr(summarise.Run, "validation_rouge", lambda *given: measured(*given) | {"rouge2": next(rouge)})
    arguments = ["--model_name_or_path", tmp_path / "plain", "--data_dir", how2, "--output_dir", tmp_path / "run"]
    arguments += ["--validation_split", "sum_val", "--test_split", "sum_test", "--num_train_samples", 8]
    arguments += ["--num_test_samples", 4, "--num_validation_samples", 4, *SMALL.split(), "--num_train_epochs", 3]
    arguments += ["--gradient_accumulation_steps", 1, "--learning_rate", "1e-2"]
    kept = []
    save = summarise.Run.save
    monkeypatch.setattr(
        summarise.Run,
        "save",
        lambda run, trainer, *rest: kept.append(trainer.state) or save(run, trainer, *rest),
    )
    result = summarise.main([str(EXAMPLES / "recipes" / "how2_original.yaml"), *map(str, arguments)])
    [state] = kept
    assert (state.best_metric, state.best_global_step) == (30.0, 2)
    assert [entry["eval_rouge2"] for entry in result["log"] if "eval_rouge2" in entry] == [10.0, 30.0, 20.0]
    assert all(0 <= entry["eval_rougeL"] <= 100 for entry in result["log"] if "eval_rouge2" in entry)
    assert (result["method"], result["trainable"]) == ("full", result["parameters"])
