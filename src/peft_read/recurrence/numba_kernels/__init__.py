"""Compiled loops for the CPU. Optional: they need numba (`pip install "peft-read[fast]"`)."""
