"""Starts `glimmer serve` as a user would and looks at it from outside; for end-to-end tests."""

import contextlib
import json
import math
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

START_TIMEOUT_S = 90.0


@dataclass
class RunningServer:
    """One server under test."""

    launcher: subprocess.Popen[bytes]
    port: int
    runtime_dir: Path
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def processes(self) -> dict[str, int]:
        """Name such as "worker-0" -> process id, from the children's command lines."""
        found = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.launcher.pid).children():
                with contextlib.suppress(psutil.Error):
                    found[_role(child.cmdline())] = child.pid
        return found

    def get(self, path: str, timeout_s: float = 10.0) -> tuple[int, str]:
        """Status and body; status 0 when the connection fails."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=timeout_s) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def post(self, path: str, body: Any, timeout_s: float = 60.0) -> tuple[int, Any]:
        data = json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as reply:
                return reply.status, json.loads(reply.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read())

    def generate(self, prompt: list[int] | str, **parameters: Any) -> dict[str, Any]:
        """/generate, which must succeed."""
        parameters = {"return_details": True, **parameters}
        status, reply = self.post("/generate", {"inputs": prompt, "parameters": parameters})
        assert status == 200, reply
        assert isinstance(reply, dict)
        return reply

    def token_ids(self, prompt: list[int] | str, **parameters: Any) -> list[int]:
        """Ids that /generate produced."""
        reply = self.generate(prompt, **parameters)
        return [token["id"] for token in reply["tokens"]]

    def metric(self, name: str, **labels: str) -> float:
        """Current value of one sample on /metrics; not a number while it is not there."""
        for line in self.get("/metrics")[1].splitlines():
            match = re.fullmatch(rf"{re.escape(name)}(?:{{(.*)}})? (\S+)", line)
            if match and all(f'{k}="{v}"' in (match[1] or "") for k, v in labels.items()):
                return float(match[2])
        return math.nan

    def is_ready(self) -> bool:
        return self.get("/readiness", 2.0)[0] == 200


def reachable(server: RunningServer) -> tuple[set[int], list[str]]:
    """What other users can reach of a server's processes: TCP and UDP ports, and names of abstract
    Unix sockets, which have no file permissions."""
    launcher = psutil.Process(server.launcher.pid)
    inodes = set()
    for process in (launcher, *launcher.children(recursive=True)):
        for link in Path(f"/proc/{process.pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                inodes.add(str(link.readlink()).removeprefix("socket:[").removesuffix("]"))
    ports = set()
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[9] in inodes:
                ports.add(int(fields[1].rpartition(":")[2], 16))
    rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    return ports, [row[7] for row in rows if len(row) > 7 and row[6] in inodes and row[7][0] == "@"]


def _role(command: list[str]) -> str:
    module = next((a for a in command if a.startswith("glimmer.")), "other")
    role = {"workers": "worker"}.get(module.split(".")[-1], module.split(".")[-1])
    index = command[command.index("--index") + 1] if "--index" in command else "0"
    return f"{role}-{index}"


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Poll; fails with `what` after the timeout."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.05)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running_server(
    model_dir: Path,
    directory: Path,
    *flags: str,
    port: int | None = None,
    output: int | None = None,
    wrapper: tuple[str, ...] = (),
) -> Iterator[RunningServer]:
    """Serve `model_dir` on a free port; on the way out stops it and checks that nothing is left.
    `output` is the file descriptor for its output, by default a log file. `wrapper` is a command
    before it."""
    directory.mkdir(parents=True, exist_ok=True)
    port, runtime_dir, log = port or free_port(), directory / "run", directory / "server.log"
    command = [sys.executable, "-m", "glimmer", "serve", "--model_dir", str(model_dir)]
    command += ["--device", "cpu", "--port", str(port), "--runtime_dir", str(runtime_dir), *flags]
    with log.open("wb") as file:
        stdout = file if output is None else output
        command = [*wrapper, *command]
        launcher = subprocess.Popen(command, stdout=stdout, stderr=subprocess.STDOUT)
    server = RunningServer(launcher, port, runtime_dir, log)
    try:
        wait_until(
            lambda: launcher.poll() is not None or server.is_ready(),
            START_TIMEOUT_S,
            "server ready",
        )
        assert launcher.poll() is None, log.read_text()
        yield server
    finally:
        pids = list(server.processes().values())
        if launcher.poll() is None:
            launcher.send_signal(signal.SIGTERM)
            try:
                launcher.wait(30)
            except subprocess.TimeoutExpired:
                launcher.kill()
                launcher.wait()
        wait_until(lambda: not any(map(psutil.pid_exists, pids)), 10, "all processes gone")
        wait_until(lambda: not runtime_dir.exists(), 10, "runtime directory gone")


class ServiceListener:
    """Plays systemd: a socket for sd_notify(3), and the fields of each message that was heard."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.heard: list[dict[str, str]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self._socket.settimeout(0.2)

    def close(self) -> None:
        self._socket.close()

    def read(self) -> None:
        """Everything that has arrived."""
        with contextlib.suppress(TimeoutError):
            while True:
                lines = self._socket.recv(4096).decode().split("\n")
                self.heard.append(dict(line.split("=", 1) for line in lines))

    def wait_for(self, timeout_s: float = 30.0, **fields: str) -> int:
        """The number of the first message with these fields."""
        deadline = time.monotonic() + timeout_s
        while True:
            for number, message in enumerate(self.heard):
                if fields.items() <= message.items():
                    return number
            assert time.monotonic() < deadline, f"{fields} not in {self.heard}"
            self.read()

    def forget(self) -> None:
        """What was heard so far."""
        self.read()
        self.heard.clear()


def under_systemd(address: str, watchdog_s: float = 1e3) -> tuple[str, ...]:
    """The wrapper of a server whose service manager listens at this address."""
    variables = (f"NOTIFY_SOCKET={address}", f"WATCHDOG_USEC={int(watchdog_s * 1e6)}")
    return ("env", *variables)
