"""One library for all tests of grammars."""

import pytest
from grammars import Walk, make_walk


@pytest.fixture(scope="session")
def walk() -> Walk:
    return make_walk()
