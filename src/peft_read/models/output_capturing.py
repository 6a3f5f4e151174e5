"""The private import by which transformers records hidden states and attentions, in one place.

Every modeling file of transformers imports `capture_outputs` and `OutputRecorder` from this private module, and no
public one exports them, from transformers 5.18 to 5.24. If they move, only this file changes.
"""

from transformers.utils.output_capturing import OutputRecorder, capture_outputs

__all__ = ["OutputRecorder", "capture_outputs"]
