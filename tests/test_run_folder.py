"""The output folder of a run: its lock, its arguments, its checkpoints; options that mean nothing."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from faults import KILLED, PHASES, Faults, at_a_fault
from processes import in_a_process

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run_folder(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES / "reproduction"))
    monkeypatch.syspath_prepend(str(EXAMPLES / "method_comparison"))
    import run_folder

    monkeypatch.setattr(run_folder, "LOCK_SECONDS", 0.1)
    return run_folder


def checkpoint(folder, step):
    """A folder that looks like a finished checkpoint of a Trainer."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text("{}")
    return path


def test_only_checkpoints_that_the_run_has_written_are_removed(run_folder, tmp_path):
    others = [
        checkpoint(tmp_path / "other_run", 500),
        tmp_path / "data" / "checkpoint-best",
        tmp_path / "checkpoint-x",
    ]
    for path in others[1:]:
        path.mkdir(parents=True)
    run = run_folder.RunFolder(tmp_path, {"seed": 0}, ("", "without_video"))
    for part in ("", "without_video"):
        run.note_checkpoint(4, part)
        checkpoint(tmp_path / part, 4)
    run.remove_checkpoints()
    run.release()
    assert all(path.is_dir() for path in others)
    assert not (tmp_path / "checkpoint-4").exists() and not (tmp_path / "without_video" / "checkpoint-4").exists()


def test_checkpoints_of_nobody_known_are_neither_resumed_nor_rotated_away(run_folder, tmp_path):
    checkpoint(tmp_path / "a", 500)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "checkpoint-5").symlink_to(tmp_path / "a")
    for name in ("a", "b"):
        with pytest.raises(ValueError, match=r"holds checkpoint-5\d*, which the run .* has not written"):
            run_folder.RunFolder(tmp_path / name, {"seed": 0})
    assert (tmp_path / "a" / "checkpoint-500").is_dir() and (tmp_path / "b" / "checkpoint-5").is_symlink()


def interrupted(run_folder, folder, arguments):
    run = run_folder.RunFolder(folder, arguments)
    run.note_checkpoint(4)
    checkpoint(folder, 4)
    run.release()


def test_what_a_finished_run_was_killed_before_removing_goes(run_folder, tmp_path):
    interrupted(run_folder, tmp_path, {"seed": 0})
    other = checkpoint(tmp_path, 9)
    run_folder.clear_finished(tmp_path)
    assert not (tmp_path / "checkpoint-4").exists() and other.is_dir()
    assert json.loads((tmp_path / "run.json").read_text())["checkpoints"] == []


def test_a_run_goes_on_with_its_own_arguments_only(run_folder, tmp_path):
    interrupted(run_folder, tmp_path, {"seed": 0, "weight_decay": 0.0})
    with pytest.raises(ValueError, match=r"weight_decay was 0\.0, is 0\.1"):
        run_folder.RunFolder(tmp_path, {"seed": 0, "weight_decay": 0.1})
    with pytest.raises(ValueError, match="optim was None, is 'sgd'"):
        run_folder.RunFolder(tmp_path, {"seed": 0, "weight_decay": 0.0, "optim": "sgd"})
    run = run_folder.RunFolder(tmp_path, {"seed": 0, "weight_decay": 0.0})
    assert run.checkpoints == ["checkpoint-4"] and run.seconds_before > 0
    run.release()


@pytest.mark.parametrize(
    ("name", "value", "free"),
    [
        ("gradient_accumulation_steps", 2, False),
        ("weight_decay", 0.5, False),
        ("lr_scheduler_type", "linear", False),
        ("warmup_steps", 3, False),
        ("max_grad_norm", 0.5, False),
        ("adam_beta1", 0.5, False),
        ("label_smoothing_factor", 0.1, False),
        ("bf16", True, False),
        ("logging_steps", 3, False),
        ("r", 4, False),
        ("pvla_weight", 0.5, False),
        ("save_total_limit", 5, True),
        ("disable_tqdm", True, True),
        ("dataloader_num_workers", 1, True),
    ],
)
def test_all_arguments_that_change_the_result_are_compared(run_folder, name, value, free, tmp_path):
    import summarise

    base = ["--output_dir", str(tmp_path), "--use_cpu"]
    first = run_folder.run_arguments(*summarise.parse(base))
    second = run_folder.run_arguments(*summarise.parse([*base, f"--{name}", str(value)]))
    assert (first == second) is free


@pytest.mark.parametrize("text", ["", '{"arguments": {', "[]", '{"arguments": 3, "checkpoints": [], "seconds": 0}'])
def test_an_unreadable_record_never_stands_in_the_way_without_saying_so(run_folder, text, tmp_path):
    (tmp_path / "run.json").write_text(text)
    run_folder.RunFolder(tmp_path, {"seed": 0}).release()  # nothing to go on from: the run starts
    interrupted(run_folder, tmp_path, {"seed": 0})
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json cannot be read .* move them away"):
        run_folder.RunFolder(tmp_path, {"seed": 0})


def test_a_second_run_is_kept_out_while_the_first_is_alive(run_folder, tmp_path):
    first = run_folder.RunFolder(tmp_path, {"seed": 0})
    with pytest.raises(ValueError, match="another run is at work"):
        run_folder.RunFolder(tmp_path, {"seed": 1})
    assert json.loads((tmp_path / "run.json").read_text())["arguments"] == {"seed": 0}
    first.release()
    run_folder.RunFolder(tmp_path, {"seed": 1}).release()


def test_half_written_files_of_a_killed_start_are_cleared_and_others_are_not(run_folder, tmp_path):
    own, other = tmp_path / ".run.json.0123456789ab.part", tmp_path / ".notes.0123456789ab.part"
    for path in (own, other):
        path.write_text("half")
    run_folder.RunFolder(tmp_path, {}).release()
    assert not own.exists() and other.exists()


def test_files_of_a_folder_are_written_atomically(run_folder, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "weights").write_text("old")
    with pytest.raises(OSError), run_folder.written_whole(folder) as part:
        part.mkdir()
        (part / "weights").write_text("ne")
        raise OSError(28, "No space left on device")
    assert (folder / "weights").read_text() == "old"
    with run_folder.written_whole(folder) as part:
        part.mkdir()
        (part / "weights").write_text("new")
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"notes.txt": "mine", "weights": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def fill(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


ADAPTER = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "README.md",
    "training_args.bin",
    "verify/adapter_config.json",
)
OLD_MODEL = dict.fromkeys((*ADAPTER, "beside_adapter.safetensors", "tokenizer_config.json", "spiece.model"), "old")
NEW_MODEL = dict.fromkeys(("config.json", "generation_config.json", "model.safetensors", "training_args.bin"), "new")
OF_THE_USER = {"notes.txt": "mine", "figures/curve.png": "mine", "figures/results.json": "mine"}


@pytest.mark.parametrize("linked", [False, True])
def test_a_new_model_leaves_nothing_of_the_old_one_and_all_of_the_users(run_folder, linked, tmp_path):
    """An adapter's files beside `model.safetensors` would be put on top of it by `from_pretrained`."""
    folder = tmp_path / "trained"
    if linked:
        (tmp_path / "elsewhere").mkdir()
        folder.symlink_to(tmp_path / "elsewhere")
    fill(folder, OLD_MODEL | OF_THE_USER)
    with run_folder.written_whole(folder) as part:
        fill(part, NEW_MODEL)
        assert files_of(folder) == OLD_MODEL | OF_THE_USER
    assert files_of(folder) == NEW_MODEL | OF_THE_USER
    assert {path.name for path in tmp_path.iterdir()} == {"trained", *(["elsewhere"] * linked)}
    assert folder.is_symlink() == linked


def test_a_folder_that_cannot_be_written_stays(run_folder, tmp_path):
    fill(tmp_path, {"trained": "a file", "adapter/adapter_config.json": "old"})
    with pytest.raises(NotADirectoryError, match="trained is a file"), run_folder.written_whole(tmp_path / "trained"):
        pass
    with pytest.raises(FileNotFoundError, match="nothing was written"), run_folder.written_whole(tmp_path / "adapter"):
        pass
    assert files_of(tmp_path) == {"trained": "a file", "adapter/adapter_config.json": "old"}


def test_a_kill_at_any_write_leaves_the_old_or_the_new_model_whole(run_folder, tmp_path):
    def replace(folder, files):
        with run_folder.written_whole(folder) as part:
            fill(part, files)

    at, ends = 0, []
    while True:
        for phase in PHASES:
            folder = tmp_path / f"{at}_{phase}" / "trained"
            fill(folder, OLD_MODEL | OF_THE_USER)
            ends.append(in_a_process(at_a_fault(lambda: replace(folder, NEW_MODEL), Faults(folder.parent, at, phase))))  # noqa: B023
            assert ends[-1] in (KILLED, 0)
            whole = run_folder.where_whole(folder)
            models = {name: text for name, text in files_of(whole).items() if name not in OF_THE_USER}
            assert models in (OLD_MODEL, NEW_MODEL), (at, phase)
            replace(folder, NEW_MODEL | {"adapter_config.json": "third"})
            assert files_of(folder.parent) == {
                f"trained/{name}": text
                for name, text in (NEW_MODEL | {"adapter_config.json": "third"} | OF_THE_USER).items()
            }, (at, phase)
        at += 1
        if ends[-1] == 0:
            break
    assert ends.count(KILLED) > 20


def forked(work):
    """A fork of this process that runs `work`, says so, and sleeps; its id, once it has said so."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            kept = work()
            os.write(write, b"ready")
            time.sleep(120)
            del kept
        finally:
            os._exit(0)
    os.close(write)
    assert os.read(read, 5) == b"ready"
    os.close(read)
    return child


def test_a_child_ends_with_the_parent_that_holds_its_input(run_folder, monkeypatch):
    read, write = os.pipe()
    monkeypatch.setenv(run_folder.ENDS_WITH_STDIN, "1")

    def follow():
        os.dup2(read, 0)
        os.close(write)
        run_folder.end_with_parent()

    child = forked(follow)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.close(write)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    os.close(read)


def comparison(tmp_path, monkeypatch, rest=(), results='{"log": []}'):
    """One row of one rate, whose run writes the given text; how many runs were started."""
    import summarization

    started = []

    def run(command, **options):
        started.append(command)
        folder = Path(command[command.index("--output_dir") + 1])
        (folder / "results.json").write_text(results)
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(summarization, "table_row", lambda *_: None)
    options = ["--output_dir", str(tmp_path), "--suite", "main", "--only", "read", "--learning_rates", "0.01"]
    summarization.main([*options, "--", *rest])
    return len(started)


def test_a_result_that_is_half_is_made_again(run_folder, tmp_path, monkeypatch):
    assert comparison(tmp_path, monkeypatch, results='{"log": [') == 1
    assert comparison(tmp_path, monkeypatch) == 1
    assert comparison(tmp_path, monkeypatch) == 0


def test_a_result_of_other_arguments_is_not_taken_without_a_word(run_folder, tmp_path, monkeypatch, capsys):
    comparison(tmp_path, monkeypatch, rest=["--num_train_epochs", "1"])
    assert comparison(tmp_path, monkeypatch, rest=["--num_train_epochs", "2"]) == 0
    assert "holds the result of other arguments" in capsys.readouterr().err


def test_two_comparisons_do_not_share_a_folder(run_folder, tmp_path, monkeypatch, capsys):
    lock = run_folder.lock_folder(tmp_path)
    with pytest.raises(SystemExit):
        comparison(tmp_path, monkeypatch)
    assert "another run is at work" in capsys.readouterr().err
    lock.release()
    for options in (["--seeds", "0", "0"], ["--jobs", "0"], ["--learning_rates", "nan"]):
        import summarization

        with pytest.raises(SystemExit):
            summarization.main(["--output_dir", str(tmp_path), *options])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("r: 4.5", "argument --r: invalid int value: '4.5'"),
        ("pvla: maybe", "--pvla"),
        ("r:", "r has no value"),
        ("- r", "must hold `argument: value` lines, not list"),
        ("r: [", "is no YAML"),
        ("learning_rate: fast", "--learning_rate"),
        ("3: 4", r"unknown arguments \['3'\]"),
    ],
)
def test_errors_in_a_yaml_file_name_the_file(run_folder, text, message, tmp_path):
    import summarise

    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"recipe.yaml.*{message}"):
        summarise.parse([str(path)])


def test_values_of_a_yaml_file_mean_what_they_say(run_folder, tmp_path):
    import summarise

    path = tmp_path / "recipe.yaml"
    path.write_text(
        'pvla: "false"\nlearning_rate: 3.0e-5\nnum_train_samples: 7\nnew_visual_modules: {fusion_layer: -1}'
    )
    script, training = summarise.parse([str(path), "--use_cpu"])
    assert (script.pvla, training.learning_rate, script.num_train_samples) == (False, 3e-5, 7)
    assert json.loads(script.new_visual_modules) == {"fusion_layer": -1}
    assert summarise.parse([str(EXAMPLES / "recipes" / "how2_original.yaml"), "--use_cpu"])[0].pvla is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--num_train_samples 0", "--num_train_samples 0 must be at least 1"),
        ("--num_test_samples -1", "--num_test_samples -1"),
        ("--max_frames 0", "--max_frames 0"),
        ("--learning_rate nan", "--learning_rate nan is not a finite number"),
        ("--learning_rate -1", "--learning_rate -1"),
        ("--per_device_train_batch_size 0", "--per_device_train_batch_size 0"),
        ("--gradient_accumulation_steps 0", "gradient_accumulation_steps"),
        ("--num_train_epochs 0", "trains nothing"),
        ("--pvla_weight nan", "--pvla_weight nan"),
        ("--pvla_mass 0", "mass=0"),
        ("--pvla_distance far", "distance='far'"),
        ("--cell tanh", "`cell` should be one of"),
        ("--subset last", "--subset 'last'"),
        ("--dropout 1.5", "--dropout 1.5"),
        ("--generation_num_beams 0", "--generation_num_beams 0"),
        ("--pvla perhaps", "--pvla"),
        ("--nothing 3", "--nothing"),
        ("--r four", "--r"),
    ],
)
def test_invalid_options_are_named(run_folder, arguments, message, tmp_path):
    import summarise

    with pytest.raises(ValueError, match=message):
        summarise.prepare(["--output_dir", str(tmp_path), "--use_cpu", *arguments.split()])
    assert not (tmp_path / "run.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--num_items 0", "--num_items 0"),
        ("--d_model 10 --heads 4", "not a multiple"),
        ("--fusion_layer 2", "--fusion_layer 2"),
        ("--softmax_dim words", "--softmax_dim 'words'"),
        ("--corpus films", "'films' is neither"),
        ("--corpus captions", "needs --captions"),
        ("--dropout nan", "--dropout nan"),
    ],
)
def test_invalid_options_of_the_pretraining_are_named(run_folder, arguments, message, tmp_path):
    import pretrain_summariser

    with pytest.raises(ValueError, match=message):
        pretrain_summariser.main(["--output_dir", str(tmp_path), "--use_cpu", *arguments.split()])


def test_weights_that_are_cut_short_are_found_before_anything_is_trained(run_folder, tmp_path):
    from summarisation_models import check_weights

    whole = EXAMPLES / "how2_mini_backbone" / "model.safetensors"
    (tmp_path / "model.safetensors").write_bytes(whole.read_bytes()[:100_000])
    check_weights(str(whole.parent))
    with pytest.raises(ValueError, match=r"model\.safetensors holds no whole weights"):
        check_weights(str(tmp_path))


def test_a_lock_of_a_dead_process_is_free(run_folder, tmp_path):
    child = forked(lambda: run_folder.lock_folder(tmp_path))
    with pytest.raises(ValueError, match="another run is at work"):
        run_folder.lock_folder(tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    run_folder.lock_folder(tmp_path).release()
