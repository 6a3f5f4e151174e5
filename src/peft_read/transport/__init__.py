"""Partial optimal transport, batched and masked."""
