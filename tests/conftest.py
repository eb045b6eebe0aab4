"""Fixtures that all tests share."""

from pathlib import Path

import pytest
from glimmer.deploy.demo.checkpoint import make_checkpoint


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny random checkpoint in the real layout."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    make_checkpoint(path)
    return path


def pytest_addoption(parser: pytest.Parser) -> None:
    """Sizes of the long runs."""
    parser.addoption("--soak", type=int, default=150, help="requests in tests/e2e/test_soak.py")
