"""The order of work that the planner believes Megatron's schedules have, against what their code does."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table
from megatron.core.transformer.cuda_graphs import convert_schedule_table_to_order

from r1.parallel.planner.schedule import order, schedule


@pytest.mark.parametrize(
    ("ranks", "chunks", "micro_batches"), [(2, 1, 5), (4, 2, 8), (8, 4, 16), (4, 3, 4), (8, 2, 24)]
)
def test_the_order_is_megatrons(ranks: int, chunks: int, micro_batches: int) -> None:
    table = get_schedule_table(micro_batches, chunks, ranks)
    for rank in range(ranks):
        ours = order(ranks, chunks, rank, micro_batches)
        forwards = [(m, c) for forward, m, c in ours if forward]
        assert forwards == [tuple(item) for item in table]
        # Its backwards come chunk by chunk from the last one.
        backwards = [(m, c) for forward, m, c in ours if not forward]
        assert backwards == [(m, chunks - 1 - c) for m, c in table]
        group = SimpleNamespace(size=lambda: ranks, rank=lambda at=rank: at)
        place = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None)
        warmup = get_pp_rank_microbatches(micro_batches, chunks, ranks, p2p_communicator=place)[2]
        first = min(warmup + 1, len(table))  # forwards before the first backward
        assert all(forward for forward, _, _ in ours[:first]) and not ours[first][0]
        if chunks > 1:
            signed = [c + 1 if forward else -(c + 1) for forward, _, c in ours]
            assert signed == convert_schedule_table_to_order(warmup, chunks, table)


def test_a_schedule_one_can_draw() -> None:
    """Three micro-batches on two ranks: forwards of 1, backwards of 2."""
    first, last = schedule(2, 1, 3)
    assert [(s.forward, s.micro_batch, s.start) for s in first] == [
        (True, 0, 0), (True, 1, 1), (False, 0, 4), (True, 2, 6), (False, 1, 7), (False, 2, 10),
    ]  # fmt: skip
    assert [(s.forward, s.micro_batch, s.start) for s in last] == [
        (True, 0, 1), (False, 0, 2), (True, 1, 4), (False, 1, 5), (True, 2, 7), (False, 2, 8),
    ]  # fmt: skip


@pytest.mark.parametrize(("ranks", "chunks", "micro_batches"), [(4, 1, 16), (4, 2, 16), (8, 4, 32)])
def test_the_bubble_is_the_formulas(ranks: int, chunks: int, micro_batches: int) -> None:
    """(p - 1) / v forwards and backwards of a whole rank, Megatron-LM's (arXiv 2104.04473, section 2.2)."""
    rows = schedule(ranks, chunks, micro_batches)
    end = max(slot.start + slot.length for row in rows for slot in row)
    busy = 3 * micro_batches * chunks
    assert end - busy == pytest.approx(3 * (ranks - 1), abs=1e-9)
    assert all(sum(slot.length for slot in row) == busy for row in rows)
