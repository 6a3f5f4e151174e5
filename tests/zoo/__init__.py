"""Tiny random models of the families of transformers, and what READ must hold on each of them."""
