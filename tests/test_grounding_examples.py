"""The grounding scripts end to end on a few made-up videos: every dataset, both backbones, the harness."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from peft_read.data import write_feature_archive

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path[:0] = [str(EXAMPLES / "reproduction"), str(EXAMPLES / "method_comparison")]
ground_moments, grounding, grounding_data, pretrain_grounding = map(
    importlib.import_module, ("ground_moments", "grounding", "grounding_data", "pretrain_grounding")
)
WORDS = ["red", "green", "blue", "dog", "cat", "car"]
TINY = ["--d_model", "16", "--ffn_dim", "16", "--per_device_train_batch_size", "4", "--use_cpu", "--disable_tqdm", "1"]


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Twelve source videos of two clips of video each, in which one word's features are shown during its moment."""
    folder = tmp_path_factory.mktemp("grounding")
    generator = np.random.default_rng(0)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[PAD]", "[UNK]", *WORDS])}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    encoder = folder / "encoder"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(encoder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=len(WORDS) + 2, **sizes)).save_pretrained(encoder)
    features, rows, captions = {}, [], []
    for index in range(24):
        vid = f"source{index // 2}_{index % 2}.0_40.0"
        scenes = generator.normal(size=(4, 16)).repeat(5, axis=0)
        features[vid] = (scenes + 0.1 * generator.normal(size=(20, 16))).astype(np.float32)
        captions.append({"vid": vid, "captions": [f"{WORDS[clip // 5]} {WORDS[clip % 6]}" for clip in range(20)]})
        rows.append(
            {"qid": index, "query": f"{WORDS[index % 6]} {WORDS[index % 5]}", "vid": vid, "duration": 40,
             "relevant_windows": [[10, 20]], "relevant_clip_ids": [5, 6, 7, 8, 9],
             "saliency_scores": [[4, 3, 4], [1, 2, 2], [3, 3, 3], [4, 4, 4], [2, 2, 1]]}
        )  # fmt: skip
    labels = generator.integers(1, 6, size=(3, 20, 20)).tolist()
    tvsum = [
        {"vid": f"t{i}", "query": WORDS[i], "domain": "BK", "label": label, "n_frames": 1200}
        for i, label in enumerate(labels)
    ]
    youtube = {
        f"y{i}": {"domain": "dog", "fps": 25.0, "frames": 500, "clip": [[0, 100]] * 9, "match": [1, -1, 0] * 3}
        for i in range(4)
    }
    (folder / "youtube_anno.json").write_text(json.dumps(youtube))
    (folder / "youtube").mkdir()
    for vid in youtube:
        np.save(folder / "youtube" / f"{vid}.npy", generator.normal(size=(9, 16)))
    rows_of_frames = {f"t{i}": generator.normal(size=(80, 16)).astype(np.float32) for i in range(3)}
    return {
        "folder": folder,
        "encoder": ["--text_encoder", str(encoder)],
        "features": str(write_feature_archive(folder / "features.npz", features)),
        "all": write_jsonl(folder / "val.jsonl", rows[:18]),
        "test": write_jsonl(folder / "test.jsonl", rows[18:]),
        "hidden": write_jsonl(folder / "hidden.jsonl", [{k: r[k] for k in list(r)[:4]} for r in rows[18:]]),
        "captions": write_jsonl(folder / "captions.jsonl", captions),
        "tvsum": write_jsonl(folder / "tvsum.jsonl", tvsum),
        "frames": str(write_feature_archive(folder / "frames.npz", rows_of_frames)),
    }


def qvhighlights(world, *arguments):
    split = ["--num_train_samples", "8", "--num_validation_samples", "4"]
    data = ["--train_file", world["all"], "--features", world["features"], *world["encoder"], *split]
    return [*data, *TINY, *arguments]


@pytest.fixture(scope="module")
def backbone(world):
    folder = world["folder"] / "backbone"
    arguments = ["--captions", world["captions"], "--max_steps", "2", "--output_dir", str(folder)]
    record = pretrain_grounding.main(qvhighlights(world, *arguments))
    assert record["queries"] > 8
    return folder


def test_pretraining_takes_the_training_side_only_and_a_backbone_that_saw_more_is_refused(world, backbone, tmp_path):
    record = json.loads((backbone / "pretraining.json").read_text())
    assert len(record["videos"]) <= 8
    other = qvhighlights(world, "--model_name_or_path", str(backbone), "--subset_seed", "5")
    with pytest.raises(ValueError, match=r"pretrained on sources of \d validation videos"):
        ground_moments.main([*other, "--output_dir", str(tmp_path)])


def test_a_run_trains_selects_submits_draws_and_answers_a_query(world, backbone, tmp_path, capsys):
    arguments = ["--model_name_or_path", str(backbone), "--method", "read", "--pvla", "--r", "2"]
    arguments += ["--test_file", world["test"], "--num_train_epochs", "2", "--output_dir", str(tmp_path)]
    result = ground_moments.main(qvhighlights(world, *arguments))
    assert result["reloaded_is_identical"]
    assert any("eval_pvla_loss" in entry for entry in result["log"])
    best = max(entry["eval_MR-full-mAP"] for entry in result["log"] if "eval_MR-full-mAP" in entry)
    assert result["validation"]["MR-full-mAP"] == best
    submitted = [json.loads(line) for line in (tmp_path / "submission_test.jsonl").read_text().splitlines()]
    assert [record["qid"] for record in submitted] == list(range(18, 24))
    assert len(submitted[0]["pred_saliency_scores"]) == 20
    assert all(0 <= start <= end <= 40 for start, end, _ in submitted[0]["pred_relevant_windows"])
    assert (tmp_path / "moments.png").stat().st_size > 1000
    assert not list(tmp_path.glob("checkpoint-*"))
    capsys.readouterr()
    answer = ["--predict", "red dog", "--video", "source3_0.0_40.0", "--output_dir", str(tmp_path)]
    record = ground_moments.main(answer)
    assert "'red dog' in source3_0.0_40.0" in capsys.readouterr().out
    assert len(record["pred_relevant_windows"]) == 10
    with pytest.raises(ValueError, match="needs --video"):
        ground_moments.main(answer[:2])


def test_a_second_run_in_the_folder_of_the_first_is_what_is_loaded(world, backbone, tmp_path):
    """transformers puts an adapter that lies beside `model.safetensors` on top of it."""
    arguments = ["--model_name_or_path", str(backbone), "--max_steps", "2", "--eval_strategy", "no"]
    arguments += ["--save_strategy", "no", "--test_file", world["test"], "--output_dir", str(tmp_path)]
    asked = ground_moments.ScriptArguments(predict="red dog", video="source3_0.0_40.0")
    for method in ("read", "full"):
        result = ground_moments.main(qvhighlights(world, *arguments, "--method", method))
        assert result["reloaded_is_identical"], method
    assert {path.name for path in (tmp_path / "trained").iterdir()} == {
        *("config.json", "model.safetensors", "training_args.bin"),
    }
    model = ground_moments.Answer(asked, tmp_path).model
    assert not any("readapter" in name for name, _ in model.named_modules())
    ground_moments.main(qvhighlights(world, *arguments, "--method", "none"))
    bare = ground_moments.Answer(asked, tmp_path).model
    weights = load_file(backbone / "model.safetensors")
    assert all(torch.equal(weights[name], weight) for name, weight in bare.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "method"),
    [("moment_detr", "prompt"), ("moment_detr", "lora"), ("umt", "read"), ("umt", "bias"), ("umt", "prompt")],
)
def test_methods_and_backbones_train_without_a_labelled_test(world, tmp_path, kind, method):
    arguments = ["--backbone", kind, "--method", method, "--max_steps", "2", "--eval_strategy", "no"]
    arguments += ["--save_strategy", "no", "--test_file", world["hidden"], "--output_dir", str(tmp_path)]
    if kind == "umt":
        arguments += ["--model_options", '{"max_positions": 32, "decoder_layers": 1}']
    result = ground_moments.main(qvhighlights(world, *arguments))
    assert result["test"] == {}
    assert result["reloaded_is_identical"]
    assert 0 < result["trainable"] < result["parameters"]
    assert len((tmp_path / "submission_test.jsonl").read_text().splitlines()) == 6


def test_classified_spans_work_end_to_end(world, tmp_path):
    arguments = ["--method", "full", "--max_steps", "2", "--model_options", '{"span_loss_type": "ce"}']
    arguments += ["--test_file", world["test"], "--eval_strategy", "no", "--save_strategy", "no"]
    result = ground_moments.main(qvhighlights(world, *arguments, "--output_dir", str(tmp_path)))
    assert 0 <= result["test"]["MR-full-mAP"] <= 100


def test_tvsum_holds_out_every_video_of_a_domain(world, tmp_path):
    arguments = ["--dataset", "tvsum", "--train_file", world["tvsum"], "--features", world["frames"]]
    arguments += [*world["encoder"], *TINY, "--method", "adapter", "--max_steps", "1", "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match="--domain is needed"):
        ground_moments.main(arguments)
    result = ground_moments.main([*arguments, "--domain", "BK"])
    assert sorted(result["folds"]) == ["t0", "t1", "t2"]
    scores = [fold["test"]["top5-mAP"] for fold in result["folds"].values()]
    assert result["test"]["top5-mAP"] == pytest.approx(np.mean(scores))
    assert 0 < result["test"]["top5-mAP"] <= 100


def test_youtube_highlights_train_umt_without_queries(world, tmp_path):
    file = str(world["folder"] / "youtube_anno.json")
    arguments = ["--dataset", "youtube_highlights", "--domain", "dog", "--train_file", file, "--test_file", file]
    arguments += ["--features", str(world["folder"] / "youtube"), *TINY, "--output_dir", str(tmp_path)]
    arguments += ["--no_endpoints", "--model_options", '{"max_positions": 16}', "--max_steps", "1"]
    with pytest.raises(ValueError, match="use --backbone umt"):
        ground_moments.main(arguments)
    result = ground_moments.main([*arguments, "--backbone", "umt", "--method", "read"])
    assert 0 < result["test"]["mAP"] <= 100


def test_the_harness_runs_once_and_chooses_by_validation(world, backbone, tmp_path, monkeypatch):
    started = []

    def in_process(command, **options):
        started.append(command)
        ground_moments.main(command[2:])
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr("subprocess.run", in_process)
    rest = qvhighlights(world, "--model_name_or_path", str(backbone), "--test_file", world["test"])
    options = ["--output_dir", str(tmp_path), "--suite", "main", "--only", "no adaptation", "adapter"]
    options += ["--", *rest, "--num_train_epochs", "1", "--r", "2"]
    rows = grounding.main(options)
    assert len(started) == 1 + 2
    assert [row["name"] for row in rows] == ["no adaptation", "adapter"]
    assert rows[0]["trainable"] == 0
    assert rows[1]["rates_tried"] == [1e-3, 3e-3]
    assert grounding.main(options) == rows
    assert len(started) == 3, "what has a result is not run again"
    assert json.loads((tmp_path / "main.json").read_text()) == rows


def test_a_row_of_the_table_is_the_rate_with_the_best_mean_validation():
    def result(validation, test, dataset="qvhighlights"):
        figures = dict.fromkeys(grounding.SHOWN[dataset].values(), test)
        return {
            "validation": {"MR-full-mAP": validation} if validation else {},
            "test": figures,
            "trainable": 5,
            "parameters": 50,
            "seconds": 1.0,
            "arguments": {"dataset": dataset},
        }

    results = {
        ("read", 1e-3, 0, None): result(10, 30),
        ("read", 1e-3, 1, None): result(14, 40),
        ("read", 3e-3, 0, None): result(13, 10),
        ("read", 3e-3, 1, None): result(10, 20),
        ("full", 1e-3, 0, None): result(99, 99),
    }
    row = grounding.table_row("read", results, 2)
    assert (row["learning_rate"], row["test"]["mAP"], row["validation"]) == (1e-3, [30, 40], [10, 14])
    assert "| 35.00 ± 7.07 |" in grounding.markdown([row])
    assert grounding.table_row("full", results, 2) is None, "a seed is missing"
    domains = {
        ("read", 1e-3, seed, domain): result(None, test, "tvsum")
        for seed, domain, test in ((0, "BK", 20), (0, "VT", 40), (1, "BK", 30), (1, "VT", 40))
    }
    assert grounding.table_row("read", domains, 4)["test"] == {"top-5 mAP": [30, 35]}
    with pytest.raises(ValueError, match="no validation split to choose by"):
        grounding.table_row("read", domains | {("read", 1.0, *key[2:]): domains[key] for key in domains}, 4)


def test_bad_arguments_are_named(world, tmp_path):
    def fails(*arguments, match):
        with pytest.raises(ValueError, match=match):
            ground_moments.main(qvhighlights(world, *arguments, "--output_dir", str(tmp_path)))

    fails("--method", "magic", match="'magic' is not one of read")
    fails("--backbone", "clip", match="neither 'moment_detr' nor 'umt'")
    fails("--method", "prompt", "--pvla", match="prompts would be aligned")
    fails("--method", "none", "--pvla", match="nothing is trained")
    fails("--dataset", "charades", match="'charades' is not one of qvhighlights")
    missing = world["folder"] / "missing.npz"
    write_feature_archive(missing, {"source0_0.0_40.0": np.ones((20, 16), np.float32)})
    fails("--features", str(missing), match=r"\d+ ids have no features: source")


def test_select_seeds_chooses_with_the_first_seeds_and_runs_the_others_at_the_chosen_rate(tmp_path, monkeypatch):
    def pretend(command, **options):
        given = dict(zip(command[2::2], command[3::2], strict=False))
        rate, seed = float(given["--learning_rate"]), int(given["--seed"])
        # rate 3e-3 is best for seed 0 alone, 1e-3 over both seeds
        validation = {(1e-3, 0): 10.0, (3e-3, 0): 11.0, (1e-3, 1): 30.0}.get((rate, seed), 0.0)
        started.append((rate, seed))
        result = {
            "validation": {"MR-full-mAP": validation},
            "test": dict.fromkeys(grounding.SHOWN["qvhighlights"].values(), 1.0 + seed),
            **{"trainable": 5, "parameters": 50, "seconds": 1.0, "arguments": {"dataset": "qvhighlights"}},
        }
        (Path(given["--output_dir"]) / "results.json").write_text(json.dumps(result))
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr("subprocess.run", pretend)
    started, options = [], ["--suite", "main", "--only", "read", "--seeds", "0", "1", "2"]
    [row] = grounding.main(["--output_dir", str(tmp_path / "first"), *options, "--select_seeds", "1"])
    assert sorted(started) == [(1e-3, 0), (3e-3, 0), (3e-3, 1), (3e-3, 2)]
    assert (row["learning_rate"], row["rates_tried"], row["selected_on"]) == (3e-3, [1e-3, 3e-3], [0])
    assert (row["seeds"], row["test"]["mAP"]) == ([0, 1, 2], [1, 2, 3])
    assert "chosen by validation on 1 seed(s): 0." in grounding.markdown([row])
    started.clear()
    [row] = grounding.main(["--output_dir", str(tmp_path / "all"), *options])
    assert len(started) == 6
    assert (row["learning_rate"], row["selected_on"]) == (1e-3, [0, 1, 2])
    with pytest.raises(SystemExit):
        grounding.main(["--output_dir", str(tmp_path), *options, "--select_seeds", "4"])


AVERAGED = (
    "--max_steps 6 --save_strategy steps --save_steps 2 --average_checkpoints 2 --fast_dropout --pictures 0 "
    "--no_measure_before"
)


def test_the_mean_of_the_last_checkpoints_is_measured_and_an_interrupted_run_has_the_same(
    world, backbone, tmp_path, monkeypatch
):
    arguments = ["--model_name_or_path", str(backbone), "--method", "read", "--pvla", "--r", "2", *AVERAGED.split()]
    arguments = qvhighlights(world, *arguments, "--bidirectional", "--learning_rate", "0.1")
    whole = ground_moments.main([*arguments, "--output_dir", str(tmp_path / "whole")])
    assert whole["averaged_steps"] == [4, 6] and whole["before"] == {} and whole["test"] == {}
    assert whole["reloaded_is_identical"]
    trainer = ground_moments.GroundingTrainer

    class Cut(trainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 5:
                raise KeyboardInterrupt
            return super().training_step(*args, **kwargs)

    cut = [*arguments, "--output_dir", str(tmp_path / "cut")]
    monkeypatch.setattr(ground_moments, "GroundingTrainer", Cut)
    with pytest.raises(KeyboardInterrupt):
        ground_moments.main(cut)
    monkeypatch.setattr(ground_moments, "GroundingTrainer", trainer)
    again = ground_moments.main(cut)
    assert again["averaged_steps"] == [4, 6]
    assert again["validation"] == whole["validation"]
    weights = [(tmp_path / name / "trained/adapter_model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


def test_the_figures_of_each_query_have_the_mean_of_the_split(world, backbone, tmp_path):
    arguments = ["--model_name_or_path", str(backbone), "--method", "none", "--test_file", world["test"]]
    result = ground_moments.main(qvhighlights(world, *arguments, "--output_dir", str(tmp_path)))
    for part, ids in (("test", list(range(18, 24))), ("validation", None)):
        each = json.loads((tmp_path / f"each_{part}.json").read_text())
        assert ids is None or each["ids"] == ids
        assert set(each["figures"]) == set(grounding.SHOWN["qvhighlights"].values())
        for name, values in each["figures"].items():
            assert np.mean(values) == pytest.approx(result[part][name], abs=0.01)


def test_averaging_takes_checkpoints_at_equal_distances_only(world, tmp_path):
    def fails(arguments, match):
        with pytest.raises(ValueError, match=match):
            ground_moments.main(qvhighlights(world, *arguments.split(), "--output_dir", str(tmp_path)))

    fails("--average_checkpoints 3 --num_train_epochs 2", "but the training writes 2")
    fails("--average_checkpoints 2 --save_strategy no", "checkpoints at equal distances")
    fails("--average_checkpoints 2 --save_strategy steps --max_steps 7 --save_steps 2", "equal distances")
    fails("--method adapter --bidirectional", "--bidirectional is READ's")
    fails("--method full --target_modules x", "no meaning with --method full")
    fails("--method bottleneck --adapter_after both_sides", "is not one of both, feed_forward, attention")
    fails("--pvla --pvla_schedule never", "'never' is not one of constant, decay, grow")
    fails("--backbone umt --pvla --pvla_modules linear", "a sequence for each")
    fails("--train_pool 8 --num_train_samples 9", "pool=8 is smaller")
    assert not list(tmp_path.glob("checkpoint-*"))


def test_the_mean_of_checkpoints_is_that_of_their_trained_weights(tmp_path):
    import torch
    from safetensors.torch import save_model

    from peft_read.baselines import train_only

    averaging = importlib.import_module("averaging")
    model = torch.nn.Linear(1, 1)
    for step, value in ((2, 7.0), (10, 1.0), (9, 2.0)):
        torch.nn.init.constant_(model.weight, value)
        torch.nn.init.constant_(model.bias, value)
        (tmp_path / f"checkpoint-{step}").mkdir()
        save_model(model, tmp_path / f"checkpoint-{step}" / "model.safetensors")
    train_only(model, "bias")
    assert averaging.average_checkpoints(model, tmp_path, 2) == [9, 10]
    assert (model.bias.item(), model.weight.item()) == (1.5, 1.0)
    with pytest.raises(ValueError, match=r"has the checkpoints \[2, 9, 10\], and 4 are to be averaged"):
        averaging.average_checkpoints(model, tmp_path, 4)


@pytest.mark.parametrize("kind", ["moment_detr", "umt"])
def test_a_bottleneck_after_attention_and_feed_forward_blocks_of_every_stack(world, tmp_path, kind):
    options = '{"decoder_layers": 1}' if kind == "umt" else '{"encoder_layers": 1, "decoder_layers": 1}'
    arguments = ["--backbone", kind, "--method", "bottleneck", "--r", "2", "--max_steps", "1", "--eval_strategy", "no"]
    arguments += ["--model_options", options, "--save_strategy", "no"]
    counts = {}
    for place in ("both", "attention", "feed_forward"):
        folder = tmp_path / place
        result = ground_moments.main(
            qvhighlights(world, *arguments, "--adapter_after", place, "--output_dir", str(folder))
        )
        assert result["reloaded_is_identical"]
        weights = json.loads((folder / "trained/adapter_config.json").read_text())
        assert weights["peft_type"] == "BOTTLENECK"
        counts[place] = result["trainable"]
    heads = counts["attention"] + counts["feed_forward"] - counts["both"]
    one = 2 * 2 * 16 + 2 + 16
    assert (counts["attention"] - heads) % one == (counts["feed_forward"] - heads) % one == 0
    places = (counts["attention"] - heads) // one, (counts["feed_forward"] - heads) // one
    assert places == ((3, 2) if kind == "moment_detr" else (4, 2))


def test_distance_and_precision_over_the_test_split(world, backbone, tmp_path, capsys):
    distance_and_precision = importlib.import_module("distance_and_precision")
    arguments = ["--model_name_or_path", str(backbone), "--method", "read", "--pvla", "--r", "2", "--max_steps", "2"]
    arguments += ["--test_file", world["test"], "--output_dir", str(tmp_path / "run"), "--save_strategy", "no"]
    result = ground_moments.main(qvhighlights(world, *arguments, "--eval_strategy", "no", "--pictures", "0"))
    options = ["--run", str(tmp_path / "run"), "--output_dir", str(tmp_path / "out"), "--batch_size", "4"]
    numbers = distance_and_precision.main([*options, "--query", "20"])
    (right, precision), (wrong, _) = numbers["right"], numbers["wrong"]
    assert precision.mean == pytest.approx(result["test"]["MR-full-mAP"], abs=0.01)
    assert right.mean != wrong.mean and numbers["gap"][0].mean == pytest.approx(wrong.mean - right.mean)
    page = (tmp_path / "out" / "table7.md").read_text()
    assert page in capsys.readouterr().out and "| own query | " in page and page.startswith("6 test queries")
    assert all((tmp_path / "out" / name).stat().st_size > 5_000 for name in ("table7.png", "plan.png"))
    rows = [{"qid": i, "vid": f"s{i // 2}_0_1", "query": str(i)} for i in range(6)]
    replaced = distance_and_precision.mismatched(rows)
    assert all(
        a["vid"] == b["vid"] and int(a["query"]) // 2 != int(b["query"]) // 2
        for a, b in zip(rows, replaced, strict=True)
    )
    with pytest.raises(ValueError, match="all test queries are of one source"):
        distance_and_precision.mismatched(rows[:2])
    for wrong_options in (["--query", "999"], ["--run", str(tmp_path)]):
        with pytest.raises(SystemExit):
            distance_and_precision.main([*options, *wrong_options])
