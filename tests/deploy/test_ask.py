"""`glimmer ask` against a server made of fake processes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from glimmer.deploy.cli import main

Serve = Callable[..., Any]  # the fixture in conftest.py


def test_the_answer_is_printed(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    url = serve().ready_line().split()[3]
    assert main(["ask", url, "--question", "Who?"]) == 0
    assert capsys.readouterr().out == "\n> Who?\na fake answer\n"


def test_no_answer_is_a_failure(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = serve("--model_owner", "rude-frontend").ready_line().split()[3]
    assert main(["ask", url]) == 1
    assert "HTTP 503" in capsys.readouterr().err
    for words, code, message in (
        (["http://127.0.0.1:1"], 1, "no answer"),
        (["localhost:8000"], 2, "not a URL such as http://localhost:8000"),
        ([url, "--key_file", str(tmp_path / "none")], 1, "none"),
    ):
        assert main(["ask", *words]) == code
        assert message in capsys.readouterr().err
