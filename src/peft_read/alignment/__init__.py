"""Partial video-language alignment: a partial-optimal-transport loss between video and language states."""

from .aligner import Aligner, PVLAConfig
from .loss import DISTANCES, AlignmentDistance, PVLALoss, alignment_distance
from .recorder import AlignedBlock, Recording
from .streams import PRESETS, Stream, preset_streams
from .trainer import PVLALossMixin, last_whole_checkpoint

__all__ = [
    "DISTANCES",
    "PRESETS",
    "AlignedBlock",
    "Aligner",
    "AlignmentDistance",
    "PVLAConfig",
    "PVLALoss",
    "PVLALossMixin",
    "Recording",
    "Stream",
    "alignment_distance",
    "last_whole_checkpoint",
    "preset_streams",
]
