"""The fine-tuning baselines of the paper."""

from .freezing import FREEZING_METHODS, HEADS, train_only
from .prompt import InputPrompts, add_prompts

__all__ = ["FREEZING_METHODS", "HEADS", "InputPrompts", "add_prompts", "train_only"]
