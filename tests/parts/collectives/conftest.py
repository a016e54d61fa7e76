"""One pool of processes for each world size, kept for the whole run."""

import pytest
from tests.parts.collectives.ranks import Ranks


@pytest.fixture(scope="session")
def pools():
    made = {}

    def pool(size: int) -> Ranks:
        if size not in made or made[size].broken:  # one failure must not fail what comes after it
            made[size] = Ranks(size)
        return made[size]

    yield pool
    for ranks in made.values():
        ranks.close()
