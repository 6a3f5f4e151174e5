"""VG-BART: video-guided BART for multimodal summarisation."""

from .configuration_vg_bart import VGBartConfig
from .modeling_vg_bart import VGBartForConditionalGeneration, VGBartModel

__all__ = ["VGBartConfig", "VGBartForConditionalGeneration", "VGBartModel"]
