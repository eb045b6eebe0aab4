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
