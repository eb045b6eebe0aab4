"""A server whose replies are written down: what a load generator meets in the wild."""

import asyncio
import json
import threading
from typing import Any

from aiohttp import web

Json = dict[str, Any]


def event(value: Json | str) -> bytes:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"data: {text}\n\n".encode()


def text_chunk(text: str, finish_reason: str | None = None) -> bytes:
    return event({"choices": [{"index": 0, "text": text, "finish_reason": finish_reason}]})


def chat_chunk(finish_reason: str | None = None, **delta: Any) -> bytes:
    return event({"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]})


def usage_chunk(prompt: int, output: int) -> bytes:
    usage = {"prompt_tokens": prompt, "completion_tokens": output}
    return event({"choices": [], "usage": usage})


DONE = event("[DONE]")


def whole_reply(body: Json) -> list[bytes]:
    """As many chunks as tokens were asked for, then the counts."""
    number, prompt = body["max_tokens"], body.get("prompt", "")
    chunks = [text_chunk(" word") for _ in range(number)]
    return [*chunks, text_chunk("", "length"), usage_chunk(len(prompt), number), DONE]


class ScriptedServer:
    """Answers POSTs with the events of `script(body)`, `pause` seconds apart, or with `refusal`
    (status and JSON). `cut` breaks the connection after the events. Records the bodies and
    headers."""

    def __init__(self) -> None:
        self.script: Any = whole_reply
        self.refusal: tuple[int, Any] | None = None
        self.pause = 0.0
        self.cut = False
        self.hang = False
        self.bodies: list[Json] = []
        self.paths: list[str] = []
        self.headers: list[Any] = []
        self.most_running = 0
        self.info: Json | None = {"model_dir": "/nowhere", "version": "7"}
        self.models: Json | None = {"data": [{"id": "scripted"}]}
        self._running = 0

    async def post(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.paths.append(request.path)
        self.headers.append(request.headers)
        if self.refusal is not None:
            return web.json_response(self.refusal[1], status=self.refusal[0])
        self._running += 1
        self.most_running = max(self.most_running, self._running)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for piece in self.script(body):
            await response.write(piece)
            await asyncio.sleep(self.pause)
        while self.hang:
            await asyncio.sleep(0.01)
        self._running -= 1
        if self.cut:
            assert request.transport is not None
            request.transport.abort()
        return response

    async def get(self, request: web.Request) -> web.StreamResponse:
        answers = {"/v1/models": self.models, "/get_server_info": self.info}
        answer = answers.get(request.path)
        if answer is None:
            return web.Response(status=404, text="not here")
        return web.json_response(answer)


class RunningServer(ScriptedServer):
    """One in a thread of its own, since a benchmark has its own event loop."""

    url: str

    def run(self, ready: threading.Event) -> None:
        with asyncio.Runner() as runner:
            runner.run(self._serve(ready))

    async def _serve(self, ready: threading.Event) -> None:
        app = web.Application(client_max_size=1 << 28)
        app.router.add_post("/{tail:.*}", self.post)
        app.router.add_get("/{tail:.*}", self.get)
        app_runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await app_runner.setup()
        site = web.TCPSite(app_runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{app_runner.addresses[0][1]}"
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        ready.set()
        await self._stop.wait()
        self.hang = False
        await app_runner.cleanup()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
