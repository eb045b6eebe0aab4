"""One library for all tests of grammars."""

import pytest
from schemas import Walks, make_walks


@pytest.fixture(scope="session")
def walks() -> Walks:
    return make_walks()
