"""Pages of a cache: random orders of taking, sharing and releasing lose none and give none out twice."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1.parallel.paging import SCRATCH, BlockTable, Pages


@settings(max_examples=1000, deadline=None)
@given(st.data())
def test_pages_are_free_or_held(data: st.DataObject) -> None:
    """Against a list of holders, each with its pages."""
    count = data.draw(st.integers(1, 12))
    pages, holders = Pages(count, data.draw(st.integers(1, 5))), []
    for _ in range(data.draw(st.integers(0, 40))):
        action = data.draw(st.sampled_from(["take", "fork", "release"]))
        held = {page for holder in holders for page in holder}
        if action == "take":
            wanted = data.draw(st.integers(0, count))
            if wanted > count - 1 - len(held):
                with pytest.raises(MemoryError, match=f"of the cache's {count - 1} pages are free, wanted {wanted}"):
                    pages.take(wanted)
            else:
                taken = pages.take(wanted)
                assert len(set(taken)) == wanted and not held & set(taken), "a page was given out twice"
                holders.append(taken)
        elif holders:
            holder = data.draw(st.sampled_from(holders))
            if action == "release":
                pages.release(holder)
                holders.remove(holder)
            else:
                whole = data.draw(st.integers(0, len(holder)))
                if len(holder) - whole > count - 1 - len(held):
                    with pytest.raises(MemoryError):
                        pages.fork(holder, whole)
                else:
                    forked, copied = pages.fork(holder, whole)
                    own = forked[whole:]
                    assert forked[:whole] == holder[:whole] and not held & set(own)
                    assert copied == list(zip(holder[whole:], own, strict=True))
                    holders.append(forked)
        held = {page for holder in holders for page in holder}
        assert sorted(pages.free + sorted(held)) == list(range(1, count)), "a page was lost"
        assert pages.used == len(held) and pages.total == count - 1
    for page in [SCRATCH, -1, count, *pages.free]:
        for act in (pages.share, pages.release):
            with pytest.raises(ValueError, match=f"page is {page}, wanted one that is held"):
                act([page])


def test_tokens_fill_pages() -> None:
    assert [Pages(2, 4).for_tokens(n) for n in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 2, 2, 3]


def test_block_table_rows() -> None:
    table = BlockTable(3)
    table.add([[5], [1, 2, 3]])
    table.add([[7, 8]])
    assert table.rows.tolist() == [[5, SCRATCH, SCRATCH], [1, 2, 3], [7, 8, SCRATCH]] and len(table) == 3
    table.keep([2, 0])
    assert table.rows.tolist() == [[7, 8, SCRATCH], [5, SCRATCH, SCRATCH]]
    table.keep([])
    table.add([[1]])
    assert table.rows.tolist() == [[1, SCRATCH, SCRATCH]]
