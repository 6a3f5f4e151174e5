"""READ at work in some seconds, without a download: a task that needs memory, with a recurrence and without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from .adapter import READConfig

__all__ = ["demonstrate"]

VOCABULARY, PERIOD, LENGTH, BATCH = 8, 2, 24, 16


def demonstrate(steps: int = 150, *, seed: int = 0, report: Callable[[str], None] = print) -> dict[str, float]:
    """Adapts a small frozen model with random weights to sequences that repeat two random tokens.

    Chance is log 8 = 2.08. A model that remembers the token before the last one reaches 0.09: only the first of the 23
    predictions of a sequence is a guess then.

    Args:
        steps: optimiser steps for each of the two adapters.
        seed: of the model, the adapters and the sequences.
        report: takes the lines of the report.

    Returns:
        The mean loss over the last ten steps, of READ ("rnn") and of the same adapter without a recurrence ("none").
    """
    losses = {}
    for cell, name in {"rnn": "READ", "none": "the same adapter without a recurrence"}.items():
        torch.manual_seed(seed)
        model = get_peft_model(_frozen_model(), READConfig(r=16, cell=cell, task_type="CAUSAL_LM"))
        trained, parameters = model.get_nb_trainable_parameters()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        history = []
        for _ in range(steps):
            tokens = torch.randint(VOCABULARY, (BATCH, PERIOD)).repeat(1, LENGTH // PERIOD)
            loss = model(input_ids=tokens, labels=tokens).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(float(loss.detach()))
        last = history[-10:]
        losses[cell] = sum(last) / len(last)
        report(
            f"{name}: {trained:,} of {parameters:,} parameters trained ({100 * trained / parameters:.1f} %), "
            f"loss {history[0]:.2f} -> {losses[cell]:.2f} in {steps} steps"
        )
    return losses


def _frozen_model() -> GPT2LMHeadModel:
    sizes: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, bos_token_id=None, eos_token_id=None, **sizes))
