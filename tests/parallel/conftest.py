"""Worlds shared by all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from r1.parallel.world import leave
from tests.parallel.spawn import ProcessPool


@pytest.fixture(scope="session")
def pools() -> Iterator[dict[int, ProcessPool]]:
    """{2: two processes, 4: four processes}; each starts when it is first used."""
    worlds = {size: ProcessPool(size) for size in (2, 4)}
    yield worlds
    for world in worlds.values():
        world.kill()


@pytest.fixture(autouse=True, scope="module")
def quiet(pools: dict[int, ProcessPool]) -> Iterator[None]:
    """After a file its process groups end: each has threads that wake a hundred times a second, and all worlds together
    took half of the machine from the tests after them."""
    yield
    for pool in pools.values():
        if pool.processes:
            pool.run(leave)
