"""VG-T5: video-guided T5 for multimodal summarisation."""

from .configuration_vg_t5 import VGT5Config
from .modeling_vg_t5 import VGT5ForConditionalGeneration

__all__ = ["VGT5Config", "VGT5ForConditionalGeneration"]
