"""Triton kernels for CUDA. Optional: they need triton, which comes with torch for CUDA."""
