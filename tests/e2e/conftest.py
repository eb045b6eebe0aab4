"""The model of end-to-end tests, and one server that they share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from glimmer.deploy.demo.checkpoint import make_checkpoint
from server import RunningServer, running_server


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random checkpoint with one layer of each kind, for quick steps."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    make_checkpoint(path, num_hidden_layers=2)
    return path


@pytest.fixture(scope="session")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A running server in float32, with few pages so that the prefix cache must evict."""
    directory = tmp_path_factory.mktemp("server")
    flags = ("--data_type", "float32", "--max_total_token_num", "16384")
    with running_server(tiny_model, directory, *flags) as running:
        yield running
