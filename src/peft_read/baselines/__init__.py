"""The fine-tuning baselines of the paper."""

from .freezing import FREEZING_METHODS, HEADS, train_only
from .prompt import InputPrompts
from .prompt_summariser import SummariserPrompts
from .prompting import add_prompts

__all__ = ["FREEZING_METHODS", "HEADS", "InputPrompts", "SummariserPrompts", "add_prompts", "train_only"]
