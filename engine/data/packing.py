"""Variable-length sequences into micro-batches: balanced over replicas, equal in number on each of them.

As DeepSeek trains R1: sort by length over the whole data-parallel world, fill chunks of a fixed number of tokens, give
every replica as many chunks.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def pack_indices(lengths: Sequence[int], tokens_per_micro_batch: int, replicas: int) -> list[list[list[int]]]:
    """Which sequences go into which micro-batch of which replica: [replica][micro-batch] → indices, ascending.

    Longest first, each into the micro-batch that holds the fewest tokens. No micro-batch exceeds
    `tokens_per_micro_batch` unless one sequence alone does; some may be empty where sequences are few.
    """
    if tokens_per_micro_batch < 1 or replicas < 1:
        raise ValueError(
            f"tokens_per_micro_batch = {tokens_per_micro_batch} and replicas = {replicas} must be positive"
        )
    if any(n < 1 for n in lengths):
        raise ValueError(f"lengths hold {min(lengths)}; every sequence needs at least one token")
    capacity = max([tokens_per_micro_batch, *lengths])
    rounds = max(1, -(-sum(lengths) // (capacity * replicas)))
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    while True:
        packed = _balance(order, lengths, capacity, replicas * rounds)
        if packed is not None:
            break
        rounds += 1
    # Fullest with emptiest, so that replicas are even as well as micro-batches.
    by_load = sorted(packed, key=lambda part: -sum(lengths[i] for i in part))
    result: list[list[list[int]]] = [[] for _ in range(replicas)]
    for index, part in enumerate(by_load):
        lap, place = divmod(index, replicas)
        result[place if lap % 2 == 0 else replicas - 1 - place].append(sorted(part))
    return result


def _balance(order: list[int], lengths: Sequence[int], capacity: int, bins: int) -> list[list[int]] | None:
    heap = [(0, b) for b in range(bins)]
    parts: list[list[int]] = [[] for _ in range(bins)]
    for i in order:
        load, b = heapq.heappop(heap)
        if load + lengths[i] > capacity:
            return None
        parts[b].append(i)
        heapq.heappush(heap, (load + lengths[i], b))
    return parts
