"""Metrics sent to a push gateway, which is played."""

import asyncio
import base64
from typing import Any

import pytest
from aiohttp import web
from glimmer.frontend.engine.metrics_push import grouping_key, push_forever, push_once
from glimmer.shared.config import ServeConfig


class Gateway:
    """Remembers what was pushed; answers `status`."""

    def __init__(self) -> None:
        self.pushes: list[tuple[str, str, dict[str, str]]] = []
        self.status = 200

    async def start(self) -> str:
        app = web.Application()
        app.router.add_put("/{path:.*}", self._take)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        port: int = self._runner.addresses[0][1]
        return f"127.0.0.1:{port}"

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _take(self, request: web.Request) -> web.Response:
        body = await request.text()
        self.pushes.append((request.path, body, dict(request.headers)))
        return web.Response(status=self.status)


@pytest.fixture
async def gateway() -> Any:
    playing = Gateway()
    playing.address = await playing.start()  # type: ignore[attr-defined]
    yield playing
    await playing.stop()


async def test_a_push_has_job_group_and_metrics(gateway: Any, start: Any) -> None:
    server = await start(metric_gateway=gateway.address, job_name="j", grouping_key=("zone=a",))
    await asyncio.to_thread(push_once, server.frontend)
    [(path, body, headers)] = gateway.pushes
    assert path == "/metrics/job/j/zone/a"
    assert 'lightllm_num_running_reqs{model_name="tiny"}' in body
    assert "Authorization" not in headers


async def test_credentials_come_from_the_environment(
    gateway: Any, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("USERNAME", "ann")
    monkeypatch.setenv("PASSWORD", "hush")
    server = await start(metric_gateway=gateway.address, enable_monitor_auth=True)
    await asyncio.to_thread(push_once, server.frontend)
    sent = gateway.pushes[0][2]["Authorization"]
    assert base64.b64decode(sent.removeprefix("Basic ")) == b"ann:hush"


async def test_it_goes_on_after_a_failure_which_is_logged_once(
    gateway: Any, start: Any, caplog: pytest.LogCaptureFixture
) -> None:
    server = await start(metric_gateway=gateway.address, push_interval=0.01)
    gateway.status = 500
    task = asyncio.create_task(push_forever(server.frontend))
    await server.settle(lambda: len(gateway.pushes) >= 3)
    assert caplog.text.count("cannot push metrics") == 1
    gateway.status = 200
    count = len(gateway.pushes)
    await server.settle(lambda: len(gateway.pushes) >= count + 2)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert caplog.text.count("cannot push metrics") == 1


def test_a_group_has_the_labels_of_its_flags() -> None:
    assert grouping_key(ServeConfig(grouping_key=("a=b=c",))) == {"a": "b=c"}
    assert grouping_key(ServeConfig()) == {}
