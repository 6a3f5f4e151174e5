"""The folder of the study and its file of results: what was run is not lost, whatever the next call is."""

import importlib
import json
import lzma
import shutil

import pytest
from made_up_study import made_up_places, small_setting, study, study_results, write_run

SCORES = {"--lr 1": 10.0, "--lr 2": 12.0, "--lr 3": 99.0, "--k 1": 1.0, "--k 2": 3.0, "--k 3": 9.0}


@pytest.fixture
def places(tmp_path, monkeypatch):
    """With a setting that chooses, one that takes its choices, and runs that are made up when they are called."""
    follows = small_setting(
        title="Fewer labels", choices_of="a", rows={"READ-PVLA": ("",)}, row_of={"": "READ-PVLA"}, seeds=2
    )
    monkeypatch.setattr(study, "SETTINGS", {"a": small_setting(), "b": follows})
    places = made_up_places(tmp_path)
    monkeypatch.setattr(study.BackboneRun, "is_done", True)
    monkeypatch.setattr(
        study.Workers, "run", lambda self, jobs: [failed for job in jobs if (failed := finish_job(job))]
    )
    return places


def finish_job(job):
    """What a run writes, with a score that its configuration has."""
    score = next((SCORES[method] for method in SCORES if f" {method} " in f" {' '.join(job.arguments)} "), None)
    write_run(job.log.parent, score or 0.0, trainable=0 if score is None else 7)


def call(places, *options, settings=("a", "b")):
    options = ["--data_dir", str(places.data), "--output_dir", str(places.output), *options]
    options = study.build_parser().parse_args(options)
    options.settings = list(settings)  # the parser knows the study's own
    return study.Study(study.build_parser(), options).run()


def found(places):
    return study_results.read_results(places.output / study.RESULTS)["settings"]


def runs_of(places):
    return {run["folder"] for one in found(places).values() for kind in ("tuning", "main") for run in one[kind]}


def test_a_call_with_another_number_of_configurations_loses_no_run_and_no_choice(places, tmp_path):
    assert call(places, "--configurations", "2") == 0
    before, known = runs_of(places), found(places)
    assert known["a"]["choices"] == {"Full": "--lr 2", "READ-PVLA": "--k 2"}
    assert [len(known["a"][kind]) for kind in ("tuning", "main")] == [8, 7] and len(known["b"]["main"]) == 3
    for options in (["--configurations", "1"], [], ["--configurations", "3", "--limit_minutes", "0"]):
        assert call(places, *options) == 0
        assert before <= runs_of(places), options
        assert found(places)["a"]["choices"] == known["a"]["choices"] and found(places)["a"]["configurations"] == 2
    restored = study_results.read_results(places.output / study.RESULTS)
    shutil.rmtree(places.output)
    study_results.restore(restored, places.output)
    assert call(places) == 0, "as many configurations as the restored runs were chosen from"
    assert runs_of(places) == before and found(places)["a"]["configurations"] == 2


def test_a_larger_budget_takes_over_when_its_runs_are_there_and_the_earlier_runs_stay(places):
    call(places, "--configurations", "2")
    before = runs_of(places)
    call(places, "--configurations", "3")
    now = found(places)
    assert now["a"]["configurations"] == 3
    assert now["a"]["choices"] == {"Full": "--lr 3", "READ-PVLA": "--k 3"}
    assert {run["arguments"] for run in now["a"]["main"]} == {"--method none", "--lr 3", "--k 3"}
    assert {run["arguments"] for run in now["a"]["others"]} == {"--lr 2", "--k 2"}
    kept = {run["folder"] for one in now.values() for kind in ("tuning", "main", "others") for run in one[kind]}
    assert before < kept


def test_other_arguments_after_the_dashes_are_another_study(places, capsys):
    call(places, "--configurations", "1")
    before = (places.output / study.RESULTS).read_bytes()
    with pytest.raises(ValueError, match=r"runs that were recorded here.*choose another --output_dir"):
        call(places, "--", "--use_cpu")
    assert (places.output / study.RESULTS).read_bytes() == before
    (places.output / study.RESULTS).unlink()  # as in a folder that was restored
    with pytest.raises(ValueError, match=r"finished runs in .* have other arguments after --"):
        call(places, "--", "--use_cpu")
    assert call(places) == 0


def test_seeds_above_the_settings_number_are_recorded(places):
    assert call(places, "--configurations", "1", "--seeds", "5", settings=["a"]) == 0
    assert {run["seed"] for run in found(places)["a"]["main"]} == {0, 1, 2, 3, 4}
    assert call(places, "--seeds", "1", settings=["a"]) == 0
    assert {run["seed"] for run in found(places)["a"]["main"]} == {0, 1, 2, 3, 4}
    assert found(places)["a"]["planned_seeds"] == 3


DAMAGES = {
    "no figures of single queries": lambda folder: (folder / "each_test.json").unlink(),
    "torn": lambda folder: (folder / "each_test.json").write_text('{"ids": [4, 9'),
    "without the figure": lambda folder: (folder / "each_test.json").write_text(
        '{"ids": [4], "sources": ["a"], "figures": {}}'
    ),
    "another result": lambda folder: (folder / "results.json").write_text('{"seconds": 3}'),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_run_is_named_and_the_rest_is_written(name, places, capsys):
    call(places, "--configurations", "2", settings=["a"])
    before = runs_of(places)
    folder = places.output / next(run["folder"] for run in found(places)["a"]["main"] if run["row"] == "Full")
    DAMAGES[name](folder)
    (places.output / study.RESULTS).unlink()
    assert call(places, settings=["b"]) == 1
    assert before - runs_of(places) == {folder.relative_to(places.output).as_posix()}
    message = next(line for line in capsys.readouterr().err.splitlines() if str(folder) in line)
    assert "is damaged" in message and "runs it anew" in message
    assert call(places, settings=["a"]) == 0, "it is run again, as if it were missing"
    assert before <= runs_of(places)


def test_a_damaged_or_deleted_run_keeps_the_numbers_that_the_file_has(places):
    call(places, "--configurations", "2", settings=["a"])
    before = found(places)["a"]
    folders = [places.output / run["folder"] for run in (*before["tuning"][:1], *before["main"][:2])]
    (folders[1] / "each_test.json").write_text("[")
    shutil.rmtree(folders[0])
    shutil.rmtree(folders[2])
    assert call(places, "--configurations", "2", settings=["b"]) == 1
    now = found(places)["a"]
    for numbers in (now, before):
        for kind in ("tuning", "main"):
            numbers[kind].sort(key=lambda run: run["folder"])
    assert now == before
    assert study_results.restore(study_results.read_results(places.output / study.RESULTS), places.output) == 3
    assert all(json.loads((folder / "results.json").read_text())["restored"] for folder in folders)


def test_versions_and_hardware_are_those_of_each_run(places, tmp_path, monkeypatch):
    study_machine = importlib.import_module("study_machine")
    monkeypatch.setattr(study_machine, "hardware", lambda: "paper and pencil")
    monkeypatch.setattr(study_machine, "versions", lambda: {"torch": "1"})
    call(places, "--configurations", "1", settings=["a"])
    for path in places.output.glob("a/tune/*/machine.json"):
        path.unlink()  # runs of before it was written down
    # Earlier files have one machine for all runs: runs without a note of their own keep it.
    earlier = study_results.read_results(places.output / study.RESULTS)
    earlier |= {"format": 1, "versions": {"torch": "0"}, "hardware": "abacus"}
    study_results.write_results(places.output / study.RESULTS, earlier)
    monkeypatch.setattr(study_machine, "hardware", lambda: "slide rule")
    call(places, "--configurations", "1", settings=["b"])
    results = study_results.read_results(places.output / study.RESULTS)

    def made_with(results):
        kinds = ((name, kind) for name in ("a", "b") for kind in ("tuning", "main"))
        found = {k: {run["machine"] for run in results["settings"][k[0]][k[1]]} for k in kinds}
        return {k: [results["machines"][place]["hardware"] for place in places] for k, places in found.items()}

    expected = {("a", "tuning"): ["abacus"], ("a", "main"): ["paper and pencil"], ("b", "tuning"): []}
    assert made_with(results) == expected | {("b", "main"): ["slide rule"]}
    shutil.rmtree(places.output)
    study_results.restore(results, places.output)
    call(places, settings=["b"])
    assert made_with(study_results.read_results(places.output / study.RESULTS)) == made_with(results)
    assert study.main(["--summarise", str(places.output / study.RESULTS), "--to", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / "study.md").read_text()
    assert "2 runs: torch 0; abacus. 7 runs: torch 1; paper and pencil. 3 runs: torch 1; slide rule." in page


def test_a_folder_that_another_call_works_in_is_an_error_of_one_line(places, monkeypatch, capsys):
    run_folder = importlib.import_module("run_folder")
    monkeypatch.setattr(run_folder, "LOCK_SECONDS", 0)
    call(places, "--configurations", "1", settings=["a"])
    results, options = places.output / study.RESULTS, ["--output_dir", str(places.output)]
    with run_folder.only_run_in(places.output):
        with pytest.raises(SystemExit):
            call(places)
        with pytest.raises(SystemExit):
            study.main(["--restore", str(results), *options])
    assert capsys.readouterr().err.count("another run is at work in") == 2
    assert study.main(["--restore", str(results), *options]) == 0


@pytest.mark.parametrize("text", ['{"format": 1}', '{"format": 2, "machines": [], "settings": {"a": {"title": "x"}}}'])
@pytest.mark.parametrize("option", ["--summarise", "--restore"])
def test_a_file_that_lacks_results_is_an_error_of_one_line(text, option, tmp_path, capsys):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(SystemExit):
        study.main([option, str(tmp_path / "results.json"), "--output_dir", str(tmp_path / "out")])
    assert f"{option}: {tmp_path / 'results.json'} holds no results of the study" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_data_that_a_backbone_needs_is_missed_before_anything_runs(tmp_path, capsys):
    places = made_up_places(tmp_path)
    captions = places.data / "qvhighlights/captions_minigptv2_val.jsonl"
    captions.unlink()
    options = ["--data_dir", str(places.data), "--output_dir", str(places.output), "--settings", "qvhighlights"]
    with pytest.raises(SystemExit):
        study.main([*options, "--dry_run"])
    assert f"{captions} does not exist" in capsys.readouterr().err


def test_what_fails_in_one_setting_is_reported_once_and_the_others_go_on(places, monkeypatch, capsys):
    settings = {name: small_setting(backbone="umt") for name in ("c", "d")}
    settings |= {"e": small_setting(arguments="--a {moments_by_source}"), "a": small_setting()}
    monkeypatch.setattr(study, "SETTINGS", settings)
    monkeypatch.setattr(study.BackboneRun, "is_done", property(lambda self: self.name != "umt"))
    pretrained = []

    def run(self, jobs):
        found = list(jobs)
        pretrained.extend(job.name for job in found if "backbone" in job.name)
        return [f"{job.name} failed" for job in found if "backbone" in job.name or finish_job(job)]

    monkeypatch.setattr(study.Workers, "run", run)
    assert call(places, "--configurations", "1", settings=list(settings)) == 1
    assert pretrained == ["backbone umt"]
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "backbone umt failed" and told[1].startswith("e: ") and len(told) == 2
    assert set(found(places)) == {"a"}


def test_a_run_whose_call_cannot_be_made_is_named_and_the_others_go_on(places, monkeypatch, capsys):
    made = study.Run.job

    def job(run):
        if run.row == "Full":
            raise FileNotFoundError("the data is gone")
        return made(run)

    monkeypatch.setattr(study.Run, "job", job)
    assert call(places, "--configurations", "1", settings=["a"]) == 1
    assert "the data is gone" in capsys.readouterr().err
    assert {run["row"] for run in found(places)["a"]["main"]} == {"no adaptation", "READ-PVLA"}


def encoder(folder, size):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"hidden_size": 384}')
    (folder / "model.safetensors").write_bytes(bytes(size))
    return ["--text_encoder", str(folder)]


def test_results_of_one_encoder_do_not_stand_as_those_of_another(places, tmp_path, capsys):
    same, moved, other = (encoder(tmp_path / name, size) for name, size in (("e", 9), ("moved", 9), ("other", 8)))
    budget = ["--configurations", "1"]
    call(places, *budget, *same, settings=["a"])
    record = (places.output / "study.json").read_text()
    assert "model.safetensors of 9 bytes" in record and str(tmp_path) not in record
    assert call(places, *budget, *moved, settings=["a"]) == 0
    for wrong in (other, ["--text_encoder", "some/name"]):
        with pytest.raises(ValueError, match=r"were made with the text encoder .* 9 bytes"):
            call(places, *budget, *wrong)
    (places.output / "study.json").unlink()  # folders of before, and restored ones, are taken as they are
    assert call(places, *budget, "--text_encoder", "some/name") == 0
    with pytest.raises(ValueError, match="were made with the text encoder 'some/name'"):
        call(places, *budget, *same)


def test_data_with_other_contents_is_refused_and_a_compressed_file_is_the_same(places, monkeypatch):
    monkeypatch.setitem(study.SETTINGS, "a", small_setting(arguments="--a {tvsum/tvsum50.jsonl}"))
    path = places.data / "tvsum/tvsum50.jsonl"
    path.write_text("one")
    call(places, "--configurations", "1", settings=["a"])
    path.unlink()
    path.with_name("tvsum50.jsonl.xz").write_bytes(lzma.compress(b"one"))
    call(places, "--configurations", "1")
    assert set(json.loads((places.output / "study.json").read_text())["data"]) >= {"tvsum/tvsum50.jsonl"}
    path.write_text("two")
    with pytest.raises(ValueError, match=r"were made with other contents of tvsum/tvsum50.jsonl"):
        call(places, "--configurations", "1", settings=["a"])
    (places.output / "study.json").write_text("{")
    with pytest.raises(ValueError, match=r"study.json is damaged"):
        call(places, "--configurations", "1", settings=["a"])


def test_a_restored_run_is_refused_where_weights_are_needed(places, tmp_path, capsys):
    distance_and_precision = importlib.import_module("distance_and_precision")
    call(places, "--configurations", "1", settings=["a"])
    results = study_results.read_results(places.output / study.RESULTS)
    study_results.restore(results, tmp_path / "restored")
    folder = tmp_path / "restored" / results["settings"]["a"]["main"][1]["folder"]
    with pytest.raises(SystemExit):
        distance_and_precision.main(["--run", str(folder), "--output_dir", str(tmp_path / "table7")])
    told = capsys.readouterr().err
    assert "holds no weights: delete the folder and call study.py again" in told
