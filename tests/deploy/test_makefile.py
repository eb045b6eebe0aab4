"""`make` installs into .venv, where a stub of Python notes what it is asked to install."""

import http.server
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[2] / "Makefile"
REST = "--constraint constraints.txt --editable .[dev]\n"
PAGE = b'<a href="/whl/cpu/torch-2.13.0%2Bcpu-cp311-cp311-manylinux_2_28_x86_64.whl">torch</a>'


class Index(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = PAGE if self.path == "/cpu/torch/" else b"<title>Welcome to the hotel</title>"
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def index() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def set_up(path: Path, index: str, nvidia_smi: str) -> str:
    """Runs `make .venv/installed` in `path`; returns its output."""
    shutil.copy(MAKEFILE, path)
    (path / "pyproject.toml").touch()
    (path / "constraints.txt").touch()
    script(path / ".venv/bin/python", 'echo "$@" >> asked')
    script(path / "bin/nvidia-smi", nvidia_smi)
    words = ["make", ".venv/installed", f"PYTHON={sys.executable}", f"CPU_TORCH={index}"]
    environment = os.environ | {"PATH": f"{path / 'bin'}:{os.environ['PATH']}"}
    environment.pop("MAKEFLAGS", None)
    done = subprocess.run(
        words, cwd=path, env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert (path / ".venv/src/glimmer").resolve() == path
    return done.stdout


@pytest.mark.parametrize(
    ("route", "nvidia_smi", "asks_index"),
    [
        ("/cpu", "exit 9", True),
        ("/cpu", "exit 0", False),  # a GPU is there
        ("/portal", "exit 9", False),  # something else answers
    ],
)
def test_a_cpu_build_of_torch_is_looked_for_where_no_gpu_is(
    tmp_path: Path, index: str, route: str, nvidia_smi: str, asks_index: bool
) -> None:
    output = set_up(tmp_path, index + route, nvidia_smi)
    extra = f"--extra-index-url {index}{route} " if asks_index else ""
    assert (tmp_path / "asked").read_text() == f"-m pip install {extra}{REST}"
    assert "the first time this downloads about" in output.lower()


@pytest.mark.parametrize("url", ["", "http://127.0.0.1:1", "http://no-such-host.invalid"])
def test_without_that_index_the_configured_one_is_enough(tmp_path: Path, url: str) -> None:
    set_up(tmp_path, url, "exit 9")
    assert (tmp_path / "asked").read_text() == f"-m pip install {REST}"
