"""One streamed reply as the client sees it: arrival times, number of tokens, how it ended.

Parses the chunks of OpenAI's two streaming routes as Glimmer, vLLM and LightLLM write them.
`client.py` feeds it the bytes.
"""

from dataclasses import dataclass, field
from typing import Any

import msgspec
from msgspec import Struct

_GOOD_ENDS = ("stop", "length", "tool_calls", "function_call")
_MAX_REASON = 300


@dataclass
class Outcome:
    """The result of one request. `start_s` and `end_s` are times of the benchmark's clock."""

    start_s: float
    prompt_tokens: int
    wanted_tokens: int
    output_tokens: int = 0
    counted_by: str = ""  # "usage", "tokenizer" or "chunks"
    ttft_s: float = 0.0
    end_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def e2e_s(self) -> float:
        """From sending to the last chunk."""
        return self.end_s - self.start_s

    @property
    def num_chunks(self) -> int:
        """Number of chunks with tokens."""
        return len(self.gaps_s) + 1


class _Delta(Struct):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None

    def text(self) -> str:
        """Reasoning may be under either of two names with the same text."""
        return (self.reasoning_content or self.reasoning or "") + (self.content or "")


class _Choice(Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Usage(Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Event(Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None
    object: str | None = None
    message: str | None = None


_decode = msgspec.json.Decoder(_Event).decode


class StreamReader:
    """Reads the bytes of one event stream as they arrive. `keep_text`: keep the text, to count its
    tokens if the server does not."""

    def __init__(self, keep_text: bool) -> None:
        self.arrivals_s: list[float] = []  # of chunks with tokens
        self.last_s: float | None = None  # of any chunk with a choice
        self.error: str | None = None
        self.finish_reason: str | None = None
        self.prompt_tokens: int | None = None
        self.output_tokens: int | None = None
        self.texts: list[str] = []
        self._keep_text = keep_text
        self._done = False
        self._tail = b""

    def feed(self, data: bytes, now_s: float) -> None:
        """Read bytes that arrived at `now_s`. They may end in the middle of an event."""
        lines = (self._tail + data).split(b"\n")
        self._tail = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):  # other lines: comments, event names, blank
                self._take(line[5:].strip(), now_s)

    def close(self, now_s: float) -> None:
        """The stream ended, perhaps without a newline. Sets `error` if the reply is incomplete."""
        self.feed(b"\n", now_s)
        if self.error is not None:
            return
        if not self._done and self.finish_reason is None:
            self.error = "the stream broke off: neither finish_reason nor [DONE]"
        elif self.finish_reason is not None and self.finish_reason not in _GOOD_ENDS:
            self.error = f"finish_reason {self.finish_reason}"
        elif not self.arrivals_s and (self.last_s is None or not self.output_tokens):
            self.error = "a stream without tokens"

    def _take(self, payload: bytes, now_s: float) -> None:
        if payload == b"[DONE]":
            self._done = True
            return
        try:
            event = _decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self.error = self.error or f"a chunk that is not understood: {error}"
            return
        if event.error is not None or event.object == "error":
            self.error = self.error or message_of(event.error or event.message)
        if event.usage is not None:
            self.prompt_tokens = event.usage.prompt_tokens
            self.output_tokens = event.usage.completion_tokens
        if event.choices:
            self.last_s = now_s
            self._take_choice(event.choices[0], now_s)

    def _take_choice(self, choice: _Choice, now_s: float) -> None:
        """Count a chunk as tokens unless it only opens or ends the reply. Such a chunk may have no
        text: a token may be half a character."""
        delta = choice.delta
        text = (choice.text or "") if delta is None else delta.text()
        is_frame = choice.finish_reason is not None or (delta is not None and delta.role)
        if text or (delta is not None and delta.tool_calls) or not is_frame:
            self.arrivals_s.append(now_s)
            if self._keep_text:
                self.texts.append(text)
        self.finish_reason = choice.finish_reason or self.finish_reason


def message_of(error: Any) -> str:
    """The text of an error object in any of the common formats."""
    for _ in range(4):
        if not isinstance(error, dict):
            break
        error = error.get("error") or error.get("message") or error.get("detail") or str(error)
    return " ".join(str(error).split())[:_MAX_REASON] or "an error without text"
