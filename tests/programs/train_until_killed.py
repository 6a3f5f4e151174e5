"""Trains with PVLA and saves after each step, into the folder named by the argument."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_alignment_trainer import pvla_config, seq2seq_trainer

torch.set_num_threads(1)
seq2seq_trainer(sys.argv[1], pvla_config("bart"), max_steps=400, save_strategy="steps", save_steps=1).train()
