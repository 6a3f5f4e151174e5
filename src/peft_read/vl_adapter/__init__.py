"""VL-Adapter: models of its published implementation."""

from .original import load_original

__all__ = ["load_original"]
