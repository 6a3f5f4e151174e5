"""VL-T5: T5 that reads visual tokens after the text."""

from .configuration_vl_t5 import VLT5Config
from .modeling_vl_t5 import VLT5ForConditionalGeneration

__all__ = ["VLT5Config", "VLT5ForConditionalGeneration"]
