"""A frontend in this process, its client on a real HTTP port, and a scheduler that is played."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from glimmer.frontend.app import listen, load
from glimmer.frontend.context import Frontend
from glimmer.frontend.engine.client import EngineClient
from glimmer.frontend.text.tokenizer import Tokenizer
from glimmer.shared.config import ServeConfig
from glimmer.shared.messages import (
    Abort,
    Finished,
    FlushCache,
    Heartbeat,
    Hello,
    Message,
    PeerLost,
    Ready,
    Submit,
    TokenLogprob,
    TokenRow,
    Tokens,
)
from glimmer.shared.model_spec import load_model_spec
from glimmer.shared.transport import AsyncReceiver, Sender, frontend_address, scheduler_address

MAX_TOTAL = 512
TEXT = "the answer to the question"


@dataclass
class FakeEngine:
    """Plays the scheduler. By itself it answers every Submit with `output_ids`, one message per
    token; with `manual` set the test says what it sends. It obeys max_new_tokens, stop ids and
    aborts, and ends every Submit with exactly one Finished."""

    runtime_dir: str
    output_ids: list[int] = field(default_factory=list)
    manual: bool = False
    tokens_per_message: int = 1
    num_cached_tokens: int = 3
    refusal: Finished | None = None  # its reason and message, for every Submit
    submits: list[Submit] = field(default_factory=list)
    aborts: list[Abort] = field(default_factory=list)
    hellos: list[Hello] = field(default_factory=list)
    flushes: int = 0
    finished: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._receiver = AsyncReceiver.bind(scheduler_address(self.runtime_dir))
        self._sender = Sender.connect(frontend_address(self.runtime_dir, 0))
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        try:
            while True:
                for message in await self._receiver.receive_async():
                    self._handle(message)
                self._changed.set()
        finally:
            for task in self._tasks:
                task.cancel()
            self._receiver.close()
            self._sender.close()

    def send(self, message: Message) -> None:
        self._sender.send(message)

    def ready(self, epoch: int = 0) -> None:
        self.send(Ready("scheduler", 0, epoch, 100, MAX_TOTAL))

    def beat(self, **changes: Any) -> None:
        values: dict[str, Any] = {
            "steps": 1,
            "num_running": 0,
            "num_waiting": 0,
            "num_paused": 0,
            "pages_total": 100,
            "pages_free": 60,
            "pages_cached": 15,
            "worker_ready": True,
            "preemptions": 2,
            "prefix_queries": 1000,
            "prefix_hits": 250,
            "generated_tokens": 77,
            "malformed_messages": 0,
            "estimated_peak_tokens": 3200,
        }
        self.send(Heartbeat(**{**values, **changes}))

    def tokens(self, submit: Submit, ids: list[int]) -> None:
        wanted = submit.sampling.num_logprobs
        logprobs = [self.logprob(i, wanted) for i in ids] if wanted >= 0 else []
        self.send(Tokens([TokenRow(submit.request_id, ids, logprobs)]))

    def logprob(self, token_id: int, num_top: int) -> TokenLogprob:
        top = [(token_id, -0.5), *((n, -1.0 - n) for n in range(1, num_top))][:num_top]
        return TokenLogprob(token_id, -0.5, 1, top)

    def finish(self, submit: Submit, reason: str, num_output: int = 0, **more: Any) -> None:
        assert submit.request_id not in self.finished, "two endings"
        self.finished.add(submit.request_id)
        self.send(
            Finished(
                submit.request_id,
                reason,
                len(submit.prompt_ids),
                num_output,
                min(self.num_cached_tokens, len(submit.prompt_ids)),
                **more,
            )
        )

    def lose(self, reason: str) -> None:
        """What the launcher says when this process dies."""
        self.send(PeerLost("scheduler", 0, reason))

    async def submitted(self, count: int = 1) -> list[Submit]:
        """The first `count` requests, once they are here."""
        await self.until(lambda: len(self.submits) >= count)
        return self.submits

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    @property
    def aborted_ids(self) -> list[int]:
        return [i for abort in self.aborts for i in abort.request_ids]

    def _handle(self, message: Any) -> None:
        match message:
            case Submit():
                self.submits.append(message)
                if self.refusal is not None:
                    self.finish(
                        message,
                        self.refusal.reason,
                        message=self.refusal.message,
                        field=self.refusal.field,
                        retry_after_s=self.refusal.retry_after_s,
                    )
                elif not self.manual:
                    task = asyncio.create_task(self._answer(message))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
            case Abort():
                self.aborts.append(message)
            case Hello():
                self.hellos.append(message)
            case FlushCache():
                self.flushes += 1
            case _:
                raise AssertionError(message)

    async def _answer(self, submit: Submit) -> None:
        reason, ids = "length", self.output_ids[: submit.sampling.max_new_tokens]
        stops = [n for n, i in enumerate(ids) if i in submit.sampling.stop_token_ids]
        if stops:
            reason, ids = "stop", ids[: stops[0] + 1]
        sent = 0
        if submit.sampling.num_prompt_logprobs >= 0:
            entries = [
                self.logprob(i, submit.sampling.num_prompt_logprobs) for i in submit.prompt_ids[1:]
            ]
            self.send(Tokens([TokenRow(submit.request_id, [], [], entries)]))
        while sent < len(ids) and submit.request_id not in self.aborted_ids:
            piece = ids[sent : sent + self.tokens_per_message]
            self.tokens(submit, piece)
            sent += len(piece)
            await asyncio.sleep(0)
        aborted = submit.request_id in self.aborted_ids
        self.finish(submit, "abort" if aborted else reason, sent)


@dataclass
class Harness:
    """A serving frontend, its engine and an HTTP client."""

    frontend: Frontend
    engine: FakeEngine
    session: aiohttp.ClientSession
    url: str

    async def post(self, path: str, body: Any, **more: Any) -> tuple[int, Any]:
        async with self.session.post(self.url + path, json=body, **more) as reply:
            data = await reply.read()
            return reply.status, json.loads(data) if "json" in reply.content_type else data

    async def get(self, path: str) -> tuple[int, str]:
        async with self.session.get(self.url + path) as reply:
            return reply.status, await reply.text()

    async def stream(self, path: str, body: Any) -> bytes:
        """The whole body of an event stream, as bytes."""
        async with self.session.post(self.url + path, json=body) as reply:
            assert reply.status == 200, await reply.text()
            assert reply.content_type == "text/event-stream"
            return await reply.read()

    async def events(self, path: str, body: Any) -> list[Any]:
        """The JSON of each event; [DONE] stays text."""
        blocks = (await self.stream(path, body)).decode().split("\n\n")
        assert blocks.pop() == ""
        found = [block.removeprefix("data:").strip() for block in blocks]
        return [text if text == "[DONE]" else json.loads(text) for text in found]

    async def exchange(self, data: bytes) -> bytes:
        """Send bytes on a new connection; everything up to the end of the answer's head."""
        port = int(self.url.rsplit(":", 1)[1])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(data)
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
        writer.close()
        await writer.wait_closed()
        return head

    def reset(self) -> "Harness":
        """Forget what earlier tests did with the engine."""
        self.engine.submits.clear()
        self.engine.aborts.clear()
        self.engine.manual = False
        return self

    def settle(self, condition: Callable[[], bool]) -> Awaitable[None]:
        """Wait until this process has reached a state."""

        async def wait() -> None:
            async with asyncio.timeout(10):
                while not condition():
                    await asyncio.sleep(0.005)

        return wait()


Start = Callable[..., Awaitable[Harness]]


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> Iterator[Tokenizer]:
    tokenizer = Tokenizer(tiny_model, load_model_spec(tiny_model).vocab_size)
    yield tokenizer
    tokenizer.close()


@pytest.fixture
def text_ids(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    return lambda text: tokenizer._encode(text, False)


@contextlib.asynccontextmanager
async def played_engine(
    tokenizer: Tokenizer, directory: Path, kind: type[FakeEngine] = FakeEngine
) -> AsyncIterator[FakeEngine]:
    """A played scheduler that is not ready yet."""
    engine = kind(str(directory), [*tokenizer._encode(TEXT, False), 524])
    task = asyncio.create_task(engine.run())
    yield engine
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@contextlib.asynccontextmanager
async def serving(
    model_dir: Path, tokenizer: Tokenizer, engine: FakeEngine, ready: bool = True, **settings: Any
) -> AsyncIterator[Harness]:
    """One frontend with these settings, on a port of its own."""
    base: dict[str, Any] = {
        "model_dir": str(model_dir),
        "model_name": "tiny",
        "eos_id": load_model_spec(model_dir).eos_token_ids,
        "max_req_total_len": MAX_TOTAL,
        "running_max_req_size": 8,
        "max_body_mb": 1.0,
    }
    config = ServeConfig(**{**base, **settings})
    async with contextlib.AsyncExitStack() as stack:
        client = EngineClient(engine.runtime_dir, 0, Hello("frontend", 0, 1, config.config_hash()))
        link = asyncio.create_task(client.run())

        async def stop() -> None:
            link.cancel()
            await asyncio.gather(link, return_exceptions=True)

        stack.push_async_callback(stop)
        is_usual = config.model_dir == base["model_dir"] and config.chat_template is None
        frontend = load(config, client, tokenizer if is_usual else None)
        stack.callback(frontend.grammars.close)
        if not is_usual:
            stack.callback(frontend.tokenizer.close)
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 256 << 10)  # as that of a server
        listener.setblocking(False)
        runner = await listen(frontend, listener)
        stack.push_async_callback(runner.cleanup)
        session = await stack.enter_async_context(aiohttp.ClientSession())
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        harness = Harness(frontend, engine, session, url)
        if ready:
            engine.ready()
            engine.beat()
            state = client.state
            await harness.settle(lambda: state.heartbeat is not None and bool(state.ready))
        yield harness


@pytest.fixture
async def fake_engine(tokenizer: Tokenizer, tmp_path: Path) -> AsyncIterator[FakeEngine]:
    """A played scheduler that is not ready yet."""
    async with played_engine(tokenizer, tmp_path) as engine:
        yield engine


@pytest.fixture
async def start(
    tiny_model: Path, tokenizer: Tokenizer, fake_engine: FakeEngine
) -> AsyncIterator[Start]:
    """Starts one frontend with the given settings; everything is stopped after the test."""
    async with contextlib.AsyncExitStack() as stack:

        async def go(ready: bool = True, **settings: Any) -> Harness:
            server = serving(tiny_model, tokenizer, fake_engine, ready, **settings)
            return await stack.enter_async_context(server)

        yield go


@pytest.fixture
async def server(start: Start) -> Harness:
    """One with the default settings."""
    return await start()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def module_server(
    tiny_model: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Harness]:
    """One server for all tests of a module, which run on the loop of the module."""
    async with (
        played_engine(tokenizer, tmp_path_factory.mktemp("frontend")) as engine,
        serving(tiny_model, tokenizer, engine) as harness,
    ):
        yield harness


class LongEngine(FakeEngine):
    """Takes long prompts."""

    def ready(self, epoch: int = 0) -> None:
        self.send(Ready("scheduler", 0, epoch, 100, 16_384))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def long_server(
    tiny_model: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Harness]:
    """As `module_server`, for prompts of up to 16,384 tokens."""
    async with (
        played_engine(tokenizer, tmp_path_factory.mktemp("long"), LongEngine) as engine,
        serving(tiny_model, tokenizer, engine, max_req_total_len=16_384) as harness,
    ):
        yield harness
