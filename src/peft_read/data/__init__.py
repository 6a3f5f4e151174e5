"""Readers of published dataset formats."""
