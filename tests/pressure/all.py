"""`python tests/pressure/all.py [--minutes 25] [PART ...]`: all that outsiders and faults can do.

Runs the parts one after the other, each in a process of its own with its share of the time, and
prints one table in Markdown. The exit code is 1 if a part failed or did not end. Needs a machine
with nothing else to do; probes of a server that does nothing show whether it is.

- flood: 10,000 posts to a full server, 64, 256 and 10,000 at once.
- vanish: 5,000 clients that leave during a streamed or plain reply.
- readers: 200 clients that do not read a streamed or plain reply.
- slowloris: 500 clients that drip heads or bodies.
- faults: SIGKILL and SIGSTOP of each kind of process, `--tp` 1 and 2, one and two HTTP processes.
- soak: mixed traffic, with faults in the first part of the time.
"""

import argparse
import asyncio
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from glimmer.deploy.demo.checkpoint import make_checkpoint
from pressure.clients import post, slow_readers, slowloris, vanish
from pressure.faults import sweep
from pressure.flood import flood, floor_server
from pressure.soak import soak
from pressure.watch import Row, metrics_flags, table, watched
from server import RunningServer, running_server, wait_until

_GRACE_S = 300.0  # beyond its share, a part may take so long before it is killed
_START_S = 20.0  # of a share, for the start and stop of servers
_CHUNK = 500
_FLAGS = ("--data_type", "float32", "--log_level", "warning")
_HEAD_S, _BODY_S, _STALL_S = 15.0, 60.0, 30.0  # the server's own limits
_SLACK_S = 15.0


@dataclass(frozen=True)
class Options:
    """What one part gets."""

    seconds: float
    scale: float  # of the number of clients
    directory: Path
    model: Path

    def count(self, number: int) -> int:
        """A number of clients, scaled."""
        return max(1, int(number * self.scale))


@contextlib.contextmanager
def _watched_server(options: Options, row: Row, *flags: str) -> Iterator[RunningServer]:
    own_port, own_flags = metrics_flags()
    with running_server(
        options.model, options.directory / "s", *_FLAGS, *own_flags, *flags
    ) as server:
        server.token_ids([1, 2, 3], max_new_tokens=5)
        with watched(server, own_port, row):
            yield server
        if len(server.token_ids([1, 2, 3], max_new_tokens=5, ignore_eos=True)) != 5:
            row.problems.append("an ordinary request failed afterwards")


def _flood(options: Options, row: Row) -> None:
    request = post("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 200}]})
    count = row.n = options.count(10_000)
    deadline = time.monotonic() + options.seconds
    flags = ("--max_queued_requests", "20", "--running_max_req_size", "4")
    with _watched_server(options, row, *flags) as server, _full(server), floor_server() as floor:
        for at_once in (64, 256, count):
            if time.monotonic() > deadline:
                row.problems.append(f"no time for {at_once} at once")
                continue
            least = flood(floor, request, count, at_once)
            result = flood(server.port, request, count, at_once)
            row.hung += result.hung
            row.notes.append(
                f"{at_once} at once: 429 after p50 {result.quantile_ms(0.5):.0f}, p99 "
                f"{result.quantile_ms(0.99):.0f} ms, {count / result.seconds:.0f}/s (at least "
                f"{least.quantile_ms(0.5):.0f}, {least.quantile_ms(0.99):.0f} ms, "
                f"{count / least.seconds:.0f}/s)"
            )
            if set(result.statuses) != {429}:
                row.problems.append(f"statuses {dict(result.statuses)}")


@contextlib.contextmanager
def _full(server: RunningServer) -> Iterator[None]:
    """Keep the queue full. The clients leave at the end."""
    body = {"inputs": [1, 2], "parameters": {"max_new_tokens": 100_000, "ignore_eos": True}}
    ended = threading.Event()

    def hold() -> None:
        clients: list[socket.socket] = []
        while not ended.wait(0.05):
            while len(clients) < 26:
                clients.append(socket.create_connection(("127.0.0.1", server.port)))
                clients[-1].sendall(post("/generate", body))
            for client in select.select(clients, [], [], 0)[0]:  # it has ended or was refused
                client.close()
                clients.remove(client)
        for client in clients:
            client.close()

    def is_full() -> bool:
        with contextlib.suppress(OSError):  # it waits in the queue until this client leaves
            return server.post("/generate", body, 1)[0] == 429
        return False

    holder = threading.Thread(target=hold, daemon=True)
    holder.start()
    wait_until(is_full, 60, "full")
    try:
        yield
    finally:
        ended.set()
        holder.join()


def _vanish(options: Options, row: Row) -> None:
    wanted, refused = options.count(5000), 0
    deadline = time.monotonic() + options.seconds
    with _watched_server(options, row) as server:
        while row.n < wanted and time.monotonic() < deadline:
            chunk = min(_CHUNK, wanted - row.n)
            refused += asyncio.run(vanish(server.port, chunk, seed=row.n))
            row.n += chunk
        left_at = time.monotonic()
        wait_until(
            lambda: server.metric("lightllm_num_running_reqs") == 0, 60, "all requests ended"
        )
        row.notes.append(f"nothing runs {time.monotonic() - left_at:.1f} s after the last left")
        if refused:
            row.problems.append(f"{refused} could not send")


def _readers(options: Options, row: Row) -> None:
    row.n = options.count(200)
    patience_s = max(_STALL_S + _SLACK_S, options.seconds - 20)
    with _watched_server(options, row, "--enable_prompt_logprobs") as server:
        row.hung, whole = asyncio.run(slow_readers(server.port, row.n, 1000, patience_s))
    row.notes.append(f"{row.n - row.hung - whole} were cut, {whole} found the whole reply")


def _slowloris(options: Options, row: Row) -> None:
    row.n = options.count(500)
    limits = (_HEAD_S + _SLACK_S, _BODY_S + _SLACK_S)
    with _watched_server(options, row) as server:
        row.hung = asyncio.run(slowloris(server.port, row.n, limits))


def _faults(options: Options, row: Row) -> None:
    result = sweep(options.model, options.directory, options.seconds)
    for name, value in asdict(result).items():
        setattr(row, name, value)


def _soak(options: Options, row: Row) -> None:
    with _watched_server(options, row, "--max_total_token_num", "16384") as server:
        soak(server, options.seconds, row)


# Name -> what runs, share of the time.
PARTS: dict[str, tuple[Callable[[Options, Row], None], float]] = {
    "flood": (_flood, 0.05),
    "vanish": (_vanish, 0.05),
    "readers": (_readers, 0.07),
    "slowloris": (_slowloris, 0.06),
    "faults": (_faults, 0.36),
    "soak": (_soak, 0.41),
}


def run_part(name: str, seconds: float, scale: float) -> Row:
    """One part in this process. An exception becomes a problem of its row."""
    row = Row(name)
    with tempfile.TemporaryDirectory(prefix="p", dir="/tmp") as text:
        directory = Path(text)
        try:
            make_checkpoint(directory / "m", num_hidden_layers=2)
            PARTS[name][0](Options(seconds, scale, directory, directory / "m"), row)
        except (Exception, AssertionError) as error:
            row.problems.append(f"{type(error).__name__}: {str(error)[:300]}")
    if row.hung:
        row.problems.append(f"{row.hung} hung")
    return row


def _run_apart(name: str, seconds: float, scale: float) -> Row:
    """One part in a process of its own, which is killed with all of its servers if it hangs."""
    command = [sys.executable, __file__, name, "--seconds", str(seconds), "--scale", str(scale)]
    row = Row(name)
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [*command, "--json"], stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(seconds + _GRACE_S)
        except subprocess.TimeoutExpired:
            row.problems.append(f"did not end within {seconds + _GRACE_S:.0f} s")
        finally:
            with contextlib.suppress(ProcessLookupError):  # also what it left behind
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        text = output.read().decode(errors="replace")
    try:
        return Row(**json.loads(text.rstrip().rpartition("\n")[2]))
    except (ValueError, TypeError):
        row.problems.append(f"exit code {process.returncode}, {text[-300:]!r}")
        return row


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"commit {run.stdout.strip() or 'unknown'}"


def main() -> int:
    """Run the parts that were asked for; all by default."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--minutes", type=float, default=25.0, help="of all parts together")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of clients")
    parser.add_argument("--seconds", type=float, help="of a single part")
    parser.add_argument("--json", action="store_true", help="one part, in this process")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(unknown)}")
    names = args.parts or list(PARTS)
    if args.json:
        print(json.dumps(asdict(run_part(names[0], args.seconds, args.scale))), flush=True)
        return 0
    total = sum(PARTS[name][1] for name in names)
    about = f"{os.cpu_count()} cores, load before: {os.getloadavg()[0]:.1f}, {_commit()}"
    rows = []
    for name in names:
        share = args.minutes * 60 * PARTS[name][1] / total
        seconds = args.seconds or max(1.0, share - _START_S)
        began = time.monotonic()
        print(f"{name}: {seconds:.0f} s", file=sys.stderr, flush=True)
        rows.append(_run_apart(name, seconds, args.scale))
        rows[-1].notes.append(f"took {time.monotonic() - began:.0f} s")
        print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    print(f"{about}\n\n{table(rows)}")
    return int(any(row.problems for row in rows))


if __name__ == "__main__":
    sys.exit(main())
