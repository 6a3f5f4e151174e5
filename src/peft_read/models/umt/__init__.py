"""UMT: moment retrieval and highlight detection with video, audio and text."""

from .configuration_umt import UMTConfig
from .modeling_umt import UMTForTemporalGrounding, UMTOutput

__all__ = ["UMTConfig", "UMTForTemporalGrounding", "UMTOutput"]
