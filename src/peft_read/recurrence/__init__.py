"""Recurrences for adapters: sequences in, sequences out."""
