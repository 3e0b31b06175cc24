"""Pages of a cache: which are free, and which sequences hold which."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SCRATCH = 0  # the page that rows without a sequence write to, before they read it


class Pages:
    """`count` pages of `size` tokens, of which the first is never given out. A page may have several holders, and is
    free again when the last one lets go."""

    def __init__(self, count: int, size: int) -> None:
        self.size = size
        self.holders = [1] + [0] * (count - 1)
        self.free = list(range(count - 1, SCRATCH, -1))  # the last is given out next

    @property
    def total(self) -> int:
        return len(self.holders) - 1

    @property
    def used(self) -> int:
        return self.total - len(self.free)

    def for_tokens(self, length: int) -> int:
        """How many pages hold so many tokens."""
        return -(-length // self.size)

    def take(self, count: int) -> list[int]:
        """Free pages, for one holder. Raises MemoryError, and gives none, where there are not so many."""
        if count > len(self.free):
            raise MemoryError(f"{len(self.free)} of the cache's {self.total} pages are free, wanted {count}")
        taken = [self.free.pop() for _ in range(count)]
        for page in taken:
            self.holders[page] = 1
        return taken

    def share(self, pages: Sequence[int]) -> list[int]:
        """The pages, for one more holder. Raises ValueError for a page that nobody holds."""
        self._check(pages)
        for page in pages:
            self.holders[page] += 1
        return list(pages)

    def release(self, pages: Sequence[int]) -> None:
        """One holder fewer. Raises ValueError for a page that nobody holds."""
        self._check(pages)
        for page in pages:
            self.holders[page] -= 1
            if not self.holders[page]:
                self.free.append(page)

    def fork(self, pages: Sequence[int], whole: int) -> tuple[list[int], list[tuple[int, int]]]:
        """(pages of a second sequence, (from, to) of those to copy): it shares the first `whole` pages of the first
        one, which nobody may write to any more, and has copies of the others. MemoryError as `take`."""
        own = self.take(len(pages) - whole)
        return self.share(pages[:whole]) + own, list(zip(pages[whole:], own))

    def _check(self, pages: Sequence[int]) -> None:
        for page in pages:
            if not SCRATCH < page < len(self.holders) or not self.holders[page]:
                raise ValueError(f"page is {page}, wanted one that is held")


class BlockTable:
    """The pages of the sequences that advance together, a row each, `width` at most; the scratch page elsewhere."""

    def __init__(self, width: int) -> None:
        self.rows = np.full((0, width), SCRATCH, dtype=np.int32)

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, held: Sequence[Sequence[int]]) -> None:
        """One more row for each of these lists of pages."""
        more = np.full((len(held), self.rows.shape[1]), SCRATCH, dtype=np.int32)
        for row, pages in zip(more, held, strict=True):
            row[: len(pages)] = pages
        self.rows = np.concatenate([self.rows, more])

    def keep(self, rows: Sequence[int]) -> None:
        """These rows only, in this order."""
        self.rows = self.rows[np.asarray(rows, dtype=np.int64)]
