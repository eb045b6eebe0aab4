"""The simulation finds bugs: each mutant of the production code dies within a few seeds."""

import pytest
import world
from mutants import MUTANTS

MAX_SEEDS = 150


@pytest.mark.parametrize("name", MUTANTS)
def test_the_mutant_is_found_that(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[name](monkeypatch.setattr)
    for seed in range(MAX_SEEDS):
        try:
            world.run(seed)
        except world.Violation:
            return
    pytest.fail(f"{MAX_SEEDS} worlds did not notice that the scheduler {name}")
