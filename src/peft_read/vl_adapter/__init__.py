"""The unified multi-task setup of VL-Adapter: losses by task, and a mixin for transformers' Trainer."""

from .losses import LOSS_KINDS, TASK_LOSSES, LossSum, task_loss
from .trainer import MultitaskMixin

__all__ = ["LOSS_KINDS", "TASK_LOSSES", "LossSum", "MultitaskMixin", "task_loss"]
