"""Nobody waits for stderr: not while it is a pipe that nobody reads, nor on a full disk."""

import fcntl
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from glimmer.shared.log import LossyText

# Logs COUNT lines, then waits for its stdin to close and logs one more.
PROCESS = """
import logging, sys
from glimmer.shared.log import dropped_lines, lossy_stderr, setup_logging
with lossy_stderr():
    setup_logging("me", "info")
    for number in range(int(sys.argv[1])):
        logging.info("line %d %s", number, "x" * 200)
    print(dropped_lines(), flush=True)
    sys.stdin.readline()
    logging.info("the end")
"""


def start(count: int, stderr: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", PROCESS, str(count)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
    )


def test_a_stderr_that_nobody_reads_costs_lines_and_no_time() -> None:
    read_fd, write_fd = os.pipe()
    with start(5000, write_fd) as process:
        os.close(write_fd)
        assert process.stdout is not None
        dropped = int(process.stdout.readline())  # it has logged all and was not held up
        assert 1000 < dropped < 5000
        assert process.stdin is not None
        process.stdin.close()
        with open(read_fd) as stderr:  # it heals
            lines = stderr.read().splitlines()
    reports = [line for line in lines if "log lines were dropped" in line]
    num_reported = sum(int(re.findall(r"(\d+) log lines", line)[0]) for line in reports)
    assert num_reported >= dropped
    assert len(lines) - len(reports) + num_reported == 5001


def test_a_full_disk_is_counted_too() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    with start(10, full) as process:
        process.communicate("\n", timeout=60)
    os.close(full)
    assert process.returncode == 0


def test_a_process_that_ends_has_written_all_its_lines(tmp_path: Path) -> None:
    log = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    with start(500, log) as process:
        process.communicate("\n", timeout=60)
    os.close(log)
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == 501
    assert lines[-1].endswith("the end")


@pytest.mark.parametrize("size", [10, 10_000])
def test_a_line_is_taken_at_once_or_dropped(size: int) -> None:
    read_fd, write_fd = os.pipe()
    fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(write_fd, False)
    stream = LossyText(write_fd)
    count = 4096 // size + 3
    begun = time.monotonic()
    for _ in range(count):
        stream.write("x" * (size - 1) + "\n")
    assert time.monotonic() - begun < 5
    assert stream.dropped >= 3
    os.read(read_fd, 1 << 16)
    dropped = stream.dropped
    stream.write("again\n")
    text = os.read(read_fd, 1 << 16).decode()
    assert f"{dropped} log lines were dropped" in text
    assert text.endswith("again\n")
    assert stream.dropped == dropped
    os.close(read_fd)
    stream.write("nobody\n")  # a reader that is gone
    assert stream.dropped == dropped + 1
    os.close(write_fd)
