"""READ-PVLA for Hugging Face peft: recurrent adapters over tokens, and partial video-language alignment.

Importing this package registers `PeftType.READ`, `BOTTLENECK`, `COMPACTER` and `HYPERFORMER` with peft, and the
project's backbones with transformers' Auto classes. Not to be confused with "READ: Recurrent Adaptation of Large
Transformers" (arXiv 2305.15348), a side network that is recurrent over layers.
"""

from .versions import warn_outside_windows

warn_outside_windows()  # before the imports that an older library would fail

from . import bottleneck, models
from .adapter import READConfig, READModel, sequence_scope
from .alignment import Aligner, PVLAConfig, PVLALoss, PVLALossMixin, Stream
from .backends import show_backends, use_backend
from .bottleneck import BottleneckConfig, CompacterConfig, HyperformerConfig
from .tasks import set_task
from .transport import TransportPlan, partial_optimal_transport

__version__ = "0.2.0"

__all__ = [
    "Aligner",
    "BottleneckConfig",
    "CompacterConfig",
    "HyperformerConfig",
    "PVLAConfig",
    "PVLALoss",
    "PVLALossMixin",
    "READConfig",
    "READModel",
    "Stream",
    "TransportPlan",
    "bottleneck",
    "models",
    "partial_optimal_transport",
    "sequence_scope",
    "set_task",
    "show_backends",
    "use_backend",
]
