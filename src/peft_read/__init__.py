"""READ-PVLA for Hugging Face peft: recurrent adapters over tokens, and partial video-language alignment.

Importing this package registers `PeftType.READ` with peft and the project's backbones with transformers' Auto
classes. Not to be confused with "READ: Recurrent Adaptation of Large Transformers" (arXiv 2305.15348), a side network
that is recurrent over layers.
"""

__version__ = "0.1.0"
