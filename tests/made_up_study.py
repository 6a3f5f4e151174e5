"""A made-up study: a data folder, a setting, runs that have ended, and results with known answers."""

import importlib
import json
import lzma
import sys
from pathlib import Path

import numpy as np

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path[:0] = [str(EXAMPLES / "reproduction"), str(EXAMPLES / "method_comparison")]
study, study_results, study_runs, study_settings, study_summary, workers = map(
    importlib.import_module,
    ("study", "study_results", "study_runs", "study_settings", "study_summary", "workers"),
)
DATA = {
    "qvhighlights/highlight_val_release.jsonl": "",
    "qvhighlights/highlight_test_with_gt.jsonl.xz": "",
    "qvhighlights/captions_minigptv2_val.jsonl": "",
    "features/qvhighlights_val_captions.npz": "",
    "features/qvhighlights_test_captions.npz": "",
    "features/pca.npz": "",
    "features/tvsum_captions.npz": "",
    "tvsum/tvsum50.jsonl": "",
    "moments/video_features.npz": "",
}


def made_up_places(tmp_path):
    """Where empty files stand for the data."""
    for name, text in DATA.items():
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(lzma.compress(text.encode()) if name.endswith(".xz") else text.encode())
    return study_runs.Places(tmp_path / "data", tmp_path / "out", "encoder")


def small_setting(**changes):
    values = {
        "title": "Made up",
        "script": "ground_moments",
        "backbone": "moment_detr",
        "arguments": "--a {features/pca.npz}",
        "validation": "MR-full-mAP",
        "figures": {"mAP": "MR-full-mAP"},
        "rows": {"Full": ("--lr 1", "--lr 2", "--lr 3"), "READ-PVLA": ("--k 1", "--k 2", "--k 3")},
        "seeds": 3,
    }
    return study_settings.Setting(**(values | changes))


def finish(run, validation, test=(50.0, 60.0), seconds=30):
    write_run(run.folder, validation, test, seconds, trainable=0 if "none" in run.method else 7)


def write_run(folder, validation, test=(50.0, 60.0), seconds=30, *, trainable=7):
    folder.mkdir(parents=True, exist_ok=True)
    result = {"validation": {"MR-full-mAP": validation}, "test": {"MR-full-mAP": float(np.mean(test))}}
    numbers = {"trainable": trainable, "parameters": 70, "seconds": seconds}
    (folder / "results.json").write_text(json.dumps(result | numbers))
    for part, values in (("validation", [validation] * 2), ("test", list(test))):
        each = {"ids": [4, 9], "sources": ["a", "b"], "figures": {"MR-full-mAP": values}}
        (folder / f"each_{part}.json").write_text(json.dumps(each))


def made_up_results(seeds=4, queries=30, gain=5.0):
    """READ-PVLA ahead of Full by five points, equal to READ; a setting with fewer labels; TVSum's form."""
    generator = np.random.default_rng(0)
    hard = generator.uniform(20, 60, size=queries)

    def run(row, seed, level):
        each = np.clip(hard + level + generator.normal(scale=2, size=queries), 0, 100)
        each = np.round(10 * each).astype(int)
        test = {"MR-full-mAP": round(float(each.mean() / 10), 3)}
        numbers = {
            "trainable": 0 if row == study_runs.FROZEN else 100 * len(row),
            "parameters": 10_000,
            "seconds": 60,
            "machine": 0,
        }
        numbers["folder"] = f"made_up/{row}_seed{seed}_{level}"
        return {"row": row, "arguments": "--x a|b", "seed": seed, "part": None, "validation": 30.0 + level,
                "test": test, "each": {"MR-full-mAP": each.tolist()}, **numbers}  # fmt: skip

    levels = {"Full": 0.0, "READ": gain, "READ-PVLA": gain}
    items = {"ids": list(range(queries)), "sources": [i // 2 for i in range(queries)]}

    def setting(labelled, title):
        tuning = [
            {k: v for k, v in run(row, 100, level + extra).items() if k not in ("test", "part")} | {"arguments": name}
            for row, level in levels.items()
            for name, extra in (("--x a|b", 0.0), ("--x c", -9.0))
        ]
        main = [run(study_runs.FROZEN, 0, -5.0)]
        main += [run(row, seed, level) for seed in range(seeds) for row, level in levels.items()]
        choices = dict.fromkeys(levels, "--x a|b")
        return {"title": title, "figures": {"mAP": "MR-full-mAP"}, "validation": "MR-full-mAP", "labelled": labelled,
                "rows": [*levels, "LoRA"], "parts": [], "planned_seeds": 8, "choices": choices,
                "items": {"test": items, "validation": items}, "tuning": tuning, "main": main,
                "others": [], "configurations": 2, "script": "ground_moments"}  # fmt: skip

    settings = {"many": setting(700, "Many labels"), "few": setting(100, "Few labels")}
    machine = {"versions": {"torch": "2"}, "hardware": "paper", "arguments": []}
    return {"format": 2, "machines": [machine], "settings": settings}
