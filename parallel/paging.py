"""Pages of a cache: which are free, and which sequences hold which."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SCRATCH = 0  # the page that rows without a sequence write to, before they read it


class Pages:
    """`count` pages, of which the first is never given out. A page may have several holders, and is free again when
    the last one lets go."""

    def __init__(self, count: int) -> None:
        self.holders = [1] + [0] * (count - 1)
        self.free = list(range(count - 1, SCRATCH, -1))  # the last is given out next

    def take(self) -> int:
        """A free page, for one holder. Raises MemoryError where there is none."""
        if not self.free:
            raise MemoryError(f"none of the cache's {len(self.holders) - 1} pages is free")
        page = self.free.pop()
        self.holders[page] = 1
        return page

    def share(self, page: int) -> int:
        """The page, for one more holder. Raises ValueError for a page that nobody holds."""
        self._check(page)
        self.holders[page] += 1
        return page

    def release(self, page: int) -> None:
        """One holder fewer. Raises ValueError for a page that nobody holds."""
        self._check(page)
        self.holders[page] -= 1
        if not self.holders[page]:
            self.free.append(page)

    def _check(self, page: int) -> None:
        if not SCRATCH < page < len(self.holders) or not self.holders[page]:
            raise ValueError(f"page is {page}, wanted one that is held")


class PagedSequences:
    """The pages of sequences that grow by one token at a time, with the first pages of a prompt shared by its copies.

    A sequence whose `copies` were made of one prompt shares the pages that the prompt fills; the page that it fills in
    part, if any, is each one's own: `copied` lists (from, to) for the cache to copy once the prompts are in it.
    """

    def __init__(self, prompt_lengths: Sequence[int], copies: int, max_length: int, page_size: int) -> None:
        self.page_size = page_size
        self.room = -(-max_length // page_size)  # pages of a sequence
        whole = sum(length // page_size for length in prompt_lengths)
        own = sum(self.room - length // page_size for length in prompt_lengths)
        self.pages = Pages(1 + whole + copies * own)
        self.lengths: list[int] = []
        self.held: list[list[int]] = []
        self.copied: list[tuple[int, int]] = []
        for length in prompt_lengths:
            prompt = [self.pages.take() for _ in range(-(-length // page_size))]
            shared = prompt[: length // page_size]
            for copy in range(copies):
                if copy == 0:
                    held = list(prompt)
                else:
                    held = [self.pages.share(page) for page in shared]
                    if len(prompt) > len(shared):
                        held.append(self.pages.take())
                        self.copied.append((prompt[-1], held[-1]))
                self.held.append(held)
                self.lengths.append(length)

    def append(self) -> bool:
        """Room for one more token in every sequence, in the last place where it is full; whether a table changed."""
        changed = False
        for row, length in enumerate(self.lengths):
            if length == len(self.held[row]) * self.page_size and len(self.held[row]) < self.room:
                self.held[row].append(self.pages.take())
                changed = True
            self.lengths[row] = length + 1
        return changed

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these sequences, in this order; the others' pages are free."""
        for row in set(range(len(self.held))).difference(rows):
            for page in self.held[row]:
                self.pages.release(page)
        self.held = [self.held[row] for row in rows]
        self.lengths = [self.lengths[row] for row in rows]

    def table(self, rows: int, device: torch.device) -> Tensor:
        """Block table (rows, room) int32: the sequences', then rows that write to the scratch page."""
        filled = [held + [SCRATCH] * (self.room - len(held)) for held in self.held]
        filled += [[SCRATCH] * self.room] * (rows - len(filled))
        return torch.tensor(filled, dtype=torch.int32).view(rows, self.room).to(device)
