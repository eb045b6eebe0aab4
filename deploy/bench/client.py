"""The load generator's HTTP client: sends a request, times its stream, reports its error.

It also asks the server for its name and settings. Reading a chunk takes a few microseconds;
`metrics.py` reports the CPU time of this process.
"""

import contextlib
import itertools
import json
import time
import urllib.parse
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import msgspec
from tokenizers import Tokenizer

from ...shared.errors import StartError
from .prompts import Prompt
from .settings import Settings
from .stream import Outcome, StreamReader, message_of

_PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
_ASK_TIMEOUT = aiohttp.ClientTimeout(total=20)
_MAX_ERROR_BYTES = 4096
_CONNECT_S = 30.0
clock = time.perf_counter
encode = msgspec.json.Encoder().encode


@contextlib.asynccontextmanager
async def open_session(settings: Settings) -> AsyncIterator[aiohttp.ClientSession]:
    """Connections to the server: one per running request, reused by later requests."""
    headers = {"Accept-Encoding": "identity"}
    if settings.api_key:
        headers["Authorization"] = f"Bearer {settings.api_key}"
    timeout = aiohttp.ClientTimeout(
        total=None, sock_connect=_CONNECT_S, sock_read=settings.timeout_s
    )
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, headers=headers
    ) as session:
        yield session


class Client:
    """Sends prompts to one route. `tokenizer` counts tokens if the server does not."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        settings: Settings,
        model: str,
        tokenizer: Tokenizer | None,
    ) -> None:
        self._session = session
        self._settings = settings
        self._model = model
        self._tokenizer = tokenizer
        self._url = settings.url.rstrip("/") + _PATHS[settings.route]

    def body(self, prompt: Prompt) -> bytes:
        """The request for a prompt, as JSON."""
        settings = self._settings
        body: dict[str, Any] = {"model": self._model}
        if settings.route == "chat":
            body["messages"] = [{"role": "user", "content": prompt.content}]
        else:
            body["prompt"] = prompt.content
        body |= {
            "max_tokens": prompt.output_len,
            "temperature": settings.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if settings.ignore_eos:
            body["ignore_eos"] = True
        return encode(body | settings.extra_body)

    async def send(self, prompt: Prompt) -> Outcome:
        """Send a prompt and read its stream to the end. The outcome holds any error."""
        body = self.body(prompt)
        reader = StreamReader(keep_text=self._tokenizer is not None)
        outcome = Outcome(clock(), prompt.num_tokens, prompt.output_len)
        try:
            await self._stream(body, reader)
        except aiohttp.ConnectionTimeoutError:
            reader.error = f"no connection within {_CONNECT_S:g} s"
        except TimeoutError:
            reader.error = f"no byte for {self._settings.timeout_s:g} s"
        except (aiohttp.ClientError, OSError) as error:
            reader.error = f"{type(error).__name__}: {error}"
        self._settle(outcome, reader)
        return outcome

    async def _stream(self, body: bytes, reader: StreamReader) -> None:
        headers = {"Content-Type": "application/json"}
        async with self._session.post(
            self._url, data=body, headers=headers, allow_redirects=False
        ) as response:
            if response.status != 200:
                text = await response.content.read(_MAX_ERROR_BYTES)
                reader.error = f"HTTP {response.status}: {_error_text(text)}"
                return
            async for data in response.content.iter_any():
                reader.feed(data, clock())
            reader.close(clock())

    def _settle(self, outcome: Outcome, reader: StreamReader) -> None:
        """Compute times and counts from the stream that was read."""
        outcome.error = reader.error
        ended_s = clock() if reader.last_s is None else reader.last_s
        outcome.end_s = ended_s
        # A token without text, such as a special token, makes no chunk: it counts at the end.
        times = reader.arrivals_s or [ended_s]
        if outcome.error is None:
            outcome.ttft_s = times[0] - outcome.start_s
            outcome.gaps_s = [later - earlier for earlier, later in itertools.pairwise(times)]
        outcome.prompt_tokens = reader.prompt_tokens or outcome.prompt_tokens
        if reader.output_tokens is not None:
            outcome.output_tokens, outcome.counted_by = reader.output_tokens, "usage"
        elif self._tokenizer is not None:
            text = "".join(reader.texts)
            outcome.output_tokens = len(self._tokenizer.encode(text, add_special_tokens=False).ids)
            outcome.counted_by = "tokenizer"
        else:
            outcome.output_tokens, outcome.counted_by = len(reader.arrivals_s), "chunks"


async def ask_server(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    """The server's `models`, `version` and `info` (its flags), each None if it has no such route.
    Raises StartError if no server answers."""
    base = url.rstrip("/")
    paths = {"models": "/v1/models", "version": "/version", "info": "/get_server_info"}
    try:
        return {name: await _ask(session, base + path) for name, path in paths.items()}
    except (aiohttp.ClientError, OSError) as error:
        why = str(error) or type(error).__name__
        raise StartError(f"no server answers at {url}: {why}; --url says where it is") from None


async def _ask(session: aiohttp.ClientSession, url: str) -> Any:
    async with session.get(url, timeout=_ASK_TIMEOUT) as response:
        if response.status != 200:
            return None
        try:
            return json.loads(await response.read())
        except ValueError:
            return None


def served_model(server: dict[str, Any]) -> str:
    """The name of the first model served. Raises StartError if the server does not say."""
    try:
        return str(server["models"]["data"][0]["id"])
    except (TypeError, KeyError, IndexError):
        raise StartError("the server does not say what it serves: name it with --model") from None


def is_local(url: str) -> bool:
    """Whether the server runs on this machine and therefore uses its GPU."""
    host = urllib.parse.urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def _error_text(data: bytes) -> str:
    try:
        return message_of(json.loads(data))
    except ValueError:
        return message_of(data.decode(errors="replace"))
