"""--access_log: a line for each request, whatever became of it."""

import logging
from typing import Any

import pytest
from glimmer.shared.log_format import make_formatter
from glimmer.shared.secrets import key_digest


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [vars(one)["fields"] for one in caplog.records if one.name == "glimmer.access"]


async def test_every_request_has_one_line(start: Any, caplog: pytest.LogCaptureFixture) -> None:
    server = await start(access_log=True)
    await server.get("/readiness?secret=1")
    await server.post("/generate", {"inputs": "x"})
    await server.stream("/generate_stream", {"inputs": "x"})
    await server.post("/nowhere", {})
    found = lines(caplog)
    assert [line["path"] for line in found] == [
        "/readiness",
        "/generate",
        "/generate_stream",
        "/nowhere",
    ]
    assert [line["status"] for line in found] == [200, 200, 200, 404]
    assert all(line["bytes"] > 10 and line["peer"] == "127.0.0.1" for line in found)
    assert not any("secret" in record.getMessage() for record in caplog.records)


async def test_without_the_flag_there_is_none(
    server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    await server.get("/readiness")
    assert not lines(caplog)


async def test_refusals_of_a_flood_are_logged_too(
    start: Any, caplog: pytest.LogCaptureFixture
) -> None:
    server = await start(access_log=True, api_key=(key_digest("k"),))
    assert (await server.post("/generate", {"inputs": "x"}))[0] == 401
    [line] = lines(caplog)
    assert (line["path"], line["status"]) == ("/generate", 401)


async def test_lines_about_a_request_have_its_id_and_the_name_of_its_key(start: Any) -> None:
    server = await start(api_key=(key_digest("sk-hush"),))
    texts: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(make_formatter("frontend-0", "json").format(record))

    handler = Collect()
    logging.getLogger().addHandler(handler)
    logging.getLogger("glimmer").setLevel(logging.INFO)
    headers = {"X-Request-Id": "mine", "Authorization": "Bearer sk-hush"}
    await server.post("/generate", {"inputs": "the prompt"}, headers=headers)
    logging.getLogger().removeHandler(handler)
    logging.getLogger("glimmer").setLevel(logging.NOTSET)
    [ended] = [text for text in texts if '"request ended"' in text]
    for part in ('"request_id": "mine"', '"key": "', '"ttft_ms": ', '"finish_reason": "stop"'):
        assert part in ended
    assert not any("the prompt" in text or "sk-hush" in text for text in texts)
