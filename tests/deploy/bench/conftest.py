"""Fixtures of the benchmarks' tests."""

import threading
from collections.abc import Iterator

import pytest
from scripted_server import RunningServer


@pytest.fixture
def scripted() -> Iterator[RunningServer]:
    """A scripted server, running."""
    server, ready = RunningServer(), threading.Event()
    thread = threading.Thread(target=server.run, args=(ready,))
    thread.start()
    assert ready.wait(10)
    yield server
    server.stop()
    thread.join(10)
    assert not thread.is_alive()
