"""The multi-task example and its comparison, run as a user runs them, on generated scenes and on tiny real formats."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from peft_read.models import VLBartConfig, VLBartForConditionalGeneration

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = "--use_cpu --disable_tqdm true --num_train_samples 24 --num_validation_samples 8 --num_test_samples 8"
SMALL += " --num_train_epochs 1 --per_device_train_batch_size 8"


@pytest.fixture(scope="module")
def scripts():
    paths = [str(EXAMPLES / "reproduction"), str(EXAMPLES / "method_comparison")]
    sys.path[:0] = paths
    import multitask
    import multitask_data
    import multitask_models
    import pretrain_vl

    yield {"multitask": multitask, "data": multitask_data, "models": multitask_models, "pretrain": pretrain_vl}
    for path in paths:
        sys.path.remove(path)


@pytest.fixture(scope="module")
def backbone(scripts, tmp_path_factory):
    """A tiny VL-BART, made by the script that makes the real one."""
    folder = tmp_path_factory.mktemp("backbone")
    captions = folder / "captions.jsonl"
    captions.write_text(json.dumps({"vid": "a", "captions": ["a man rides a horse", "two dogs in the snow"]}) + "\n")
    sizes = "--d_model 16 --ffn_dim 16 --encoder_layers 1 --decoder_layers 1 --heads 2 --vocab_size 200"
    options = "--hold_out comparing --num_items 32 --per_device_train_batch_size 16 --use_cpu --disable_tqdm true"
    scripts["pretrain"].main(
        ["--output_dir", str(folder), "--captions", str(captions), *sizes.split(), *options.split()]
    )
    record = json.loads((folder / "pretraining.json").read_text())
    assert "comparing" not in record["topics"]
    assert (record["captions"], record["steps"]) == (2, 2)
    tokens = AutoTokenizer.from_pretrained(folder)("There are 12 blocks.")["input_ids"]
    assert tokens[-1] == 2  # </s>
    return folder


def run(scripts, backbone, folder, *arguments):
    given = ["--model_name_or_path", str(backbone), "--output_dir", str(folder), *SMALL.split(), *arguments]
    return scripts["multitask"].main(given)


@pytest.mark.parametrize(
    "arguments",
    [
        "--method adapter --share half_up --prompts",
        "--method hyperformer",
        "--method read_pvla",
        "--method prompt",
        pytest.param("--method compacter --share multiple", marks=pytest.mark.slow),
        pytest.param("--method bitfit", marks=pytest.mark.slow),
        pytest.param("--method full", marks=pytest.mark.slow),
    ],
)
def test_every_kind_of_method_trains_saves_and_reloads(scripts, backbone, tmp_path, arguments):
    result = run(scripts, backbone, tmp_path, *arguments.split())
    assert set(result["after"]) == {"verify", "ask", "describe"} == set(result["before"])
    assert result["reloaded_is_identical"]
    for task, scores in result["scores"].items():  # of each test example
        assert len(scores) == 8 and sum(scores) / 8 == pytest.approx(result["after"][task], abs=1e-3)
    assert (result["trainable"] < result["parameters"]) == (result["method"] != "full")
    assert {"report.md", "tasks.png", "results.json", "trained"} <= {path.name for path in tmp_path.iterdir()}
    assert not list(tmp_path.glob("checkpoint-*"))
    losses = {name for entry in result["log"] for name in entry if name.startswith("eval_") and name.endswith("_loss")}
    assert {"eval_verify_loss", "eval_ask_loss", "eval_describe_loss"} <= losses


def test_the_weights_of_every_task_are_trained_and_differ(scripts, backbone, tmp_path):
    result = run(scripts, backbone, tmp_path, "--method", "lora", "--share", "multiple", "--num_train_epochs", "2")
    assert result["reloaded_is_identical"]
    from safetensors.torch import load_file

    up = {}
    for task in ("verify", "ask", "describe"):
        weights = load_file(tmp_path / "trained" / task / "adapter_model.safetensors")
        up[task] = torch.cat([value.flatten() for name, value in weights.items() if "lora_B" in name])
        assert up[task].abs().max() > 0, task
    assert not torch.equal(up["verify"], up["ask"])


def test_a_second_run_in_the_folder_of_the_first_is_what_is_loaded(scripts, backbone, tmp_path):
    """One adapter, then one per task, then another method that trains nothing beside its adapter."""
    short = ["--max_steps", "1", "--save_strategy", "no", "--eval_strategy", "no", "--no_measure_before"]
    saved = []
    for method in ("--method lora", "--method lora --share multiple", "--method adapter"):
        result = run(scripts, backbone, tmp_path, *method.split(), *short)
        assert result["reloaded_is_identical"], method
        saved.append({path.relative_to(tmp_path / "trained").as_posix() for path in tmp_path.glob("trained/**/*.*")})
    configs = [sorted(name for name in names if name.endswith("adapter_config.json")) for names in saved]
    of_tasks = [f"{task}/adapter_config.json" for task in ("ask", "describe", "verify")]
    assert configs == [["adapter_config.json"], of_tasks, ["adapter_config.json"]]
    assert ["beside_adapter.safetensors" in names for names in saved] == [True, True, False]


@pytest.mark.parametrize(
    "method",
    [
        "--method adapter",
        "--method lora --share multiple",
        pytest.param("--method read", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_goes_on(method, scripts, backbone, tmp_path, monkeypatch):
    """Also where weights beside the adapter are trained, which Trainer's checkpoints do not hold."""
    arguments = [*method.split(), "--num_train_epochs", "2"]
    whole = run(scripts, backbone, tmp_path / "whole", *arguments)
    trainer = scripts["multitask"].MultitaskTrainer

    class Cut(trainer):
        def _save_checkpoint(self, *args, **kwargs):
            super()._save_checkpoint(*args, **kwargs)
            raise KeyboardInterrupt

    monkeypatch.setattr(scripts["multitask"], "MultitaskTrainer", Cut)
    with pytest.raises(KeyboardInterrupt):
        run(scripts, backbone, tmp_path / "cut", *arguments)
    monkeypatch.undo()
    resumed = run(scripts, backbone, tmp_path / "cut", *arguments)
    assert resumed["log"] == whole["log"]
    assert resumed["after"] == whole["after"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--method magic", "'magic' is not one of full, bitfit, prompt, lora"),
        ("--share some", "'some' is not one of single, half_down"),
        ("--method lora --share half_up", "--share half_up shares the down or the up half of adapters"),
        ("--method full --share multiple", "has one set of weights for all tasks"),
        ("--method hyperformer --share multiple", "Hyperformer's tasks share its generators"),
        ("--method prompt --prompts", "they are the method already"),
        ("--tasks verify guess", r"--tasks \['guess'\]: the tasks of vl_mini are"),
        ("--suite scenes", "--suite scenes needs --data_dir"),
        ("--data_dir nowhere", r"nowhere.nlvr has no dev.jsonl or"),
        ("--require_world_size 2", r"1 process\(es\) run"),
        ("--reduction_factor 0", "--reduction_factor 0 must be at least 1"),
    ],
)
def test_bad_arguments_end_before_training(scripts, backbone, tmp_path, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(scripts, backbone, tmp_path, *arguments.split())


def test_real_formats_are_split_by_what_they_share(scripts, reference_data):
    suites = scripts["data"]
    folder = reference_data("data/vl")
    suite = suites.load_suite("scenes", ["nlvr", "kilogram_part"], str(folder), dict.fromkeys(suites.SPLITS), seed=0)
    sizes = {split: {task: len(rows) for task, rows in of.items()} for split, of in suite.splits.items()}
    assert sizes["test"] == {"nlvr": 990, "kilogram_part": 105}
    groups = [set(suite.splits[split]["nlvr"]["group"]) for split in suites.SPLITS]
    assert not groups[0] & groups[1]
    assert not (groups[0] | groups[1]) & groups[2]
    shapes = [{v[0] for v in suite.splits[split]["kilogram_part"]["visuals"]} for split in suites.SPLITS]
    assert not shapes[0] & shapes[1]
    assert not (shapes[0] | shapes[1]) & shapes[2]
    row = suite.splits["test"]["nlvr"][0]
    assert sorted(suites.scene_tokens({**row, "draw": 0.99}).image_ids) != []
    assert (suites.scene_tokens(row).features == suites.scene_tokens({**row, "draw": 0.0}).features).all()


def published_files(folder):
    """Three examples per split of each benchmark, in the files that its authors publish, with features and boxes."""
    rng = np.random.default_rng(0)
    image = {"img_id": "1", "sent": "What is this?"}
    choices = {f"a{place}": f"He sits {place}." for place in range(5)}
    records = {
        "vqa": lambda i: {**image, "question_id": i, "label": {"net": 1.0, "mesh": 0.3}, "answer_type": "other"},
        "gqa": lambda i: {**image, "question_id": f"0{i}", "label": {"pipe": 1.0}},
        "nlvr": lambda i: (
            {"identifier": f"dev-{i}-0-0", "img0": "1", "img1": "2", "label": i % 2, "sent": "Two."} | {"uid": f"n{i}"}
        ),
        "tvqa": lambda i: (
            {"qid": i, "vid_name": "1", "show_name": "Castle", "q": "Why?", "ts": "1.2-3.4", "answer_idx": i} | choices
        ),
        "how2qa": lambda i: (
            {"qid": i, "vid_name": "1", "q": "Why?", "ts": "1.2-3.4", "answer_idx": i}
            | {name: choices[name] for name in ("a0", "a1", "a2", "a3")}
        ),
        "tvc": lambda i: (
            {"clip_id": i, "vid_name": "1", "duration": 9.0, "ts": [1.0, 2.5]}
            | {"descs": [{"desc_id": i, "desc": "A man cooks.", "type": "v"}]}
        ),
        "yc2c": lambda i: (
            {"clip_id": i, "vid_name": "1", "duration": 9.0} | {"descs": [{"desc_id": i, "desc": "wash the rice"}]}
        ),
    }
    for task, record in records.items():
        (folder / task).mkdir()
        for split in ("train", "validation", "test"):
            rows = [record(i) for i in range(3)]
            if task in ("vqa", "gqa", "nlvr"):
                (folder / task / f"{split}.json").write_text(json.dumps(rows))
            else:
                (folder / task / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "caption").mkdir()
    coco = [
        {"filename": f"{i}.jpg", "cocoid": i, "split": split, "sentences": [{"raw": "A dog runs."}, {"raw": "Dogs."}]}
        for i, split in enumerate(("train", "restval", "val", "test"))
    ]
    (folder / "caption" / "dataset_coco.json").write_text(json.dumps({"images": coco}))
    (folder / "tvqa" / "subtitles.jsonl").write_text(json.dumps({"vid_name": "1", "sub": [{"text": "Hello."}]}))
    corners = np.sort(rng.random((5, 2, 2)), axis=1).reshape(5, 4)
    for task in [*records, "caption"]:
        for kind in ("features", "boxes"):
            (folder / task / kind).mkdir()
            for key in "0123":
                np.save(folder / task / kind / f"{key}.npy", rng.random((5, 6)) if kind == "features" else corners)


@pytest.mark.parametrize("suite", ["image", "video"])
def test_the_benchmarks_run_in_their_published_formats(scripts, backbone, tmp_path, suite):
    pytest.importorskip("pycocoevalcap")
    published_files(tmp_path)
    config = VLBartConfig.from_pretrained(backbone)
    config.update({"visual_feature_dim": 6, "num_images": 2, "max_objects": 64, "max_position_embeddings": 640})
    wide = tmp_path / "wide"
    VLBartForConditionalGeneration(config).save_pretrained(wide)
    AutoTokenizer.from_pretrained(backbone).save_pretrained(wide)
    result = run(scripts, wide, tmp_path / "out", "--suite", suite, "--data_dir", str(tmp_path), "--share", "multiple")
    assert set(result["after"]) == set(scripts["data"].SUITES[suite]) and result["reloaded_is_identical"]


@pytest.mark.slow
def test_moments_become_captions_and_choices(scripts, reference_data, tmp_path):
    suites, folder = scripts["data"], reference_data("data/qvhighlights").parent
    tasks = list(suites.SUITES["moments"])
    suite = suites.load_suite("moments", tasks, str(folder), {"train": 16, "validation": 8, "test": 8}, seed=0)
    caption, choice = (suite.splits["train"][task][0] for task in tasks)
    features, boxes, _ = suite.visuals(caption)
    assert features.shape == (min(64, len(caption["clips"])), 128) and boxes.shape == (len(features), 4)
    assert len(suite.visuals(choice).features) == 64  # 75 clips, pooled over time
    place = int(choice["target"][1])
    query = caption["target"].strip(". ") if caption["id"] == choice["id"] else None
    assert choice["text"].count(":") >= 6 and (query is None or f"a{place}: {query}." in choice["text"])
    sources = [
        {row["visuals"][0].rsplit("_", 2)[0] for row in suite.splits[split][tasks[0]]}
        for split in ("train", "validation")
    ]
    assert not sources[0] & sources[1]
    sizes = (
        "--d_model 16 --ffn_dim 16 --encoder_layers 1 --decoder_layers 1 --heads 2 --vocab_size 2000 --num_items 16"
    )
    data = folder / "qvhighlights"
    options = [
        "--captions",
        data / "captions_minigptv2_val.jsonl.xz",
        "--unseen",
        data / "highlight_test_with_gt.jsonl.xz",
    ]
    options += ["--features", folder / "features/qvhighlights_val_captions.npz", "--output_dir", tmp_path / "backbone"]
    scripts["pretrain"].main(
        [*map(str, options), *sizes.split(), "--num_items", "16", "--use_cpu", "--disable_tqdm", "true"]
    )
    given = ["--suite", "moments", "--data_dir", str(folder), "--method", "adapter", "--share", "multiple"]
    result = run(scripts, tmp_path / "backbone", tmp_path / "out", *given, "--tasks", "moment_choice")
    assert result["reloaded_is_identical"] and list(result["after"]) == ["moment_choice"]


def test_scores_by_hand(scripts):
    data = scripts["data"]
    rows = [{"answers": ["wing", "wing", "a wing", "arm"]}, {"answers": ["head"] * 2}]
    assert data.consensus(["Wing.", "head"], rows) == pytest.approx([100, 100 * 2 / 3])
    assert data.exact_match(["true", "False"], [{"target": "true"}, {"target": "false"}]) == [100, 0]
    assert data.soft_accuracy(["net", "no"], [{"answers": ["net", "mesh"], "scores": [1.0, 0.3]}] * 2) == [100, 0]
    assert data.words("A man's dog, No. 2!") == "a man s dog no 2"


def test_the_comparison_tells_differences_from_chance(monkeypatch):
    """A method that is 10 points better on every example, and one that differs by a coin's toss."""
    for folder in ("reproduction", "method_comparison"):
        monkeypatch.syspath_prepend(str(EXAMPLES / folder))
    spec = importlib.util.spec_from_file_location(
        "compare_tasks", EXAMPLES / "method_comparison" / "multitask.py"
    )  # the module of the runs has the same name
    compare_tasks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compare_tasks)
    rng = np.random.default_rng(0)
    full = rng.choice([0.0, 50.0], size=(3, 200))
    tables = {"full": full, "better": full + 10, "chance": rng.choice([0.0, 50.0], size=(3, 200))}

    def result(scores):
        base = {"metrics": {"nlvr": "accuracy"}, "trainable": 1, "parameters": 10, "seconds": 1.0}
        entry = {"eval_nlvr_loss": 1.0}
        after, each = {"nlvr": float(scores.mean())}, {"nlvr": scores.tolist()}
        return base | {"log": [entry], "after": after, "scores": each, "units": {"nlvr": [i // 2 for i in range(200)]}}

    choices = {
        name: compare_tasks.Choice(1e-3, [1e-3], [], {seed: [result(table[seed])] for seed in range(3)})
        for name, table in tables.items()
    }
    rows = [compare_tasks.table_row(name, choice) for name, choice in choices.items()]
    compare_tasks.add_differences(rows, choices)
    of = {row["name"]: row.get("against_full", {}).get("nlvr") for row in rows}
    assert of["full"] is None
    assert of["better"]["mean"] == pytest.approx(10) and of["better"]["low"] == pytest.approx(10)
    assert of["better"]["p"] < 0.001 and of["chance"]["p"] > 0.05
    assert of["chance"]["low"] < 0 < of["chance"]["high"]
    page = compare_tasks.markdown(rows)
    assert "| better | +10.0 [+10.0, +10.0], p < 0.001 |" in page and page.count("| full |") == 1
