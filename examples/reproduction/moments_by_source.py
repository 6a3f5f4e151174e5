"""The summaries of QVHighlights moments, divided so that no source video is on both sides of the selection.

The published layout draws items, and several items come from one source: of its 194 validation items' sources nearly
all are among those of the training items. Here whole sources are drawn, as in the grounding experiments.
"""

from __future__ import annotations

from pathlib import Path

from run_folder import write_json, written_whole

from peft_read.data import load_how2, load_qvhighlights, low_resource_split
from peft_read.data.qvhighlights import source_of

SPLITS = ("sum_train", "sum_val", "sum_test")
PREFIX = "qvh"  # of an item's id, before the query's


def write_moments_by_source(
    moments: Path,
    annotations: Path,
    test_annotations: Path,
    folder: Path,
    *,
    num_train: int = 1_100,
    num_validation: int = 400,
    seed: int = 0,
) -> dict[str, int]:
    """Writes the three splits in the How2 layout; the test items stay as they are.

    `sources.json` says of every item which source it is a part of: items of one source are not independent.

    Args:
        moments: folder with sum_train, sum_val and sum_test.
        annotations: of QVHighlights' validation split, whose queries the items of the first two are.
        test_annotations: of its test split, whose queries the others are.
        folder: where the new splits go.
        num_train: items to train on.
        num_validation: items to select on, of other sources.
        seed: of the draw, see `low_resource_split`.

    Returns:
        Items by split.

    Raises:
        ValueError: an item is not a query of its annotations, or there are fewer items than asked for.
    """
    train, validation, test = (load_how2(moments, split) for split in SPLITS)
    items = {row["video_id"]: row for part in (train, validation) for row in part}
    queries, sources = load_qvhighlights(annotations), {}
    for given, known, path in (
        (items, queries, annotations),
        (test["video_id"], load_qvhighlights(test_annotations), test_annotations),
    ):
        of_queries = {f"{PREFIX}{row['qid']}": source_of(row["vid"]) for row in known.select_columns(["qid", "vid"])}
        if missing := sum(item not in of_queries for item in given):
            raise ValueError(f"{missing} items of {moments} are not queries of {path}")
        sources |= {item: of_queries[item] for item in given}
    queries = queries.select([i for i, qid in enumerate(queries["qid"]) if f"{PREFIX}{qid}" in items])
    drawn = low_resource_split(queries, num_train=num_train, num_validation=num_validation, seed=seed)
    parts = [[items[f"{PREFIX}{qid}"] for qid in part["qid"]] for part in drawn]
    sizes = {}
    with written_whole(folder) as part:
        for split, rows in zip(SPLITS, (*parts, list(test)), strict=True):
            (part / split).mkdir(parents=True)
            for name, column in (("tran.tok.txt", "transcript"), ("desc.tok.txt", "summary")):
                text = "".join(f"{row['video_id']} {row[column]}\n" for row in rows)
                (part / split / name).write_text(text, encoding="utf-8")
            sizes[split] = len(rows)
        write_json(part / "sources.json", sources, indent=None)
    return sizes
