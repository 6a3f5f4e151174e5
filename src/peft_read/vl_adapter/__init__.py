"""VL-Adapter's unified setup: losses by task, a mixin for transformers' Trainer, models of the published code."""

from .losses import LOSS_KINDS, TASK_LOSSES, LossSum, task_loss
from .original import load_original
from .penalty import BottleneckPenalty
from .trainer import MultitaskMixin

__all__ = ["LOSS_KINDS", "TASK_LOSSES", "BottleneckPenalty", "LossSum", "MultitaskMixin", "load_original", "task_loss"]
