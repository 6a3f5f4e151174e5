"""Defaults of the scripts' training arguments, one class per kind of training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import Seq2SeqTrainingArguments
from transformers import TrainingArguments as TransformersArguments


@dataclass
class ScriptDefaults:
    """Those of every script; stands before the class of transformers whose defaults it replaces."""

    remove_unused_columns: bool = False  # the collators read columns that no model takes
    dataloader_pin_memory: bool = torch.cuda.is_available()  # torch warns where there is nothing to pin for
    report_to: str = "none"


@dataclass
class AdaptationArguments(ScriptDefaults, Seq2SeqTrainingArguments):
    """Adapting a small frozen backbone that generates text."""

    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.1
    eval_strategy: str = "epoch"
    save_strategy: str = "epoch"
    save_total_limit: int = 2  # the last one, and the one before it should the last be damaged
    logging_steps: float = 10


@dataclass
class PretrainingArguments(ScriptDefaults, Seq2SeqTrainingArguments):
    """Pretraining a small backbone on two CPU cores: one pass, in the order of the examples."""

    learning_rate: float = 1e-3
    lr_scheduler_type: str = "cosine"
    num_train_epochs: float = 1
    train_sampling_strategy: str = "sequential"
    max_grad_norm: float = 1.0
    weight_decay: float = 0.01
    logging_steps: float = 100
    save_strategy: str = "no"


@dataclass
class GroundingArguments(ScriptDefaults, TransformersArguments):
    """Moment-DETR's and UMT's own settings but for the learning rate."""

    lr_scheduler_type: str = "constant"
    weight_decay: float = 1e-4
    max_grad_norm: float = 0.1
    per_device_train_batch_size: int = 32
    save_strategy: str = "epoch"
    save_total_limit: int = 1
