"""The study of methods: its budget, its queue of runs, and tables and pictures from a small file of results."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_up_study import (
    EXAMPLES,
    finish,
    made_up_places,
    made_up_results,
    small_setting,
    study,
    study_results,
    study_runs,
    study_settings,
    study_summary,
    workers,
)


@pytest.fixture
def places(tmp_path):
    return made_up_places(tmp_path)


@pytest.mark.parametrize("name", [name for name, s in study_settings.SETTINGS.items() if s.choices_of is None])
def test_every_method_of_a_setting_has_the_same_budget(name):
    rows = study_settings.SETTINGS[name].rows
    assert len({len(methods) for methods in rows.values()}) == 1
    for methods in rows.values():
        assert len(set(methods)) == len(methods)
    assert study_settings.REFERENCE in rows


def test_the_nine_methods_and_what_the_reference_varies():
    setting = study_settings.SETTINGS["qvhighlights"]
    nine = ["Full", "Bias", "Partial", "Proj", "LoRA", "Prompt", "Adapter", "READ", "READ-PVLA"]
    assert list(setting.rows) == nine == list(study_settings.SETTINGS["moments"].rows)
    assert setting.seeds >= 8 and "--num_validation_samples 500" in setting.arguments
    varied = " ".join(setting.rows["READ-PVLA"])
    for name in ("bidirectional", "r", "pvla_blocks", "pvla_mass", "pvla_weight", "pvla_schedule", "pvla_reg"):
        assert f"--{name} " in varied
    for name in ("pvla_distance", "learning_rate", "pvla_modules"):
        assert f"--{name} " in varied
    assert not set(study_settings.TUNING_SEEDS) & set(range(max(s.seeds for s in study_settings.SETTINGS.values())))


def arguments_of(setting, method, places):
    stages = (setting.tune, setting.main)
    ends = ["--output_dir", "x", "--use_cpu", *(["--domain", setting.parts[0]] if setting.parts[0] else [])]
    return [[*places.fill(f"{setting.arguments} {stage} {method}"), *ends] for stage in stages]


@pytest.mark.parametrize("name", list(study_settings.SETTINGS))
def test_every_configuration_is_taken_by_its_script_and_fits_its_backbone(name, places):
    setting = study_settings.SETTINGS[name]
    script = importlib.import_module(setting.script)
    model_of = {"moment_detr": moment_detr, "umt": umt, "vg_bart": vg_bart}[setting.backbone]
    base = study_settings.SETTINGS.get(setting.choices_of or "", setting).rows.get("READ-PVLA", ("",))[0]
    for row, methods in setting.rows.items():
        for method in methods:
            if setting.choices_of is not None:
                method = f"{base} {method}"
            for arguments in arguments_of(setting, method, places):
                parser = script.ScriptParser((script.ScriptArguments, script.TrainingArguments))
                parsed, training = parser.parse_args_into_dataclasses(arguments)
                script.check_averaging(parsed, training)
                if setting.script == "summarise":
                    script.check_arguments(parsed, training)
                else:
                    script.check_arguments(parsed)
            model = adapt(script, model_of(), parsed)
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            assert trained, (row, method)
            if parsed.pvla:
                from peft_read import Aligner

                Aligner(model, script.alignment(parsed, model)).remove()


def adapt(script, model, parsed):
    if script.__name__ == "summarise":
        return script.adapted(model, [], parsed)
    return script.adapted(model, parsed)


def moment_detr():
    from peft_read.models import MomentDetrConfig, MomentDetrForTemporalGrounding

    sizes = {"d_model": 64, "ffn_dim": 64, "encoder_layers": 2, "decoder_layers": 1, "text_feature_dim": 8}
    return MomentDetrForTemporalGrounding(MomentDetrConfig(video_feature_dim=8, **sizes))


def umt():
    from peft_read.models import UMTConfig, UMTForTemporalGrounding

    sizes = {"d_model": 64, "ffn_ratio": 1.0, "text_feature_dim": 8, "audio_feature_dim": None, "max_positions": 8}
    heads = ["saliency", "boundary"]
    return UMTForTemporalGrounding(UMTConfig(video_feature_dim=8, heads=heads, **sizes))


def vg_bart():
    from peft_read.models import VGBartConfig, VGBartForConditionalGeneration

    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    config = VGBartConfig(vocab_size=20, visual_feature_dim=8, max_position_embeddings=32, **sizes, **heads)
    return VGBartForConditionalGeneration(config)


def test_the_best_two_are_run_again_and_the_best_mean_is_chosen(places):
    plan = study_runs.Plan("made_up", small_setting(), places)
    assert plan.count() == 2 * (3 + 2) + 2 * 3 + 1
    assert (len(plan.first_round()), plan.second_round(), plan.choices()) == (6, [], {})
    assert [run.row for run in plan.main_runs()] == [study_runs.FROZEN]
    scores = {
        "--lr 1": (10, 15),
        "--lr 2": (12, 11),
        "--lr 3": (9, 99),
        "--k 1": (1, 1),
        "--k 2": (1, 1),
        "--k 3": (0, 0),
    }
    for run in plan.first_round()[:5]:
        finish(run, scores[run.method][0])
    assert [run.method for run in plan.second_round()] == ["--lr 2", "--lr 1"]
    finish(plan.first_round()[5], 0)
    assert [run.method for run in plan.second_round()] == ["--lr 2", "--lr 1", "--k 1", "--k 2"]
    for run in plan.second_round():
        assert run.seed not in range(8)
        finish(run, scores[run.method][1])
    assert plan.choices() == {"Full": "--lr 1", "READ-PVLA": "--k 1"}
    runs = plan.main_runs()
    assert [(run.row, run.seed) for run in runs[1:3]] == [("Full", 0), ("READ-PVLA", 0)]
    assert len({run.folder for run in runs}) == len(runs) == 1 + 2 * 3
    follows = small_setting(
        choices_of="made_up", rows={"READ-PVLA": ("",), "GRU": ("--cell gru",)}, row_of={"": "READ-PVLA"}
    )
    assert study_runs.Plan("other", follows, places, chooses=plan).choices() == {
        "READ-PVLA": "--k 1", "GRU": "--k 1 --cell gru",
    }  # fmt: skip
    fewer = study_runs.Plan("made_up", small_setting(), places, configurations=1, seeds=1, rows=["Full"])
    assert fewer.choices() == {"Full": "--lr 1"} and fewer.count() == 1 + 1 + 1


def test_a_run_of_another_protocol_has_another_folder_and_names_its_data(places):
    run, other, more = (
        study_runs.Plan(
            "made_up", small_setting(**changes), study_runs.Places(places.data, places.output, "e", rest)
        ).first_round()[0]
        for changes, rest in (({}, ()), ({"arguments": "--b 2"}, ()), ({}, ("--max_steps", "2")))
    )
    assert len({run.folder, other.folder, more.folder}) == 3
    arguments = more.job().arguments
    assert arguments[1] == str(places.data / "features/pca.npz")
    assert arguments[arguments.index("--max_steps") + 1] == "2"
    with pytest.raises(FileNotFoundError, match=r"plain or as \.xz"):
        places.fill("{qvhighlights/nothing.jsonl}")
    assert places.fill("{qvhighlights/highlight_test_with_gt.jsonl}")[0].endswith(".jsonl.xz")


def test_summaries_of_moments_are_divided_by_source(tmp_path):
    from moments_by_source import write_moments_by_source

    from peft_read.data import load_how2

    row = {"query": "a", "duration": 20, "relevant_windows": [[4, 8]], "relevant_clip_ids": [2]}
    rows = [{**row, "qid": i, "vid": f"s{i // 3}_{i % 3}.0_9.0", "saliency_scores": [[1, 2, 3]]} for i in range(60)]
    (tmp_path / "val.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    others = [{**rows[0], "qid": i, "vid": f"t{i // 102}_0.0_9.0"} for i in range(100, 104)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in others))
    for split, ids in (("sum_train", range(0, 60, 2)), ("sum_val", range(1, 60, 2)), ("sum_test", range(100, 104))):
        (tmp_path / "moments" / split).mkdir(parents=True)
        for name, text in (("tran.tok.txt", "what is seen"), ("desc.tok.txt", "a query")):
            lines = "".join(f"qvh{i} {text} {i}\n" for i in ids)
            (tmp_path / "moments" / split / name).write_text(lines)
    arguments = (tmp_path / "moments", tmp_path / "val.jsonl", tmp_path / "test.jsonl")
    sizes = write_moments_by_source(*arguments, tmp_path / "new", num_train=31, num_validation=20)
    assert sizes == {"sum_train": 31, "sum_val": 20, "sum_test": 4}
    train, validation, test = (load_how2(tmp_path / "new", split) for split in sizes)
    sources = [{int(i.removeprefix("qvh")) // 3 for i in part["video_id"]} for part in (train, validation)]
    assert not sources[0] & sources[1]
    assert all(row["summary"] == f"a query {row['video_id'].removeprefix('qvh')}" for row in train)
    assert test["video_id"][:] == [f"qvh{i}" for i in range(100, 104)]
    known = json.loads((tmp_path / "new" / "sources.json").read_text())
    assert (
        len(known) == 64 and known["qvh4"] == "s1" and [known[i] for i in test["video_id"]] == ["t0"] * 2 + ["t1"] * 2
    )
    (tmp_path / "val.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:-2]))
    with pytest.raises(ValueError, match=r"2 items of .* are not queries of .*val"):
        write_moments_by_source(*arguments, tmp_path / "other", num_train=31, num_validation=20)


SCRIPT = """
import os, sys, time
print("imported", flush=True)
def main(arguments):
    print("runs", *arguments, flush=True)
    if arguments[0] == "fail":
        raise ValueError("no such thing")
    if arguments[0] == "die":
        os._exit(3)
    if arguments[0] == "sleep":
        time.sleep(60)
    open(arguments[1], "w").write(str(os.getpid()))
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    (tmp_path / "one_script.py").write_text(SCRIPT)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{EXAMPLES.parent / 'src'}")
    return tmp_path


def jobs(folder, *names):
    return [workers.Job(n, "one_script", (n.split()[0], str(folder / n)), folder / "log.txt") for n in names]


def test_a_worker_imports_once_and_outlives_runs_that_fail(script):
    said = []
    with workers.Workers(1, say=said.append) as queue:
        failed = queue.run(jobs(script, "a", "fail", "b", "die", "c"))
    assert [message.split(" failed")[0] for message in failed] == ["fail", "die"]
    assert "failed: ValueError: no such thing; see" in failed[0]
    first, second, third = ((script / name).read_text() for name in "abc")
    assert first == second != third
    log = (script / "log.txt").read_text()
    assert log.count("imported") == 2 and "ValueError: no such thing" in log
    assert said[0].startswith("a: done") and said[1].startswith("fail: FAILED")


def test_no_run_is_started_after_the_time(script):
    with workers.Workers(2, ends=0.0, say=print) as queue:
        assert queue.time_is_over
        assert queue.run(jobs(script, "a", "b")) == []
    assert not (script / "a").exists()


def test_workers_end_in_the_middle_of_a_run_when_their_parent_is_killed(script):
    import os
    import signal
    import subprocess

    code = f"""
import sys
sys.path.insert(0, {str(EXAMPLES / "method_comparison")!r})
from pathlib import Path
from workers import Job, Workers
with Workers(1) as queue:
    queue.run([Job("sleep", "one_script", ("sleep",), Path({str(script / "log.txt")!r}))])
"""
    parent = subprocess.Popen([sys.executable, "-c", code])
    log = script / "log.txt"
    wait_for(lambda: log.exists() and "runs sleep" in log.read_text())
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    if not children.exists():
        parent.kill()
        pytest.skip("this system does not list the children of a process")
    [child] = (
        int(pid)
        for task in Path(f"/proc/{parent.pid}/task").iterdir()
        for pid in (task / "children").read_text().split()
    )
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    wait_for(lambda: not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2])


def wait_for(condition, seconds=300):
    import time

    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.05)


@pytest.mark.parametrize("name", ["results.json", "results.json.xz"])
def test_every_table_and_picture_is_made_from_the_file_alone(name, tmp_path, capsys):
    study_results.write_results(tmp_path / name, made_up_results())
    assert study.main(["--summarise", str(tmp_path / name), "--to", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / "study.md").read_text()
    assert page.strip() == capsys.readouterr().out.strip()
    pictures = {f"{part}_{kind}.png" for part in ("many", "few") for kind in ("points", "sizes")} | {
        "low_resource.png"
    }
    assert {path.name for path in (tmp_path / "page").glob("*.png")} == pictures
    for picture in pictures:
        assert f"({picture})" in page
        assert (tmp_path / "page" / picture).stat().st_size > 5_000
    for text in ("| READ-PVLA | 900 | 9.00 % | 4 | 35.0 | ", "| no adaptation | 0 | 0.00 % | – |", r"`--x a\|b`"):
        assert text in page
    assert "No complete seed yet: LoRA." in page and "Fewer than the 8 planned seeds: Full, READ, READ-PVLA." in page
    assert "ahead of Full and behind none" in page
    assert "| method | 100 queries | 700 queries |" in page
    before = page
    study.main(["--summarise", str(tmp_path / name), "--to", str(tmp_path / "page")])
    assert (tmp_path / "page" / "study.md").read_text() == before, "the same file gives the same page"


def test_a_study_whose_tuning_is_under_way_says_that_it_compares_nothing(tmp_path):
    results = made_up_results()
    results["settings"] = {"many": results["settings"]["many"] | {"main": [], "choices": {}}}
    page = study_summary.summarise(results, tmp_path)
    assert "nothing here compares methods" in page and "### Tuning" in page and "![" not in page


def test_the_table_has_the_numbers_of_the_results():
    results = made_up_results()
    setting = results["settings"]["many"]
    rows = study_summary.complete_rows(setting)
    assert list(rows) == [study_runs.FROZEN, "Full", "READ", "READ-PVLA"]
    full = [run for run in setting["main"] if run["row"] == "Full"]
    expected = np.mean([run["test"]["MR-full-mAP"] for run in full])
    interval = rows["Full"].intervals["MR-full-mAP"]
    assert interval.mean == pytest.approx(expected) and interval.low < expected < interval.high
    found = study_summary.comparisons(setting, rows)
    assert set(found) == {"Full", "READ"}
    assert found["Full"].mean == pytest.approx(5, abs=0.5) and found["Full"].p_seeds < 0.01
    assert abs(found["READ"].mean) < 1 and found["READ"].p_both > 0.05


def test_a_seed_that_lacks_a_domain_is_left_out(places):
    results = made_up_results()
    setting = results["settings"]["many"]
    setting["parts"] = ["BK", "VT"]
    setting["items"]["test"] = {"ids": ["v", "w"], "sources": [0, 1]}
    base = {"row": "Full", "arguments": "", "trainable": 1, "parameters": 2, "seconds": 60}
    runs = ((0, "BK", "v", 10), (0, "VT", "w", 30), (1, "VT", "w", 50), (1, "BK", "v", 20), (2, "BK", "v", 9))
    setting["main"] = [
        base
        | {"seed": seed, "part": part, "ids": [vid], "test": {"MR-full-mAP": score}}
        | {"each": {"MR-full-mAP": [10 * score]}}
        for seed, part, vid, score in runs
    ]
    row = study_summary.complete_rows(setting)["Full"]
    assert row.seeds == [0, 1] and row.scores("MR-full-mAP") == [20, 35]
    assert row.table("MR-full-mAP").tolist() == [[10, 30], [20, 50]]


def test_what_the_runs_have_written_is_collected(places):
    plan = study_runs.Plan("made_up", small_setting(), places)
    for run in plan.first_round():
        finish(run, 10.0)
    for run in plan.second_round():
        finish(run, 10.0)
    for run in plan.main_runs()[:3]:
        finish(run, 11.0, test=(40.0 + run.seed, 60.26))
    results = study_results.collect({"made_up": plan})[0]
    setting = results["settings"]["made_up"]
    assert setting["items"]["test"] == {"ids": [4, 9], "sources": [0, 1]}
    assert len(setting["tuning"]) == 10 and len(setting["main"]) == 3
    run = setting["main"][1]
    assert run["each"] == {"MR-full-mAP": [400, 603]} and run["validation"] == 11.0
    assert setting["choices"] == {"Full": "--lr 1", "READ-PVLA": "--k 1"}
    path = places.output / "results.json"
    study_results.write_results(path, results)
    assert study_results.read_results(path) == json.loads(path.read_text())
    elsewhere = study_runs.Plan("made_up", small_setting(), replace(places, output=places.output / "elsewhere"))
    assert study.main(["--restore", str(path), "--output_dir", str(elsewhere.places.output)]) == 0
    assert study_results.restore(results, elsewhere.places.output) == 0, "what is there is kept"
    assert elsewhere.choices() == plan.choices()
    assert [run.result is None for run in elsewhere.main_runs()] == [False] * 3 + [True] * 4
    assert study_results.collect({"made_up": elsewhere})[0] == results
    path.write_text('{"format": 3}')
    with pytest.raises(ValueError, match="has the format 3"):
        study_results.read_results(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="holds no results"):
        study_results.read_results(path)


def test_a_tuning_run_of_a_summarising_setting_keeps_the_items_it_was_measured_on(places):
    changes = {"script": "summarise", "validation": "rougeL", "figures": {"ROUGE-L": "rougeL"}, "seeds": 1}
    plan = study_runs.Plan("made_up", small_setting(**changes), places)
    runs = plan.first_round()
    for run, ids in ((runs[0], ["v1", "v2"]), (plan.main_runs()[0], ["t1", "t2", "t3"])):
        run.folder.mkdir(parents=True)
        scores = {"rouge_after": {"rouge_score": {"rougeL": 20.0}}, "trainable": 1, "parameters": 2, "seconds": 3}
        (run.folder / "results.json").write_text(json.dumps(scores))
        each = {"ids": ids, "sources": [item[0] for item in ids], "figures": {"rougeL": [20.0] * len(ids)}}
        (run.folder / "each_test.json").write_text(json.dumps(each))
    results = study_results.collect({"made_up": plan})[0]
    assert results["settings"]["made_up"]["items"]["test"] == {"ids": ["t1", "t2", "t3"], "sources": [0, 0, 0]}
    elsewhere = study_runs.Plan("made_up", small_setting(**changes), replace(places, output=places.output / "b"))
    assert study_results.restore(results, elsewhere.places.output) == 2
    assert study_results.collect({"made_up": elsewhere})[0] == results


def test_a_call_that_is_restricted_leaves_the_other_results_in_the_file(places, monkeypatch):
    monkeypatch.setattr(study, "SETTINGS", {"a": small_setting(), "b": small_setting(title="Other")})
    for name in ("a", "b"):
        for run in study_runs.Plan(name, study.SETTINGS[name], places).first_round():
            finish(run, 10.0)
    monkeypatch.setattr(study.Study, "_run", lambda self, queue: [])
    options = ["--data_dir", str(places.data), "--output_dir", str(places.output), "--seeds", "1", "--rows", "Full"]
    options = study.build_parser().parse_args(options)
    options.settings = ["a"]  # the parser knows the study's own
    assert study.Study(study.build_parser(), options).run() == 0
    found = study_results.read_results(places.output / study.RESULTS)["settings"]
    assert set(found) == {"a", "b"} and all(len(one["tuning"]) == 6 for one in found.values())


def test_the_dry_run_counts_and_estimates_and_bad_options_are_named(places, capsys):
    options = ["--data_dir", str(places.data), "--output_dir", str(places.output)]
    settings = ["--settings", "qvhighlights", "--configurations", "2", "--seeds", "3", "--rows", "Full", "READ"]
    assert study.main([*options, *settings, "--jobs", "2", "--dry_run"]) == 0
    shown = capsys.readouterr().out
    # Two methods: two configurations each, both again with the second seed; three seeds; the frozen backbone once.
    assert "| qvhighlights | 15 | 0 | 15 | " in shown and "| backbone moment_detr | 1 | 0 | 1 |" in shown
    assert not places.output.exists()
    for wrong, message in (
        (["--jobs", "0"], "--jobs 0 must be at least 1"),
        (["--rows", "Magic"], "['Magic']"),
        (["--limit_minutes", "nan"], "must be finite"),
        (["--data_dir", str(places.data / "none")], "does not exist"),
    ):
        with pytest.raises(SystemExit):
            study.main([*options, *wrong, "--dry_run"])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        study.main(["--dry_run"])


def test_a_verdict_ranks_over_the_seeds_that_all_have_and_says_what_is_missing():
    results = made_up_results()
    setting = results["settings"]["many"] | {"rows": ["Full", "READ", "READ-PVLA"], "planned_seeds": 4}
    complete = study_summary.verdict(setting, study_summary.complete_rows(setting))
    assert "Provisional" not in complete and "Not tested" not in complete and "Ranked over" not in complete
    # READ has one seed, the worst of all: the others are ranked by that seed alone.
    for run in setting["main"]:
        run["test"] = {"MR-full-mAP": run["test"]["MR-full-mAP"] - 30 * (run["seed"] == 3)}
    setting["main"] = [run for run in setting["main"] if run["row"] != "READ" or run["seed"] == 3]
    of_seed = {run["row"]: run["test"]["MR-full-mAP"] for run in setting["main"] if run["seed"] == 3}
    place = 1 + sum(score > of_seed["READ-PVLA"] for score in of_seed.values())
    said = study_summary.verdict(setting, study_summary.complete_rows(setting))
    wanted = "READ-PVLA is first" if place == 1 else f"READ-PVLA is number {place}, "
    assert wanted in said and " of 3 methods" in said and "Ranked over the 1 seeds" in said
    assert "Not tested: READ." in said and "**Provisional: methods or planned seeds are missing.**" in said
