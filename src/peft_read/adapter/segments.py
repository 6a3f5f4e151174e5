"""Several sequences in one row: split a batch into its segments, run a recurrence over each, and put them back."""

from __future__ import annotations

import copy

import torch

__all__ = ["Segments"]


class Segments:
    """Where the tokens of a batch go when every segment of every row becomes a row of its own.

    Tokens of one row with the same id form one sequence, in their order and wherever they stand. Padding belongs to
    no sequence.

    Args:
        segment_ids: (B, T), any integers.
        mask: (B, T), True = a real token; every token is real if absent.
    """

    def __init__(self, segment_ids: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        batch, length = segment_ids.shape
        valid = torch.ones_like(segment_ids, dtype=torch.bool) if mask is None else mask
        row = torch.arange(batch, device=segment_ids.device)[:, None].expand(batch, length)
        tokens = valid.flatten().nonzero().squeeze(1)  # (N,): the real tokens, row by row
        # Numbered first, then one number for row and segment: `unique` over rows of numbers compares them one by one.
        ids, segment = torch.unique(segment_ids.flatten()[tokens], return_inverse=True)
        _, group = torch.unique(row.flatten()[tokens] * len(ids) + segment, return_inverse=True)
        order = torch.argsort(group, stable=True)
        sizes = torch.bincount(group)  # (G,)
        starts = sizes.cumsum(0) - sizes
        rank = torch.arange(len(tokens), device=group.device) - starts[group[order]]
        self.shape = (batch, length)
        self.tokens = tokens[order]  # (N,): index into the B · T tokens, segment by segment
        self.slot = (group[order], rank)  # where each goes in the (G, L) batch
        self.groups = len(sizes)
        self.longest = int(sizes.max()) if len(sizes) else 0
        self.mask = torch.zeros(self.groups, self.longest, dtype=torch.bool, device=valid.device)
        self.mask[self.slot] = True
        self._moved: dict[torch.device, Segments] = {}

    def on(self, device: torch.device) -> Segments:
        """The same for tensors on a device, moved once."""
        if self.mask.device == device:
            return self
        if device not in self._moved:
            moved = self._moved[device] = copy.copy(self)
            moved.tokens, moved.mask = self.tokens.to(device), self.mask.to(device)
            moved.slot = (self.slot[0].to(device), self.slot[1].to(device))
        return self._moved[device]

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, k) -> (G, L, k), one row a segment, filled up with zeros where `mask` is False."""
        rows = x.new_zeros(self.groups, self.longest, x.shape[-1])
        return rows.index_put(self.slot, x.flatten(0, 1)[self.tokens])

    def join(self, rows: torch.Tensor) -> torch.Tensor:
        """(G, L, k) -> (B, T, k); zero at the padding."""
        flat = rows.new_zeros(self.shape[0] * self.shape[1], rows.shape[-1])
        return flat.index_put((self.tokens,), rows[self.slot]).unflatten(0, self.shape)

    def carried(self, states: torch.Tensor) -> torch.Tensor:
        """(G, L, S) -> (B, T, S); at padding the state of the token before it in the row, zero before the first one.

        That is what a recurrence without segments gives, and what a cache goes on from.
        """
        joined = self.join(states)
        real = torch.zeros(self.shape, dtype=torch.bool, device=joined.device)
        real.view(-1)[self.tokens] = True
        places = torch.arange(self.shape[1], device=joined.device)
        latest = torch.where(real, places, 0).cummax(1).values
        return joined.gather(1, latest[..., None].expand_as(joined))
