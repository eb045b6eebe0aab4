"""How many requests may be open, and ids that are safe to log."""

import asyncio
from typing import Any

from glimmer.frontend.context import clean_id


async def test_too_many_open_requests_are_refused_here_already(start: Any) -> None:
    server = await start(max_queued_requests=2, running_max_req_size=1)
    server.engine.manual = True
    open_ones = [asyncio.create_task(server.post("/generate", {"inputs": "x"})) for _ in range(3)]
    submits = await server.engine.submitted(3)
    async with server.session.post(server.url + "/generate", json={"inputs": "x"}) as reply:
        assert reply.status == 429
        assert reply.headers["Retry-After"] == "5"
        assert (await reply.json())["error"]["type"] == "RateLimitError"
    for submit in submits:
        server.engine.finish(submit, "length")
    assert [status for status, _ in await asyncio.gather(*open_ones)] == [200] * 3
    assert server.frontend.num_open == 0


def test_ids_of_clients_are_made_safe_for_logs() -> None:
    assert clean_id("a\r\nb c\x1b[31m") == "abc[31m"
    assert len(clean_id("x" * 1000)) == 128
