"""Worlds shared by all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.parallel.spawn import ProcessPool


@pytest.fixture(scope="session")
def pools() -> Iterator[dict[int, ProcessPool]]:
    """{2: two processes, 4: four processes}; each starts when it is first used."""
    worlds = {size: ProcessPool(size) for size in (2, 4)}
    yield worlds
    for world in worlds.values():
        world.kill()
