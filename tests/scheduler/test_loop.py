"""The process around the core, over real sockets: greetings, plans to every rank, heartbeat."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fakes import FakeWorker, oracle
from glimmer.scheduler import loop
from glimmer.scheduler.loop import SchedulerLoop
from glimmer.shared.config import ServeConfig
from glimmer.shared.lifecycle import Child
from glimmer.shared.messages import (
    Finished,
    FlushCache,
    Heartbeat,
    Hello,
    Message,
    PeerLost,
    Ready,
    Shutdown,
    StepPlan,
    Submit,
    Tokens,
    WorkerFailed,
)
from glimmer.shared.sampling import SamplingParams
from glimmer.shared.transport import (
    Receiver,
    Sender,
    frontend_address,
    launcher_address,
    scheduler_address,
    worker_address,
)

NUM_PAGES = 32


class Peers:
    """A scheduler process in a thread, and its launcher, frontend and two ranks."""

    def __init__(self, directory: Path) -> None:
        self.dir = str(directory)
        self.config = ServeConfig(
            tp=2,
            max_req_total_len=1000,
            page_size=4,
            running_max_req_size=4,
            batch_max_tokens=32,
            chunked_prefill_size=16,
        )
        self.launcher = Receiver.bind(launcher_address(self.dir))
        self.frontend = Receiver.bind(frontend_address(self.dir, 0))
        self.to_launcher = Sender.connect(launcher_address(self.dir))
        child = Child("scheduler", 0, 0, self.dir, None, self.config, self.to_launcher)
        self.loop = SchedulerLoop(child)
        self.thread = threading.Thread(target=self.loop.run, daemon=True)
        self.scheduler = Sender.connect(scheduler_address(self.dir))
        self.thread.start()

    def hello(self, role: str, index: int, pid: int, config_hash: str = "") -> None:
        self.scheduler.send(Hello(role, index, pid, config_hash or self.config.config_hash()))

    def serve(self, epoch: int, until: Callable[[list[Message]], bool]) -> list[Message]:
        """Play both ranks until the frontend's messages satisfy `until`."""
        ranks = [Receiver.bind(worker_address(self.dir, epoch, rank)) for rank in range(2)]
        for rank in range(2):
            self.scheduler.send(Ready("worker", rank, epoch, NUM_PAGES))
        worker = FakeWorker(NUM_PAGES, 4, 4, epoch, max_tokens=32, chunk_size=16)
        heard: list[Message] = []
        plans: list[list[Message]] = [[], []]
        try:
            for _ in range(2000):
                new = ranks[0].receive(0.005)
                plans[0] += new
                for plan in new:
                    assert isinstance(plan, StepPlan)
                    self.scheduler.send(worker.run(plan))
                heard += self.frontend.receive(0)
                if until(heard):
                    break
            else:
                raise AssertionError(f"heard only {heard}")
            while len(plans[1]) < len(plans[0]):
                plans[1] += ranks[1].receive(10)
            assert plans[0] == plans[1], "the ranks got different plans"
            return heard
        finally:
            for rank_inbox in ranks:
                rank_inbox.close()

    def stop(self) -> None:
        self.scheduler.send(Shutdown(0.0))
        self.thread.join(10)
        assert not self.thread.is_alive(), "the loop did not stop"
        self.to_launcher.close()
        self.scheduler.close()
        self.launcher.close()
        self.frontend.close()


@pytest.fixture
def peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Peers]:
    monkeypatch.setattr(loop, "HEARTBEAT_NS", 20_000_000)
    monkeypatch.setattr(loop.gc, "set_threshold", lambda *_: None)
    monkeypatch.setattr(loop.gc, "freeze", lambda: None)
    running = Peers(tmp_path)
    yield running
    running.stop()


def finished(count: int) -> Callable[[list[Message]], bool]:
    return lambda heard: sum(isinstance(m, Finished) for m in heard) == count


def submit(request_id: int, prompt: list[int], max_new: int = 8) -> Submit:
    return Submit(request_id, 0, prompt, SamplingParams(max_new, seed=request_id))


def test_requests_are_served_over_sockets_and_again_by_the_next_worker_group(
    peers: Peers,
) -> None:
    peers.hello("frontend", 0, 100)
    requests = [submit(i, [i, 2, 3]) for i in range(1, 4)]
    for request in requests:
        peers.scheduler.send(request)
    heard = peers.serve(0, finished(3))
    assert any(isinstance(m, Ready) for m in heard)
    tokens: dict[int, list[int]] = {}
    for message in heard:
        if isinstance(message, Tokens):
            for row in message.rows:
                tokens.setdefault(row.request_id, []).extend(row.token_ids)
    for request in requests:
        assert tokens[request.request_id] == oracle(request.prompt_ids, request.sampling, 99, 64)[0]
    assert peers.loop.steps > 0
    assert peers.loop.step_time_s > 0
    peers.scheduler.send(PeerLost("worker", 0, "killed", 0))
    peers.scheduler.send(submit(9, [1, 2]))
    peers.serve(1, finished(1))


def test_the_heartbeat_reaches_launcher_and_frontends(peers: Peers) -> None:
    peers.scheduler.send_bytes(b"\xff not a message")

    def beaten(heard: list[Message]) -> bool:
        return any(isinstance(m, Heartbeat) and m.malformed_messages == 1 for m in heard)

    peers.serve(0, beaten)
    launcher: list[Message] = []
    while not beaten(launcher):
        launcher += peers.launcher.receive(10)


def test_the_heartbeat_tells_what_steps_cost_and_a_flush_empties_the_cache(peers: Peers) -> None:
    peers.hello("frontend", 0, 100)
    peers.scheduler.send(submit(1, [1, 2, 3, 4, 5], 6))
    heard = peers.serve(0, lambda all_of_it: finished(1)(all_of_it) and cached(all_of_it))
    beat = [m for m in heard if isinstance(m, Heartbeat)][-1]
    assert sum(beat.prefill_steps.counts) == 1
    assert sum(beat.decode_steps.counts) >= 5
    assert beat.decode_steps.total_s > 0
    assert sum(beat.batch_sizes) == beat.batch_rows == peers.loop.steps
    peers.scheduler.send(FlushCache())
    beats: list[Message] = []
    while not any(isinstance(m, Heartbeat) and m.pages_free == NUM_PAGES for m in beats):
        beats += peers.frontend.receive(10)


def cached(heard: list[Message]) -> bool:
    return any(isinstance(m, Heartbeat) and m.pages_cached and not m.num_running for m in heard)


def test_a_process_of_another_configuration_is_not_answered(
    peers: Peers, caplog: pytest.LogCaptureFixture
) -> None:
    peers.hello("worker", 0, 5, "another")
    peers.scheduler.send(Ready("worker", 0, 0, NUM_PAGES))
    peers.scheduler.send(Ready("worker", 1, 0, NUM_PAGES))
    beats: list[Message] = []
    while sum(isinstance(m, Heartbeat) for m in beats) < 3:
        beats += peers.launcher.receive(10)
    last = [m for m in beats if isinstance(m, Heartbeat)][-1]
    assert not last.worker_ready
    assert "another configuration" in caplog.text


def test_shutdown_ends_open_requests_before_it_stops(peers: Peers) -> None:
    for number in range(3):
        peers.scheduler.send(submit(number, [1, 2]))
    peers.scheduler.send(Shutdown(0.0))
    heard: list[Message] = []
    while not finished(3)(heard):
        heard += peers.frontend.receive(10)
    assert {m.reason for m in heard if isinstance(m, Finished)} == {"unavailable"}


def test_a_limit_lower_than_wished_is_logged(
    peers: Peers, caplog: pytest.LogCaptureFixture
) -> None:
    peers.serve(0, lambda heard: any(isinstance(m, Ready) for m in heard))
    assert "requests may have 124 tokens in all, not 1000" in caplog.text


def test_a_frontend_that_does_not_read_is_told_that_its_output_was_lost(
    peers: Peers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    peers.hello("frontend", 0, 100)
    peers.scheduler.send(submit(1, [1, 2], 200))
    peers.frontend.close()  # nobody takes messages at this address
    monkeypatch.setattr("glimmer.shared.transport._HIGH_WATER", 30)
    peers.loop._links.reopen_frontend(0)
    worker = FakeWorker(NUM_PAGES, 4, 4, 0, max_tokens=32, chunk_size=16)
    rank = Receiver.bind(worker_address(peers.dir, 0, 0))
    for index in range(2):
        peers.scheduler.send(Ready("worker", index, 0, NUM_PAGES))
    while "frontend 0 does not read" not in caplog.text:
        for plan in rank.receive(0.01):
            assert isinstance(plan, StepPlan)
            peers.scheduler.send(worker.run(plan))
    rank.close()
    peers.frontend = Receiver.bind(frontend_address(peers.dir, 0))  # it reads again
    heard: list[Message] = []
    while not any(isinstance(m, PeerLost) and m.role == "frontend" for m in heard):
        heard += peers.frontend.receive(10)
    rows = [row for m in heard if isinstance(m, Tokens) for row in m.rows]
    tokens = [token for row in rows for token in row.token_ids]
    right = oracle([1, 2], SamplingParams(200, seed=1), 99, 64)[0]
    assert tokens == right[: len(tokens)], "a gap"
    while not any(isinstance(m, Heartbeat) and m.dropped_messages for m in heard):
        heard += peers.frontend.receive(10)
    beat = [m for m in heard if isinstance(m, Heartbeat)][-1]
    assert (beat.num_running, beat.num_waiting) == (0, 0)


def test_time_in_which_the_process_was_stopped_makes_nobody_late(
    peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers.hello("frontend", 0, 100)
    peers.scheduler.send(submit(1, [1, 2]))
    for index in range(2):
        peers.scheduler.send(Ready("worker", index, 0, NUM_PAGES))
    heard: list[Message] = []
    while not any(isinstance(m, Heartbeat) and m.num_running for m in heard):
        heard += peers.frontend.receive(10)
    real = loop.time.monotonic_ns
    monkeypatch.setattr(loop.time, "monotonic_ns", lambda: real() + 1000 * 1_000_000_000)
    heard.clear()
    while sum(isinstance(m, Heartbeat) for m in heard) < 5:
        heard += peers.frontend.receive(10)
    launcher = peers.launcher.receive(0)
    assert not any(isinstance(m, WorkerFailed) for m in launcher)
