"""VL-BART: BART that reads visual tokens after the text."""

from .configuration_vl_bart import VLBartConfig
from .modeling_vl_bart import VLBartForConditionalGeneration, VLBartModel

__all__ = ["VLBartConfig", "VLBartForConditionalGeneration", "VLBartModel"]
