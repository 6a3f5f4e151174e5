"""Several tasks together: whose batches come when, what the losses are, and what the trainer makes of both."""

import json
import random

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard, prepare_data_loader
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from peft_read.data import MultitaskBatchSampler, MultitaskDataset
from peft_read.vl_adapter import task_loss
from peft_read.vl_adapter.losses import TASK_LOSSES, check_losses

SIZES, BATCHES = {"vqa": 11, "gqa": 17, "nlvr": 5, "caption": 9}, {"vqa": 3, "gqa": 5, "nlvr": 1, "caption": 2}


def dataset(**sizes):
    return MultitaskDataset({task: [{"text": f"{task} {i}"} for i in range(size)] for task, size in sizes.items()})


def sampler(**options):
    return MultitaskBatchSampler(SIZES, BATCHES, **options)


def test_batches_are_those_of_the_original_loader(reference_data):
    cases = json.loads(reference_data("golden/vl_adapter/data/multitask_sampling.json").read_text())["cases"]
    for case in cases:
        ours = MultitaskBatchSampler(
            case["dataset_sizes"],
            case["batch_sizes"],
            num_replicas=case["replicas"],
            rank=case["rank"],
            **case["options"],
        )
        starts = dict(zip(ours.tasks, np.cumsum([0, *ours.sizes.values()]).tolist(), strict=False))
        for epoch in case["epochs"]:
            if not epoch["batches"]:  # the original's second epoch without set_epoch, which ours has
                assert len(list(ours)) == len(ours) > 0
                continue
            if epoch["set_epoch_called"]:
                ours.set_epoch(epoch["epoch"])
            assert [[task, examples] for task, examples in ours.plan()] == epoch["batches"], case["name"]
            expected = [[starts[task] + one for one in examples] for task, examples in epoch["batches"]]
            assert len(ours) == len(expected)
            assert list(ours) == expected


def test_the_list_of_tasks_is_taken_from_its_end():
    order = ["vqa"] * 2 + ["nlvr"] * 3
    random.Random(5).shuffle(order)
    ours = MultitaskBatchSampler({"vqa": 4, "nlvr": 3}, {"vqa": 2, "nlvr": 1})
    assert [task for task, _ in ours.plan(epoch=5)] == order[::-1]


def test_every_example_comes_once_per_epoch_and_no_batch_mixes_tasks():
    data = dataset(**SIZES)
    ours = MultitaskBatchSampler(data, BATCHES)
    loader = DataLoader(data, batch_sampler=ours, collate_fn=lambda rows: rows)
    texts = []
    for batch in loader:
        assert len({row["task"] for row in batch}) == 1
        assert len(batch) <= BATCHES[batch[0]["task"]]
        texts += [row["text"] for row in batch]
    assert sorted(texts) == sorted(f"{task} {i}" for task, size in SIZES.items() for i in range(size))


def test_an_epoch_read_to_its_end_is_followed_by_the_next_one_broken_off_begins_again():
    ours, other = sampler(), sampler()
    epochs = [list(ours) for _ in range(3)]
    for epoch, batches in enumerate(epochs):
        other.set_epoch(epoch)
        assert list(other) == batches
    assert epochs[0] != epochs[1] != epochs[2]
    broken = sampler()
    iterator = iter(broken)
    next(iterator), next(iterator)
    assert list(broken) == epochs[0]


def test_balanced_with_restart_has_as_many_batches_of_each_task_in_every_epoch():
    ours = MultitaskBatchSampler(
        {"vqa": 20, "nlvr": 2}, {"vqa": 2, "nlvr": 1}, sampling="balanced", restart=True, n_batches=5
    )
    assert not ours.length_varies
    for epoch in range(3):
        plan = list(ours.plan(epoch))
        assert [task for task, _ in plan].count("nlvr") == [task for task, _ in plan].count("vqa") == 5
        rounds = [examples[0] for task, examples in plan if task == "nlvr"]
        assert sorted(rounds[:2]) == sorted(rounds[2:4]) == [0, 1]
    stops = MultitaskBatchSampler({"vqa": 20, "nlvr": 2}, {"vqa": 2, "nlvr": 1}, sampling="balanced")
    assert stops.length_varies


@pytest.mark.parametrize("processes", [2, 3, 4])
@pytest.mark.parametrize("even", [False, True])
def test_accelerate_gives_every_process_whole_batches_and_all_of_them_once(processes, even):
    whole = list(sampler())
    try:
        BatchSamplerShard(sampler(), processes, 0, even_batches=even)
    except ValueError as error:  # older versions; the trainer does not ask them to
        pytest.skip(str(error))
    shards = [
        list(BatchSamplerShard(sampler(multiple_of=processes), processes, rank, even_batches=even))
        for rank in range(processes)
    ]
    assert len({len(shard) for shard in shards}) == 1
    together = [batch for step in zip(*shards, strict=True) for batch in step]
    assert together[: len(whole)] == whole
    assert together[len(whole) :] == whole[: -len(whole) % processes]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_prepared_loader_follows_the_epoch_and_skips_batches(processes):
    data = dataset(**SIZES)

    def prepared(rank):
        ours = MultitaskBatchSampler(data, BATCHES, multiple_of=processes)
        loader = DataLoader(data, batch_sampler=ours, collate_fn=lambda rows: [row["text"] for row in rows])
        return prepare_data_loader(loader, num_processes=processes, process_index=rank, even_batches=False), ours

    first, _ = prepared(0)
    assert isinstance(first, DataLoaderShard)
    epochs = [list(first) for _ in range(3)]
    assert len(epochs[0]) == len(first) == 18 // processes
    assert epochs[0] != epochs[1]
    again, ours = prepared(0)
    again.set_epoch(2)
    ours.set_epoch(2)  # older versions of accelerate do not reach it
    assert list(again) == epochs[2]
    assert list(skip_first_batches(prepared(0)[0], 4)) == epochs[0][4:]


def test_a_state_goes_on_where_it_was_taken():
    ours = sampler()
    list(ours)
    iterator = iter(ours)
    head = [next(iterator) for _ in range(4)]
    state = ours.state_dict()
    assert state == {"epoch": 1, "batch": 4}
    resumed = sampler()
    resumed.load_state_dict(json.loads(json.dumps(state)))
    assert len(resumed) == 14
    assert head + list(resumed) == head + list(iterator)
    assert list(resumed) == list(ours)  # both are in epoch 2
    with pytest.raises(ValueError, match="batch 19 is beyond the 18 batches of epoch 0"):
        sampler().load_state_dict({"epoch": 0, "batch": 19})
    with pytest.raises(ValueError, match="'epoch' and 'batch'"):
        sampler().load_state_dict({"epoch": 0})


def test_draws_depend_on_seed_epoch_and_index_only_in_workers_too():
    data = dataset(vqa=6, nlvr=3)
    ours = MultitaskBatchSampler(data, 3)

    def draws(**options):
        ours.set_epoch(0)
        loader = DataLoader(data, batch_sampler=ours, collate_fn=lambda rows: rows, **options)
        return [{row["text"]: row["draw"] for batch in loader for row in batch} for _ in range(2)]

    plain = draws()
    assert plain[0] != plain[1]
    assert all(0 <= draw < 1 for epoch in plain for draw in epoch.values())
    assert draws(num_workers=1, persistent_workers=True) == plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": "random"}, "sampling must be one of 'round_robin', 'balanced', not 'random'"),
        ({"n_batches": 3}, "n_batches and restart belong to sampling='balanced'"),
        ({"sampling": "balanced", "n_batches": 0}, "n_batches must be a whole number from 1 on, not 0"),
        ({"num_replicas": 2, "rank": 2}, r"rank=2 is outside 0 \.\. 1"),
        ({"seed": -1}, "seed must be a whole number from 0 on"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sampler(**options)


def test_tasks_sizes_and_batch_sizes_must_fit():
    with pytest.raises(ValueError, match=r"none for \[caption\], unknown \[captions\]"):
        MultitaskBatchSampler(SIZES, {**{k: v for k, v in BATCHES.items() if k != "caption"}, "captions": 2})
    with pytest.raises(ValueError, match="the batch size of task 'vqa' must be a whole number from 1 on, not 0"):
        MultitaskBatchSampler(SIZES, {**BATCHES, "vqa": 0})
    with pytest.raises(ValueError, match="the number of examples of task 'nlvr' must be a whole number from 1 on"):
        dataset(vqa=3, nlvr=0)
    with pytest.raises(ValueError, match="must be a mapping from the name of a task"):
        MultitaskDataset([1, 2])
    with pytest.raises(ValueError, match="the dataset of task 'vqa' has no length or no rows"):
        MultitaskDataset({"vqa": iter([1])})
    with pytest.raises(ValueError, match="example 0 of task 'vqa' is not a mapping: 1"):
        MultitaskDataset({"vqa": [1]})[0]
    data = dataset(vqa=3, nlvr=2)
    assert data.by_task()["nlvr"][1]["text"] == "nlvr 1"
    for index in (5, -1):
        with pytest.raises(IndexError):
            data[index]


@pytest.mark.parametrize("case", ["vl_bart/backbone", "vl_t5/backbone", "vl_t5/video_adapter_single"])
def test_losses_are_those_of_the_original(reference_data, case):
    folder = reference_data("golden/vl_adapter")
    if not (folder / f"{case}.safetensors").exists():
        pytest.skip(f"the case {case} is not among the reference data")
    tensors, record = load_file(folder / f"{case}.safetensors"), json.loads((folder / f"{case}.json").read_text())
    for task in record["tasks"]:
        logits, labels = tensors[f"outputs/{task}.logits"], tensors[f"inputs/{task}.target_ids"]
        actual = task_loss(logits, labels, TASK_LOSSES[task], tensors.get(f"inputs/{task}.scores")).mean
        torch.testing.assert_close(actual, tensors[f"losses/{task}.loss"].view(()), atol=1e-5, rtol=1e-5)


def test_known_losses():
    logits = torch.zeros(2, 2, 4)
    logits[0, 0, 1] = 100.0  # right: no loss
    labels = torch.tensor([[1, -100], [2, 3]])
    nats = torch.tensor(4.0).log()
    assert task_loss(logits, labels, "sample_mean").mean == pytest.approx(nats / 2)
    assert task_loss(logits, labels, "token_mean").mean == pytest.approx(2 * nats / 3)
    scored = task_loss(logits, labels, "scored_sample_mean", torch.tensor([1.0, 0.3]))
    assert scored.mean == pytest.approx(0.3 * nats / 2)
    empty = task_loss(logits, torch.full((2, 2), -100), "token_mean")
    assert empty.mean == 0 and empty.divisor == 0


def test_parts_of_a_batch_add_up_to_the_whole():
    torch.manual_seed(0)
    logits, scores = torch.randn(8, 5, 11), torch.rand(8)
    labels = torch.randint(0, 11, (8, 5)).masked_fill(torch.arange(5) >= torch.randint(1, 6, (8, 1)), -100)
    for kind in ("sample_mean", "scored_sample_mean", "token_mean"):
        whole = task_loss(logits, labels, kind, scores)
        parts = [task_loss(logits[i : i + 3], labels[i : i + 3], kind, scores[i : i + 3]) for i in (0, 3, 6)]
        total, divisor = (sum(getattr(part, name) for part in parts) for name in ("total", "divisor"))
        torch.testing.assert_close(total / divisor, whole.mean)


def test_losses_that_do_not_fit_are_refused():
    logits, labels = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="not 'mean'"):
        task_loss(logits, labels, "mean")
    with pytest.raises(ValueError, match=r"logits \(2, 3, 5\) and labels \(2, 2\)"):
        task_loss(logits, labels[:, :2], "token_mean")
    with pytest.raises(ValueError, match="needs the score of every answer"):
        task_loss(logits, labels, "scored_sample_mean")
    with pytest.raises(ValueError, match="no kind of loss for 'kilogram': name one of 'sample_mean'"):
        check_losses(("vqa", "kilogram"), None)
    assert check_losses(("kilogram", "vqa"), {"kilogram": "token_mean"})["kilogram"] == "token_mean"
