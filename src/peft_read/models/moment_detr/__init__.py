"""Moment-DETR: temporal grounding and highlight detection by set prediction."""

from .configuration_moment_detr import MomentDetrConfig
from .modeling_moment_detr import MomentDetrForTemporalGrounding, MomentDetrOutput
from .postprocessing_moment_detr import highlight_scores, ranked_windows

__all__ = [
    "MomentDetrConfig",
    "MomentDetrForTemporalGrounding",
    "MomentDetrOutput",
    "highlight_scores",
    "ranked_windows",
]
