"""Worlds shared by all tests of a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.parallel.spawn import ProcessPool


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, ProcessPool]]:
    """{2: two processes, 4: four processes}; each starts when it is first used, and ends with the file: its process
    groups have threads that wake a hundred times a second, and took half of the machine from the tests after it."""
    worlds = {size: ProcessPool(size) for size in (2, 4)}
    yield worlds
    for world in worlds.values():
        world.kill()
