"""The way of one chat through the code stays short enough to read. Figures: `measure.py`."""

from pathlib import Path

import pytest
from measure import print_path, trace

ROOT = Path(__file__).parent.parent
MAX_FILES = 60  # 57 to 59, by what timers do meanwhile
# Over 120 of them bound what a client may make the server hold (`wire/connection.py`).
# Over 20 more notice a process that does not read its messages, and a step that hangs.
# Over 100 more take what clients of many kinds send: compressed bodies, halves of characters,
# fields without effect, histories of other servers. Others measure times for metrics and traces.
MAX_LINES = 3400


def test_one_streamed_chat_executes_little_code(capsys: pytest.CaptureFixture[str]) -> None:
    path = trace(ROOT).path
    lines = sum(file.lines for file in path)
    with capsys.disabled():
        print()
        print_path(path)
    assert len(path) <= MAX_FILES
    assert lines <= MAX_LINES
