"""The fine-tuning baselines of the paper."""

from .freezing import FREEZING_METHODS, train_only

__all__ = ["FREEZING_METHODS", "train_only"]
