"""Rolling restarts behind a real proxy: how many requests are lost?

    make rolling ROLLING="--proxy nginx --restarts 6 --streams 200"

That is the long version of the test below. It starts two servers and a proxy with its file from
deploy/examples/. Clients stream without a pause through the proxy while one server after the other
is restarted with SIGTERM. Prints a table; the exit code is 1 if any request failed.
"""

import argparse
import asyncio
import contextlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest
from glimmer.deploy.demo.run import MODEL_DIR
from server import RunningServer, free_port, running_server, wait_until

EXAMPLES = Path(__file__).parents[2] / "deploy" / "examples"
FILES = {"nginx": "nginx.conf", "haproxy": "haproxy.cfg"}
TOKENS = 32
_DRAIN_TIMEOUT_S = 300
MESSAGES = [{"role": "user", "content": "Tell me about the sea."}]


class Node:
    """One server that can be restarted on its port."""

    def __init__(self, directory: Path, model: Path, delay_s: float) -> None:
        self.port = free_port()
        self._directory, self._model, self._delay_s = directory, model, delay_s
        self._stack = contextlib.ExitStack()
        self.server: RunningServer

    def start(self) -> None:
        """Returns when it is ready."""
        flags = ("--drain_delay_s", str(self._delay_s), "--drain_timeout_s", str(_DRAIN_TIMEOUT_S))
        manager = running_server(self._model, self._directory, *flags, port=self.port)
        self.server = self._stack.enter_context(manager)

    def stop(self) -> int:
        """SIGTERM. Returns the exit code, when all requests have ended."""
        self.server.launcher.send_signal(signal.SIGTERM)
        code = self.server.launcher.wait(_DRAIN_TIMEOUT_S + 60)
        self._stack.close()
        return code


@contextlib.contextmanager
def running_proxy(name: str, directory: Path, ports: list[int]) -> Iterator[str]:
    """The address of a proxy, with the configuration that we ship, on other ports."""
    directory.mkdir()
    listen = free_port()
    text = (EXAMPLES / FILES[name]).read_text()
    for old, new in (("8000", ports[0]), ("8001", ports[1]), ("8080", listen)):
        assert f"127.0.0.1:{old}" in text, "the sample uses these ports"
        text = text.replace(f"127.0.0.1:{old}", f"127.0.0.1:{new}")
    paths = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    kept = "".join(f"{path}_temp_path {directory}; " for path in paths)
    text = text.replace("http {", f"http {{ access_log off; {kept}")
    file = directory / FILES[name]
    file.write_text(text)
    own = f"daemon off; pid {directory}/pid; error_log {directory}/log warn;"
    commands = {
        "nginx": ["nginx", "-e", f"{directory}/log", "-c", str(file), "-g", own],
        "haproxy": ["haproxy", "-db", "-f", str(file)],
    }
    with (directory / "output").open("wb") as output:
        proxy = subprocess.Popen(commands[name], stdout=output, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{listen}"
    server = RunningServer(proxy, listen, directory, file)
    try:
        wait_until(server.is_ready, 20, f"{name} answers: {(directory / 'output').read_text()}")
        yield url
    finally:
        proxy.terminate()
        proxy.wait(20)


@dataclass
class Load:
    """Clients that stream one reply after the other."""

    num_open: int = 0
    num_done: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    is_over: bool = False

    async def client(self, session: aiohttp.ClientSession, url: str) -> None:
        """Ask until it is over."""
        while not self.is_over:
            self.num_open += 1
            try:
                problem = await self._ask(session, url)
            except (aiohttp.ClientError, TimeoutError) as error:
                problem = type(error).__name__
            self.num_open -= 1
            if problem:
                self.failures[problem] += 1
                await asyncio.sleep(0.1)
            else:
                self.num_done += 1

    async def _ask(self, session: aiohttp.ClientSession, url: str) -> str:
        """What is wrong with the reply; "" if it is whole."""
        body = {"messages": MESSAGES, "max_tokens": TOKENS, "stream": True, "ignore_eos": True}
        async with session.post(url + "/v1/chat/completions", json=body) as reply:
            data = await reply.read()
        if reply.status != 200:
            return f"status {reply.status}"
        events = [line[6:] for line in data.split(b"\n") if line.startswith(b"data: ")]
        if not events or events[-1] != b"[DONE]":
            return "no end"
        return "error event" if any("error" in json.loads(event) for event in events[:-1]) else ""


async def roll(nodes: list[Node], urls: list[str], num_streams: int, restarts: int) -> Load:
    """Restart the nodes in turn, under the load. Prints a line for each restart."""
    load = Load()
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        clients = [
            asyncio.create_task(load.client(session, urls[n % len(urls)]))
            for n in range(num_streams)
        ]
        print("restart  server  open  exit code  drained in  ready again in  done  failed")
        for count in range(restarts):
            before = load.num_done
            while load.num_done < before + num_streams // 2 and not load.failures:
                await asyncio.sleep(0.05)  # both servers have running streams
            number = count % len(nodes)
            num_open, started = load.num_open, time.monotonic()
            code = await asyncio.to_thread(nodes[number].stop)
            stopped = time.monotonic()
            await asyncio.to_thread(nodes[number].start)
            ready_s = time.monotonic() - stopped
            print(
                f"{count + 1:7}  {number + 1:6}  {num_open:4}  {code:9}  {stopped - started:8.1f} s"
                f"  {ready_s:12.1f} s  {load.num_done:4}  {load.failures.total():6}",
                flush=True,
            )
            if code != 0:
                load.failures[f"exit code {code}"] += 1
        load.is_over = True
        await asyncio.gather(*clients)
    print(f"{load.num_done} replies were whole; failed: {dict(load.failures) or 'none'}")
    return load


def rolling(
    model: Path, proxies: list[str], directory: Path, load: tuple[int, int], delay_s: float
) -> Load:
    """Start everything, restart the servers under load, stop everything. `load` is the number of
    clients and of restarts."""
    with contextlib.ExitStack() as stack:
        nodes = [Node(directory / f"n{n}", model, delay_s) for n in range(2)]
        for node in nodes:
            node.start()
            stack.callback(node.stop)
        ports = [node.port for node in nodes]
        urls = [
            stack.enter_context(running_proxy(name, directory / name, ports)) for name in proxies
        ]
        return asyncio.run(roll(nodes, urls, *load))


def test_a_restart_behind_nginx_and_haproxy_loses_no_request(
    tmp_path: Path, tiny_model: Path
) -> None:
    proxies = [name for name in FILES if shutil.which(name)]
    if not proxies:
        pytest.skip("neither nginx nor haproxy is installed (make tools)")
    load = rolling(tiny_model, proxies, tmp_path, (16, 1), delay_s=1.5)
    assert not load.failures
    assert load.num_done >= 16


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--proxy", nargs="+", choices=tuple(FILES), default=list(FILES))
    parser.add_argument("--streams", type=int, default=200, help="clients that stream at once")
    parser.add_argument("--restarts", type=int, default=6, help="of both servers together")
    parser.add_argument("--drain_delay_s", type=float, default=3.0)
    args = parser.parse_args()
    missing = [name for name in args.proxy if shutil.which(name) is None]
    if missing:
        parser.error(f"not installed: {' '.join(missing)} (make tools)")
    with tempfile.TemporaryDirectory(prefix="rolling-") as directory:
        size = (args.streams, args.restarts)
        load = rolling(MODEL_DIR, args.proxy, Path(directory), size, args.drain_delay_s)
    return 1 if load.failures else 0


if __name__ == "__main__":
    sys.exit(main())
