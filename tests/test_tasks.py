"""Switching the task of a model: known answers, then failure cases."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_read.checkpointing import stacks_in
from peft_read.tasks import TaskModule, name_after_tasks, set_task, task_modules


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


def with_default_and(*others, **second):
    """Two linear layers with a LoRA "default" on the first and further ones on both, all of them random."""
    torch.manual_seed(0)
    lora = {"r": 2, "init_lora_weights": False}
    model = get_peft_model(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)), LoraConfig(**lora, target_modules=["0"])
    )
    for name in others:
        model.add_adapter(name, LoraConfig(**lora, target_modules=["0", "1"], **second))
    return model.eval()


def test_a_task_without_an_adapter_of_its_own_is_not_served_by_that_of_another_task():
    model, x = with_default_and("vqa", modules_to_save=["2"]), torch.randn(3, 4)
    with torch.no_grad():
        model.base_model.model[2].modules_to_save["vqa"].weight.mul_(2)
    default = model(x)
    set_task(model, "vqa")
    vqa = model(x)
    assert model.active_adapter == "vqa" and not torch.allclose(vqa, default)
    with set_task(model, "gqa"):
        assert model.active_adapter == model.base_model.active_adapter == "default"
        torch.testing.assert_close(model(x), default, rtol=0, atol=0)
    torch.testing.assert_close(model(x), vqa, rtol=0, atol=0)
    set_task(model, "gqa")
    torch.testing.assert_close(model(x), default, rtol=0, atol=0)
    model.set_adapter("vqa")  # peft's own switch still works, and a task that is set goes before it
    set_task(model, "nlvr")
    torch.testing.assert_close(model(x), default, rtol=0, atol=0)


def test_an_adapter_that_is_named_after_no_task_stays_active_until_it_is_said_to_be():
    model, x = with_default_and("style"), torch.randn(3, 4)
    model.set_adapter("style")
    expected = model(x)
    set_task(model, "gqa")
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    name_after_tasks(model, ["style"])
    set_task(model, "gqa")
    assert model.active_adapter == "default" and not torch.allclose(model(x), expected)


def test_adapters_that_are_active_beside_that_of_a_task_stay_active():
    model, x = with_default_and("vqa", "gqa", "style"), torch.randn(3, 4)
    layers = [model.base_model.model[0], model.base_model.model[1]]
    set_task(model, "vqa")
    for active, task, expected in (
        (["style", "vqa"], "gqa", ["style", "gqa"]),
        (["default", "style"], "vqa", ["vqa", "style"]),
        (["style", "vqa", "default"], "gqa", ["style", "gqa"]),
        (["vqa", "style"], "nlvr", ["default", "style"]),
    ):
        model.base_model.set_adapter(expected)
        right = model(x)
        model.base_model.set_adapter(active)
        before = model(x)
        with set_task(model, task):
            torch.testing.assert_close(model(x), right, rtol=0, atol=0)
            assert all(layer.active_adapters == expected for layer in layers)
            assert model.base_model.active_adapters == expected and model.active_adapter in expected
        torch.testing.assert_close(model(x), before, rtol=0, atol=0)
        assert model.base_model.active_adapters == active


def test_a_module_that_is_trained_for_another_adapter_stays_with_it():
    model, x = with_default_and("vqa", "gqa"), torch.randn(3, 4)
    model.add_adapter("style", LoraConfig(r=2, init_lora_weights=False, target_modules=["0"], modules_to_save=["2"]))
    with torch.no_grad():
        model.base_model.model[2].modules_to_save["style"].weight.zero_()
        model.base_model.model[2].modules_to_save["style"].bias.zero_()
    set_task(model, "vqa")
    model.base_model.set_adapter(["vqa", "style"])
    assert not model(x).any()
    set_task(model, "nlvr")
    assert model.base_model.active_adapters == ["default", "style"]
    assert not model(x).any() and model.base_model.model[2].active_adapter == "style"


def test_dropping_several_adapters_of_which_none_is_of_a_task_is_said():
    model = with_default_and("vqa", "gqa", "style")
    model.base_model.set_adapter(["style", "gqa"])
    with pytest.warns(UserWarning, match=r"'vqa' takes the place of 'style', 'gqa'.*name_after_tasks"):
        set_task(model, "vqa")
    assert model.base_model.active_adapters == ["vqa"]
    model.base_model.set_adapter(["style", "gqa"])
    name_after_tasks(model, ["gqa"])
    set_task(model, "vqa")
    assert model.base_model.active_adapters == ["style", "vqa"]


def test_stacks_are_what_owns_blocks_wherever_it_stands():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 1, 4), 2, enable_nested_tensor=False)
    model = nn.Sequential(nn.ModuleDict({"encoder": encoder}), nn.Linear(4, 4))
    model[0]["experts"] = nn.ModuleList([nn.Sequential(nn.Linear(4, 4))])
    assert stacks_in(model) == [model[0], encoder]


def test_going_back_to_a_frozen_default_in_training_is_said():
    model = with_default_and("vqa")
    model.set_adapter("vqa")
    set_task(model.train(), "vqa")
    with pytest.warns(UserWarning, match=r"'default' is frozen and 'vqa' trained.*\['default', 'vqa'\]"):
        set_task(model, "gqa")
