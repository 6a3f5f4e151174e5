"""The Trainer of `how2_summarize.py`: the alignment loss, and what the original's recipe asks of a Trainer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import Seq2SeqTrainer

from peft_read import PVLALossMixin

# The fusion's modules; the visual transformer keeps the slow rate, as in the original.
FAST_MODULES = frozenset({"_linear_1", "_linear_2", "_linear_3", "_linear_4", "_multi_head_attn", "fg"})


class SummarisationTrainer(PVLALossMixin, Seq2SeqTrainer):
    """Trainer with the alignment loss, a learning rate of their own for the fusion's modules, and stepwise decay.

    Args:
        visual_lr_factor: times the learning rate, for the parameters of `FAST_MODULES`.
        lr_step_epochs, lr_step_factor: every so many epochs the rates are multiplied by the factor (torch's StepLR,
            which transformers has no name for); None = the scheduler of the arguments.
    """

    def __init__(
        self,
        *args: Any,
        visual_lr_factor: float = 1.0,
        lr_step_epochs: int | None = None,
        lr_step_factor: float = 0.95,
        **kwargs: Any,
    ) -> None:
        self.visual_lr_factor = visual_lr_factor
        self.lr_step_epochs, self.lr_step_factor = lr_step_epochs, lr_step_factor
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As in the Trainer, with each group of parameters cut in two where the factor is not 1."""
        exists = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if self.visual_lr_factor != 1.0 and not exists:
            fast = fast_parameters(self.model if model is None else model)
            if not fast:
                raise ValueError(
                    f"visual_lr_factor={self.visual_lr_factor}, but no module of the fusion is trained; use it with "
                    "full fine-tuning, or with a plain checkpoint, whose visual modules are new"
                )
            split_groups(optimizer, fast, self.visual_lr_factor)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """As in the Trainer; with `lr_step_epochs` the constant schedule becomes a staircase."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self.lr_step_epochs is not None:
            batches = math.ceil(len(self.train_dataset) / (self.args.train_batch_size * self.args.world_size))
            steps = self.lr_step_epochs * math.ceil(batches / self.args.gradient_accumulation_steps)
            scheduler.lr_lambdas = [lambda step: self.lr_step_factor ** (step // steps)] * len(scheduler.lr_lambdas)
        return scheduler


def fast_parameters(model: nn.Module) -> set[int]:
    """Identities of the trained parameters of the fusion.

    Identities and not values: the original compares values, and so leaves parameters that happen to equal a parameter
    of the fusion (zero biases of the same shape) out of every group, never trained.
    """
    return {
        id(parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and FAST_MODULES & set(name.split("."))
    }


def split_groups(optimizer: torch.optim.Optimizer, fast: set[int], factor: float) -> None:
    """Moves the parameters with these identities into groups of their own, with `factor` times the rate."""
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if id(parameter) in fast]
        if moved:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in fast]
            optimizer.add_param_group({**group, "params": moved, "lr": factor * group["lr"]})
