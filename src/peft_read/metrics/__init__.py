"""Evaluation metrics as plain functions."""
