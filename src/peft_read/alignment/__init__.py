"""Partial video-language alignment."""
