"""Readers of published dataset formats, and the generated How2-mini."""

from .features import FeatureStore
from .how2 import How2Collator, load_how2
from .how2_mini import HOW2_MINI_DOMAINS, How2MiniClip, generate_how2_mini, how2_mini_talk, write_how2_mini

__all__ = [
    "HOW2_MINI_DOMAINS",
    "FeatureStore",
    "How2Collator",
    "How2MiniClip",
    "generate_how2_mini",
    "how2_mini_talk",
    "load_how2",
    "write_how2_mini",
]
