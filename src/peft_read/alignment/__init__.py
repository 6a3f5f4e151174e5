"""Partial video-language alignment: a partial-optimal-transport loss between video and language states."""

from .aligner import Aligner, PVLAConfig
from .checkpoints import last_whole_checkpoint, seal_checkpoint
from .loss import DISTANCES, AlignmentDistance, PVLALoss, alignment_distance
from .presets import PRESETS, preset_streams
from .recorder import AlignedBlock, Recording
from .streams import Stream
from .trainer import PVLALossMixin

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
    "seal_checkpoint",
]
