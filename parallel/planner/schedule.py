"""Megatron's 1F1B and interleaved 1F1B pipeline schedules: the order of each rank's work, and when it is done."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Slot:
    """One forward or backward of one chunk for one micro-batch; times in forwards."""

    forward: bool
    micro_batch: int
    chunk: int
    start: float
    length: float


def order(
    ranks: int, chunks: int, rank: int, micro_batches: int, combined: bool = False
) -> list[tuple[bool, int, int]]:
    """(whether forward, micro-batch, chunk) in the order of a rank's work; in the `combined` schedule, where a forward
    runs beside a backward, one more forward comes before the first."""
    total = micro_batches * chunks
    warmup = ranks - rank - 1 if chunks == 1 else 2 * (ranks - rank - 1) + (chunks - 1) * ranks
    warmup = min(total, warmup + combined)

    def item(i: int, forward: bool) -> tuple[bool, int, int]:
        if chunks == 1:
            return forward, i, 0
        group, within = divmod(i, ranks * chunks)
        chunk = within // ranks
        return forward, group * ranks + within % ranks, chunk if forward else chunks - 1 - chunk

    work = [item(i, True) for i in range(warmup)]
    for i in range(total - warmup):
        work += [item(warmup + i, True), item(i, False)]
    return work + [item(i, False) for i in range(total - warmup, total)]


def schedule(ranks: int, chunks: int, micro_batches: int, backward: float = 2.0) -> list[list[Slot]]:
    """Every rank's slots, each begun as soon as the rank is free and what it works on has come. A forward takes 1."""
    orders = [order(ranks, chunks, rank, micro_batches) for rank in range(ranks)]
    done: dict[tuple[bool, int, int], float] = {}  # (forward, micro-batch, stage) -> when
    slots: list[list[Slot]] = [[] for _ in range(ranks)]
    free, last = [0.0] * ranks, ranks * chunks - 1
    waiting = sum(map(len, orders))
    while waiting:
        before = waiting
        for rank in range(ranks):
            while len(slots[rank]) < len(orders[rank]):
                forward, micro_batch, chunk = orders[rank][len(slots[rank])]
                stage = chunk * ranks + rank
                if forward:
                    needs = [] if stage == 0 else [(True, micro_batch, stage - 1)]
                else:
                    needs = [(True, micro_batch, stage)] if stage == last else [(False, micro_batch, stage + 1)]
                if any(need not in done for need in needs):
                    break
                start = max([free[rank], *(done[need] for need in needs)])
                length = 1.0 if forward else backward
                free[rank] = done[forward, micro_batch, stage] = start + length
                slots[rank].append(Slot(forward, micro_batch, chunk, start, length))
                waiting -= 1
        if waiting == before:
            raise RuntimeError(
                f"the schedule of {ranks} x {chunks} stages and {micro_batches} micro-batches waits for itself"
            )
    return slots
