"""Training attention in the order of decoding, for exact numerics in Triton: the packed keys are copied into pages, and
every query is decoded for itself."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from r1.kernels.exact import PAGE

WORKSPACE = 2**28  # numbers of float32 for the splits of the queries that are decoded at a time


class Paged(NamedTuple):
    """A packed stream of S keys as pages: the slot of each key among `pages` x PAGE, and for each of T queries the
    pages of its sequence and how many keys it sees, 0 for a query of no sequence."""

    slot_S: Tensor
    pages: int
    table_TM: Tensor
    lens_T: Tensor

    def cache(self, x_SMD: Tensor) -> Tensor:
        """(pages, PAGE, M, D); slots that no key has hold anything."""
        slots = x_SMD.new_empty(self.pages * PAGE, *x_SMD.shape[1:])
        return slots.index_copy_(0, self.slot_S, x_SMD).unflatten(0, (self.pages, PAGE))


def paged(cu_seqlens: Tensor, S: int, max_seqlen: int, index_T: Tensor) -> Paged:
    """Nothing here waits for the device. The table has max_seqlen / PAGE numbers of int32 a query."""
    bounds = cu_seqlens.long()
    sequences = len(bounds) - 1
    pages = (bounds.diff() + (PAGE - 1)) // PAGE
    first = pages.cumsum(0) - pages

    def place(row: Tensor) -> tuple[Tensor, Tensor]:
        """(first page of the row's sequence, the row's place in it)."""
        sequence = (torch.searchsorted(bounds, row, right=True) - 1).clamp(0, max(sequences - 1, 0))
        return first[sequence], row - bounds[sequence]

    key_page, key_place = place(torch.arange(S, device=bounds.device))
    page, own_place = place(index_T.long())
    lens = torch.where((index_T >= 0) & (index_T < S), own_place + 1, 0)
    table = page.int()[:, None] + torch.arange(-(-max_seqlen // PAGE), dtype=torch.int32, device=bounds.device)
    room = (S + min(sequences, S) * (PAGE - 1)) // PAGE
    return Paged(key_page * PAGE + key_place, room, table, lens.int())


def in_pages(cache: Tensor, block_table_BM: Tensor) -> tuple[Tensor, Tensor]:
    """A paged cache and its table with pages of PAGE rows, without copying.

    Raises ValueError where a page's rows are no multiple of PAGE.
    """
    size = cache.shape[1]
    if size % PAGE:
        raise ValueError(f"a page has {size} rows, wanted a multiple of {PAGE} with exact numerics")
    parts = size // PAGE
    if parts == 1:
        return cache, block_table_BM
    table = block_table_BM[:, :, None] * parts + torch.arange(parts, device=block_table_BM.device)
    return cache.unflatten(1, (parts, PAGE)).flatten(0, 1), table.flatten(1)
