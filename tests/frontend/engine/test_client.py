"""The link to the scheduler: exactly one end per sequence, aborts in batches, loss and return."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from fakes import BEAT
from glimmer.frontend.engine.client import EngineClient, SequenceOutput
from glimmer.shared.errors import OverloadedError, UnavailableError
from glimmer.shared.messages import (
    Finished,
    Heartbeat,
    Hello,
    PeerLost,
    Ready,
    Shutdown,
    TokenRow,
    Tokens,
)
from glimmer.shared.messages import TokenLogprob as Logprob
from glimmer.shared.sampling import SamplingParams

PARAMS = SamplingParams(5)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def client(tmp_path: Path, clock: Clock) -> AsyncIterator[EngineClient]:
    """Not running: the tests call `_handle` as its loop does."""
    one = EngineClient(str(tmp_path), 0, Hello("frontend", 0, 1, "hash"), clock)
    task = asyncio.create_task(one.run())
    yield one
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def submit(client: EngineClient, count: int = 1) -> tuple[Any, list[int]]:
    generation = client.submit([([1, 2], PARAMS)] * count)
    return generation, list(generation._open)


async def test_what_nobody_took_yet_joins_and_sequences_stay_apart(client: EngineClient) -> None:
    generation, ids = submit(client, 2)
    entry = Logprob(7, -1.0, 1, [])
    client._handle(Tokens([TokenRow(ids[0], [7], [entry]), TokenRow(ids[1], [8])]))
    client._handle(Tokens([TokenRow(ids[0], [9], [entry], [entry])]))
    client._handle(Finished(ids[0], "stop"))
    first, second = await generation.receive()
    assert first == SequenceOutput(0, [7, 9], [entry, entry], [entry], Finished(ids[0], "stop"))
    assert second == SequenceOutput(1, [8], [], [])
    assert generation.is_open
    client._handle(Finished(ids[1], "length"))
    assert await generation.receive() == [SequenceOutput(1, [], [], [], Finished(ids[1], "length"))]
    assert not generation.is_open


async def test_messages_for_unknown_requests_change_nothing(client: EngineClient) -> None:
    client._handle(Tokens([TokenRow(5, [1])]))
    client._handle(Finished(5, "stop"))
    client._handle(Hello("worker", 0, 1, "x"))


async def test_leaving_early_aborts_in_one_message(
    client: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(client._sender, "send", sent.append)
    ids = []
    for _ in range(100):
        with contextlib.closing(client.submit([([1], PARAMS)] * 2)) as generation:
            ids += list(generation._open)
    sent.clear()
    await asyncio.sleep(0)
    assert [sorted(message.request_ids) for message in sent] == [sorted(ids)]
    await asyncio.sleep(0)
    assert len(sent) == 1
    client._handle(Tokens([TokenRow(ids[0], [1])]))
    client._handle(Finished(ids[0], "abort"))


async def test_what_is_finished_is_not_aborted(
    client: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.closing(client.submit([([1], PARAMS)])) as generation:
        client._handle(Finished(next(iter(generation._open)), "stop"))
        generation.abort(0)
    sent: list[Any] = []
    monkeypatch.setattr(client._sender, "send", sent.append)
    await asyncio.sleep(0)
    assert sent == []


async def test_request_ids_are_62_bit_and_distinct(client: EngineClient) -> None:
    ids = [i for _ in range(50) for i in submit(client, 20)[1]]
    assert len(set(ids)) == 1000
    assert all(0 <= i < 2**62 for i in ids)
    assert max(ids) > 2**56


async def test_a_full_link_refuses_instead_of_losing_a_request(
    client: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drop(message: object) -> None:
        client._sender.dropped += 1

    monkeypatch.setattr(client._sender, "send", drop)
    with pytest.raises(OverloadedError):
        submit(client)
    assert client._generations == {}


async def test_losing_the_scheduler_ends_everything_until_the_next_epoch(
    client: EngineClient,
) -> None:
    with pytest.raises(UnavailableError, match="starting"):
        _ = client.max_req_total_len
    client._handle(Ready("scheduler", 0, 3, 10, 512))
    assert client.max_req_total_len == 512
    generation, ids = submit(client, 2)
    client._handle(PeerLost("scheduler", 0, "SIGKILL"))
    events = await generation.receive()
    assert [e.finished.reason for e in events if e.finished] == ["unavailable"] * 2
    assert not generation.is_open
    assert client.state.why_not_ready() == "engine lost"
    client._handle(Ready("scheduler", 0, 3, 10, 512))  # sent before it died
    assert client.state.why_not_ready() == "engine lost"
    client._handle(Ready("scheduler", 0, 4, 10, 256))
    assert client.state.why_not_ready() == ""
    assert client.max_req_total_len == 256
    client._handle(Finished(ids[0], "stop"))


async def test_the_next_scheduler_hears_no_aborts_of_requests_that_it_does_not_know(
    client: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    generation, _ = submit(client, 2)
    generation.abort(0)  # sent at the end of this turn of the event loop
    client._handle(PeerLost("scheduler", 0, "SIGKILL"))
    sent: list[Any] = []
    monkeypatch.setattr(client._sender, "send", sent.append)
    generation.abort(1)
    generation.close()
    await asyncio.sleep(0)
    assert sent == []


async def test_a_restarted_engine_updates_what_fits(client: EngineClient) -> None:
    client._handle(Ready("scheduler", 0, 0, 10, 512))
    client._handle(Ready("scheduler", 0, 1, 10, 300))
    assert client.max_req_total_len == 300


async def test_a_long_wait_returns_empty_handed(
    client: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    generation, _ = submit(client)
    waiting = asyncio.create_task(generation.receive())
    await asyncio.sleep(0)
    assert not waiting.done()
    monkeypatch.setattr("glimmer.frontend.engine.client._IDLE_S", 0.0)
    ticker = asyncio.create_task(client._tick())
    assert await asyncio.wait_for(waiting, 10) == []
    assert generation.is_open
    ticker.cancel()


async def test_shutdown_shortens_but_never_lengthens_the_drain(
    client: EngineClient, clock: Clock
) -> None:
    client._handle(Shutdown(30.0))
    assert client.state.why_not_ready() == "draining"
    assert client.state.shutdown_at == clock.now + 30
    client._handle(Shutdown(0.0))
    assert client.state.shutdown_at == clock.now
    client._handle(Shutdown(60.0))
    assert client.state.shutdown_at == clock.now


async def test_workers_that_restart_are_seen_in_readiness(client: EngineClient) -> None:
    client._handle(Ready("scheduler", 0, 0, 10, 512))
    client._handle(Heartbeat(**{**BEAT, "worker_ready": False}))
    assert client.state.why_not_ready() == "engine restarting"
    client._handle(Heartbeat(**BEAT))
    assert client.state.why_not_ready() == ""
