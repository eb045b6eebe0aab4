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
    parser.addoption(
        "--parity-prompts", type=int, default=6, help="prompts in tests/e2e/test_exactness.py"
    )
    parser.addoption(
        "--update-trace", action="store_true", help="write docs/tracing-a-request.md anew"
    )
