"""Small versions of `tests/pressure/`, with a frontend in this process and short limits."""

import asyncio
from typing import Any

from glimmer.frontend.wire.connection import Limits
from pressure.clients import post, slow_readers, slowloris, vanish
from pressure.flood import flood, floor_server


def port(server: Any) -> int:
    return int(server.url.rsplit(":", 1)[1])


async def test_a_flood_is_refused_and_leaves_nothing(start: Any) -> None:
    server = await start(max_queued_requests=1, running_max_req_size=1)
    server.engine.manual = True
    waiting = [asyncio.create_task(server.post("/generate", {"inputs": "x"})) for _ in range(2)]
    await server.engine.submitted(2)
    request = post("/generate", {"inputs": "x"})
    for at_once in (20, 500):
        result = await asyncio.to_thread(flood, port(server), request, 500, at_once)
        assert (result.statuses, result.hung) == ({429: 500}, 0)
    for submit in server.engine.submits:
        server.engine.finish(submit, "stop")
    assert [status for status, _ in await asyncio.gather(*waiting)] == [200, 200]
    await server.settle(lambda: server.frontend.connections.budget.held == 0)


async def test_the_floor_answers_as_the_server_does() -> None:
    with floor_server() as floor:
        result = await asyncio.to_thread(flood, floor, b"POST / HTTP/1.1\r\n\r\n", 50, 50)
    assert result.statuses == {429: 50}
    assert 0 < result.quantile_ms(0.5) <= result.quantile_ms(1)


async def test_clients_that_vanish_are_all_aborted(start: Any) -> None:
    server = await start(max_queued_requests=1000)
    server.engine.manual = True
    assert await vanish(port(server), 200, at_once=50) == 0
    await server.settle(lambda: server.frontend.num_open == 0)
    submitted = {submit.request_id for submit in server.engine.submits}
    await server.engine.until(lambda: submitted <= set(server.engine.aborted_ids))
    assert server.frontend.connections.budget.held == 0


async def test_slow_readers_and_slow_writers_are_cut(start: Any) -> None:
    server = await start(enable_prompt_logprobs=True, max_queued_requests=100)
    connections = server.frontend.connections
    connections.limits = Limits(stall_s=0.3, head_s=0.3)
    watching = asyncio.create_task(connections.run())
    readers = asyncio.create_task(slow_readers(port(server), 8, 480, 3.0))
    assert await slowloris(port(server), 1, (5.0, 5.0), 0.1) == 0
    hung, whole = await readers
    assert hung == 0
    assert whole < 8, "a busy machine may need the time of some for their reply"
    assert connections.num_cut > 1
    await server.settle(lambda: not connections.open)
    assert connections.budget.held == 0
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)


async def test_the_clients_notice_a_server_that_does_not_cut_them(server: Any) -> None:
    assert await slowloris(port(server), 2, (0.3, 0.3), 0.1) == 2
