"""One server that end-to-end tests share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from server import RunningServer, running_server


@pytest.fixture(scope="session")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A running server in float32, with few pages so that the prefix cache must evict."""
    directory = tmp_path_factory.mktemp("server")
    flags = ("--data_type", "float32", "--max_total_token_num", "16384")
    with running_server(tiny_model, directory, *flags) as running:
        yield running
