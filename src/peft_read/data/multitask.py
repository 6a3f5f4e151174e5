"""Several tasks as one dataset, and batches of one task each."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, DistributedSampler, Sampler

from ..values import count, listed, shown

__all__ = ["MultitaskBatchSampler", "MultitaskDataset", "TaskView"]

SAMPLING = ("round_robin", "balanced")


class MultitaskDataset(Dataset):
    """Concatenates the datasets of several tasks; every example carries the name of its task.

    An item is the row of its dataset with two more entries: `task`, the name under which the dataset was given, and
    `draw`, a number from 0 to 1 (exclusive) that depends on the seed, the epoch and the index only. `VLCollator` draws
    one of several answers with it, so that a resumed run draws the same answers as an uninterrupted one.

    Args:
        datasets: by task, each with a length and rows that are mappings.
        seed: of `draw`.

    Attributes:
        tasks: their names, in the order given.
        sizes: examples by task.

    Raises:
        ValueError: no dataset, a dataset without length or rows, or an empty one.

    Example:
        >>> data = MultitaskDataset({"vqa": [{"text": "who?"}], "nlvr": [{"text": "a dog"}, {"text": "a cat"}]})
        >>> len(data), *(data[2].get(name) for name in ("task", "text"))
        (3, 'nlvr', 'a cat')
    """

    def __init__(self, datasets: Mapping[str, Any], *, seed: int = 0) -> None:
        if not isinstance(datasets, Mapping) or not datasets:
            raise ValueError(
                f"datasets must be a mapping from the name of a task to its dataset, not {shown(datasets)}"
            )
        for task, dataset in datasets.items():
            if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
                raise ValueError(f"the dataset of task {task!r} has no length or no rows by number: {shown(dataset)}")
        self.datasets = {_task_name(task): dataset for task, dataset in datasets.items()}
        self.tasks = tuple(self.datasets)
        self.sizes = _sizes({task: len(dataset) for task, dataset in self.datasets.items()})
        self.seed = count(seed, "seed", low=0)
        self._starts = dict(zip(self.tasks, np.cumsum([0, *self.sizes.values()])[:-1].tolist(), strict=True))
        # Shared memory: worker processes that outlive an epoch must see the next one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return sum(self.sizes.values())

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One example.

        Raises:
            IndexError: the index is out of range.
            ValueError: its row is not a mapping.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        task = next(task for task in reversed(self.tasks) if index >= self._starts[task])
        row = self.datasets[task][int(index) - self._starts[task]]
        if not isinstance(row, Mapping):
            raise ValueError(f"example {index - self._starts[task]} of task {task!r} is not a mapping: {shown(row)}")
        return {**row, "task": task, "draw": self._draw(index)}

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of `draw`; called by `MultitaskBatchSampler`."""
        self._epoch.fill_(count(epoch, "epoch", low=0))

    def by_task(self) -> dict[str, TaskView]:
        """One dataset per task, as the Trainer takes for `eval_dataset`."""
        return {task: TaskView(self, task) for task in self.tasks}

    def start_of(self, task: str) -> int:
        """Index of a task's first example."""
        return self._starts[task]

    def _draw(self, index: int) -> float:
        return float(np.random.default_rng((self.seed, int(self._epoch), int(index))).random())


class TaskView(Dataset):
    """The examples of one task of a `MultitaskDataset`."""

    def __init__(self, data: MultitaskDataset, task: str) -> None:
        if task not in data.sizes:
            raise ValueError(f"no task {task!r}; there are {', '.join(map(repr, data.tasks))}")
        self.data, self.task = data, task

    def __len__(self) -> int:
        return self.data.sizes[self.task]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of the {len(self)} of task {self.task!r}")
        return self.data[self.data.start_of(self.task) + index]


class MultitaskBatchSampler(Sampler[list[int]]):
    """Batches of one task each, for `DataLoader(MultitaskDataset(...), batch_sampler=...)`.

    Per epoch: the examples of every task are shuffled and cut into its batches; the list of tasks, each repeated by
    its number of batches, is shuffled with `random.Random(seed + epoch)` and taken **from its end**. Order and indices
    are those of VL-Adapter's loader (Sung et al., CVPR 2022) with its DistributedSampler per task. One thing differs:
    without `set_epoch` the original's second epoch is empty; here the epoch advances after a complete
    iteration, and an interrupted one starts again.

    Under accelerate, and in the Trainer, leave `num_replicas` at 1: accelerate distributes whole batches over its
    processes in turn. `num_replicas` and `rank` are for loops that do not use it; there, as in the original, all
    processes have the same task at the same time, each its share of the task's examples.

    Args:
        sizes: a `MultitaskDataset`, or examples by task. With the dataset, its draws follow the epoch.
        batch_sizes: examples per batch, one number or one for each task.
        sampling: "round_robin": every batch of every task once. "balanced": equally many batches of each task,
            `n_batches`; the epoch ends when a task has none left, unless `restart`.
        n_batches: batches of each task under "balanced"; None: the sum of all batches over the number of tasks,
            rounded down.
        restart: under "balanced", a task without batches left starts again in another order, so that every epoch has
            `n_batches` batches of each task. In the original the epoch ends.
        shuffle: whether the order of the tasks is shuffled; examples of a task always are.
        seed: of both orders.
        num_replicas: processes that share the examples of each task.
        rank: which of them this one is.
        multiple_of: pad the epoch to a multiple of this number of batches by repeating its first ones, so that this
            number of processes gets equally many.

    Raises:
        ValueError: an empty task, another `sampling`, tasks without a batch size, invalid numbers.

    Example:
        >>> sampler = MultitaskBatchSampler({"vqa": 4, "nlvr": 2}, {"vqa": 2, "nlvr": 1})
        >>> ", ".join(f"{task} {len(examples)}" for task, examples in sampler.plan(epoch=0))
        'nlvr 1, vqa 2, vqa 2, nlvr 1'
    """

    # Attributes that accelerate reads: batches differ in length, the last ones are kept.
    batch_size = None
    drop_last = False

    def __init__(
        self,
        sizes: MultitaskDataset | Mapping[str, int],
        batch_sizes: Mapping[str, int] | int,
        *,
        sampling: str = "round_robin",
        n_batches: int | None = None,
        restart: bool = False,
        shuffle: bool = True,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        multiple_of: int = 1,
    ) -> None:
        self.dataset = sizes if isinstance(sizes, MultitaskDataset) else None
        self.sizes = _sizes(sizes.sizes if isinstance(sizes, MultitaskDataset) else sizes)
        self.tasks = tuple(self.sizes)
        self.batch_sizes = _batch_sizes(batch_sizes, self.tasks)
        self.sampling = {"roundrobin": "round_robin"}.get(sampling, sampling)
        if self.sampling not in SAMPLING:
            raise ValueError(f"sampling must be one of {', '.join(map(repr, SAMPLING))}, not {sampling!r}")
        if self.sampling != "balanced" and (n_batches is not None or restart):
            raise ValueError("n_batches and restart belong to sampling='balanced'")
        self.num_replicas, self.rank = count(num_replicas, "num_replicas"), count(rank, "rank", low=0)
        if self.rank >= self.num_replicas:
            raise ValueError(f"rank={rank} is outside 0 .. {self.num_replicas - 1}")
        self.shuffle, self.seed, self.restart = bool(shuffle), count(seed, "seed", low=0), bool(restart)
        self.multiple_of = count(multiple_of, "multiple_of")
        held = {task: -(-size // self.num_replicas) for task, size in self.sizes.items()}
        #: Batches by task in an epoch that takes all of them.
        self.available = {task: -(-held[task] // self.batch_sizes[task]) for task in self.tasks}
        self.n_batches = (
            sum(self.available.values()) // len(self.tasks) if n_batches is None else count(n_batches, "n_batches")
        )
        self.epoch, self._begin_at, self._handed_out = 0, 0, 0
        self._planned: tuple[int, list[str]] | None = None

    @property
    def sampler(self) -> MultitaskBatchSampler:
        """The sampler itself: accelerate looks here for `set_epoch`."""
        return self

    @property
    def length_varies(self) -> bool:
        """Whether the length depends on the epoch, because a task runs out at different points."""
        return self.sampling == "balanced" and not self.restart and min(self.available.values()) < self.n_batches

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next iteration."""
        epoch = count(epoch, "epoch", low=0)
        if epoch != self.epoch:
            self._begin_at = 0
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of the current epoch."""
        return len(self._order(self.epoch)) - self._begin_at

    def __iter__(self) -> Iterator[list[int]]:
        epoch, begin = self.epoch, self._begin_at
        if self.dataset is not None:
            self.dataset.set_epoch(epoch)
        starts = dict(zip(self.tasks, np.cumsum([0, *self.sizes.values()])[:-1].tolist(), strict=True))
        for index, (task, examples) in enumerate(self.plan(epoch)):
            if index >= begin:
                self._handed_out = index + 1
                yield [starts[task] + example for example in examples]
        self.epoch, self._begin_at, self._handed_out = epoch + 1, 0, 0

    def plan(self, epoch: int | None = None) -> Iterator[tuple[str, list[int]]]:
        """The batches of an epoch as task and examples, counted within the task.

        Args:
            epoch: None = the current one.
        """
        epoch = self.epoch if epoch is None else count(epoch, "epoch", low=0)
        batches = {task: self._batches(task, epoch) for task in self.tasks}
        first: list[tuple[str, list[int]]] = []
        order = self._order(epoch)
        whole = len(order) if self.multiple_of == 1 else self._whole
        for index, task in enumerate(order):
            batch = first[(index - whole) % whole] if index >= whole else (task, next(batches[task]))
            if len(first) < self.multiple_of:
                first.append(batch)
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch and number of batches drawn; a DataLoader with workers draws ahead of the training."""
        return {"epoch": self.epoch, "batch": self._handed_out or self._begin_at}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues from a `state_dict`.

        Raises:
            ValueError: not the state of a sampler, or beyond the end of the epoch.
        """
        if not isinstance(state, Mapping) or set(state) != {"epoch", "batch"}:
            raise ValueError(f"the state of a sampler has 'epoch' and 'batch', not {shown(state)}")
        epoch, batch = count(state["epoch"], "epoch", low=0), count(state["batch"], "batch", low=0)
        if batch > len(self._order(epoch)):
            raise ValueError(f"batch {batch} is beyond the {len(self._order(epoch))} batches of epoch {epoch}")
        self.epoch, self._begin_at, self._handed_out = epoch, batch, 0

    def _order(self, epoch: int) -> list[str]:
        """The task of every batch of an epoch."""
        if self._planned is not None and self._planned[0] == epoch:
            return self._planned[1]
        balanced = self.sampling == "balanced"
        order = [task for task in self.tasks for _ in range(self.n_batches if balanced else self.available[task])]
        if self.shuffle:
            random.Random(self.seed + epoch).shuffle(order)
        order.reverse()
        if self.length_varies:
            order = order[: _first_shortage(order, self.available)]
        self._whole = len(order)
        order += [order[index % len(order)] for index in range(-len(order) % self.multiple_of)]
        self._planned = epoch, order
        return order

    def _batches(self, task: str, epoch: int) -> Iterator[list[int]]:
        size = self.batch_sizes[task]
        sampler: DistributedSampler = DistributedSampler(
            range(self.sizes[task]),  # type: ignore[arg-type]
            num_replicas=self.num_replicas,
            rank=self.rank,
            seed=self.seed,
        )
        # A second pass within an epoch uses the order of an epoch number that no training reaches.
        for shuffled in range(epoch, 2**62, 2**40):
            sampler.set_epoch(shuffled)
            examples = list(sampler)
            for start in range(0, len(examples), size):
                yield examples[start : start + size]


def _first_shortage(order: Sequence[str], available: Mapping[str, int]) -> int:
    """The first position in the list of tasks at which the task has no batch left."""
    used: Counter[str] = Counter()
    for index, task in enumerate(order):
        used[task] += 1
        if used[task] > available[task]:
            return index
    return len(order)


def _task_name(task: Any) -> str:
    if not isinstance(task, str) or not task.strip():
        raise ValueError(f"the name of a task must be a string, not {shown(task)}")
    return task


def _sizes(sizes: Any) -> dict[str, int]:
    if not isinstance(sizes, Mapping) or not sizes:
        raise ValueError(f"sizes must be a MultitaskDataset or examples by task, not {shown(sizes)}")
    return {_task_name(task): count(size, f"the number of examples of task {task!r}") for task, size in sizes.items()}


def _batch_sizes(batch_sizes: Any, tasks: Sequence[str]) -> dict[str, int]:
    if not isinstance(batch_sizes, Mapping):
        return dict.fromkeys(tasks, count(batch_sizes, "batch_sizes"))
    if set(batch_sizes) != set(tasks):
        lacking, unknown = sorted(set(tasks) - set(batch_sizes)), sorted(set(batch_sizes) - set(tasks), key=str)
        raise ValueError(
            f"batch_sizes must name every task once: none for [{listed(lacking)}], unknown [{listed(unknown)}]"
        )
    return {task: count(batch_sizes[task], f"the batch size of task {task!r}") for task in tasks}
