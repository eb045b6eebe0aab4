"""The three forms of a log line."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from glimmer.shared.config import stderr_is_journal
from glimmer.shared.log_format import make_formatter, request_fields


def record(level: int, text: str, *args: object, **more: object) -> logging.LogRecord:
    made = logging.LogRecord("glimmer", level, "/x/loop.py", 7, text, args, None)
    vars(made).update(more)
    return made


def test_text_has_the_fields_of_the_request_once() -> None:
    form = make_formatter("frontend-0", "text").format
    assert form(record(logging.INFO, "a %s", "b")).endswith("[frontend-0 loop.py:7] a b")
    token = request_fields.set({"request_id": "r1", "key": "ann"})
    assert form(record(logging.INFO, "X-Request-Id:r1")).endswith("X-Request-Id:r1 key=ann")
    assert form(record(logging.INFO, "slow")).endswith("slow request_id=r1 key=ann")
    request_fields.reset(token)


def test_json_is_one_object_with_all_fields() -> None:
    form = make_formatter("worker-1", "json").format
    token = request_fields.set({"request_id": "r1"})
    try:
        raise ValueError("two\nlines")
    except ValueError:
        line = record(logging.ERROR, "it\n%s", "broke", exc_info=sys.exc_info())
    text = form(line)
    request_fields.reset(token)
    assert "\n" not in text
    found = json.loads(text)
    assert found["message"] == "it\nbroke"
    assert (found["level"], found["process"], found["request_id"]) == ("error", "worker-1", "r1")
    assert found["exception"].endswith("ValueError: two\nlines")
    assert found["time"].endswith("+00:00")


def test_fields_replace_the_text_in_json_alone() -> None:
    line = record(logging.INFO, "as LightLLM says it", fields={"message": "ended", "status": 200})
    found = json.loads(make_formatter("frontend-0", "json").format(line))
    assert (found["message"], found["status"]) == ("ended", 200)
    assert "as LightLLM says it" in make_formatter("frontend-0", "text").format(line)


def test_the_journal_gets_a_priority_on_each_line_and_no_time() -> None:
    form = make_formatter("launcher", "journal").format
    assert form(record(logging.WARNING, "a\nb")) == "<4>WARNING [launcher loop.py:7] a\n<4>b"
    assert form(record(logging.ERROR, "c")).startswith("<3>ERROR")


def test_the_journal_is_recognized_by_its_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", "1:2")
    assert not stderr_is_journal()
    stderr = os.fstat(2)
    monkeypatch.setenv("JOURNAL_STREAM", f"{stderr.st_dev}:{stderr.st_ino}")
    assert stderr_is_journal()


def run_serve(stderr_file: Path, *flags: str, **more: str) -> str:
    """The stderr of a start that fails."""
    command = [sys.executable, "-m", "glimmer", "serve", "--model_dir", "/nowhere", *flags]
    with stderr_file.open("wb") as stderr:
        done = subprocess.run(command, stderr=stderr, env={**os.environ, **more}, check=False)
    assert done.returncode == 4
    return stderr_file.read_text()


def test_errors_of_a_start_have_the_form_of_the_log(tmp_path: Path) -> None:
    file = tmp_path / "log"
    lines = run_serve(file, "--log_format", "json").splitlines()
    assert "/nowhere" in json.loads(lines[-1])["message"]
    assert run_serve(file).startswith("glimmer: ")
