"""Switching the task of a model: known answers, then failure cases."""

import pytest
import torch
from torch import nn

from peft_read.tasks import TaskModule, set_task, task_modules


class Scale(nn.Module, TaskModule):
    """x times a factor per task."""

    def __init__(self, **factors):
        super().__init__()
        self.factors, self.task_names = factors, tuple(factors)

    def forward(self, x):
        return x * self.factors[self.task]


def test_every_part_serves_the_task_that_was_set():
    model = nn.Sequential(Scale(vqa=2, gqa=3), nn.Identity(), Scale(vqa=5, gqa=7))
    set_task(model, "vqa")
    assert model(torch.tensor(1)) == 10
    set_task(model, "gqa")
    assert model(torch.tensor(1)) == 21


def test_as_a_context_the_task_before_comes_back_also_after_an_error():
    model = nn.Sequential(Scale(vqa=2, gqa=3))
    with set_task(model, "vqa"):
        assert model(torch.tensor(1)) == 2
        with pytest.raises(KeyError), set_task(model, "gqa"):
            raise KeyError("an error inside")
        assert model(torch.tensor(1)) == 2
    assert [module.task for module in task_modules(model)] == [None]


def test_a_model_that_shares_everything_has_nothing_to_switch():
    set_task(nn.Linear(2, 2), "any")


def test_an_unknown_task_changes_nothing():
    model = nn.Sequential(Scale(vqa=2, nlvr=1), Scale(vqa=2))
    set_task(model, "vqa")
    with pytest.raises(ValueError, match="'nlvr' is unknown to this model, which has weights for: 'vqa'"):
        set_task(model, "nlvr")
    assert [module.task for module in task_modules(model)] == ["vqa", "vqa"]
