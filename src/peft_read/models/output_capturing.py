"""How transformers records hidden states and attentions, through the only import that there is.

Every modeling file of transformers imports `capture_outputs` and `OutputRecorder` from this private module, and no
public one exports them, from transformers 5.18 to 5.24. A move upstream is mended here alone.
"""

from transformers.utils.output_capturing import OutputRecorder, capture_outputs

__all__ = ["OutputRecorder", "capture_outputs"]
