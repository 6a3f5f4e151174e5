"""The benchmark of a training step: every model, and results that add up in one file."""

import importlib
import importlib.util
import json
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "examples" / "benchmarks" / "training_step.py"


def test_models_are_measured_one_after_the_other_into_one_report(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))  # as Python does for a script
    specification = importlib.util.spec_from_file_location("training_step", SCRIPT)
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    output = tmp_path / "report"
    for model in ("t5", "moment_detr"):
        script.main(["--quick", "--repeats", "1", "--model", model, "--output", str(output)])
    results = json.loads((tmp_path / "report.json").read_text())
    assert list(results) == ["t5", "moment_detr"]
    for result in results.values():
        methods = result["methods"]
        assert list(methods) == list(script.METHODS)
        assert all(row["seconds"] > 0 for row in methods.values())
        trained = [methods[name]["trained"] for name in ("frozen", "Adapter k=4", "READ k=4", "LoRA r=4", "full")]
        assert trained == sorted(trained) and trained[0] == 0
        assert methods["READ-PVLA k=4"]["trained"] == methods["READ k=4"]["trained"]
        assert methods["READ k=4"]["kept MiB"] < methods["full"]["kept MiB"]
    report = (tmp_path / "report.md").read_text()
    assert report.count("| READ-PVLA k=4 |") == 2 and report.count("READ-PVLA k=4 : LoRA r=4 = ") == 2
    assert (tmp_path / "report.png").stat().st_size > 5000


def test_the_bottleneck_family_is_measured_beside_a_plain_adapter(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    script = importlib.import_module("bottleneck_family")
    methods = script.main(["--quick", "--repeats", "1", "--output", str(tmp_path / "report")])
    assert list(methods) == [script.PLAIN, *script.CONFIGS]
    assert methods[script.OURS]["trained"] == methods[script.PLAIN]["trained"]
    assert methods["Compacter, paper"]["trained"] < methods["Compacter, scripts"]["trained"]
    report = capsys.readouterr().out
    assert report.count("wanted: at most 1.3") == 4 and report.count("wanted: at most 1.0") == 1
    assert json.loads((tmp_path / "report.json").read_text())["methods"] == methods
    assert (tmp_path / "report.md").read_text() == report
