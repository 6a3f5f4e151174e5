"""Compiled loops for the CPU. Optional: they need numba (the extra `fast`)."""
