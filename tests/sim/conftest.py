"""Options of the simulation: `pytest tests/sim --seeds 20000 --first-seed 1000`."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for its modules

DEFAULT_SEEDS = 190  # 160,000 events, and as many in test_server.py


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seeds", type=int, default=DEFAULT_SEEDS, help="how many worlds to simulate")
    parser.addoption("--first-seed", type=int, default=0, help="the first of them")


@pytest.fixture
def seeds(pytestconfig: pytest.Config) -> range:
    """The seeds to run. The options exist only when tests/sim is named on the command line."""
    first = pytestconfig.getoption("--first-seed", 0)
    return range(first, first + pytestconfig.getoption("--seeds", DEFAULT_SEEDS))
