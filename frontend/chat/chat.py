"""A conversation in, the assistant's messages out: what all chat routes share.

`openai.py` and the routes of other interfaces turn their bodies into a `ChatRequest`
(`chat_request.py` helps), open it, and write what a `ChatJob` gives them in their own format:

    with await open_chat(frontend, request, chat) as job:
        while job.is_open:
            for news in await job.receive():      # empty after a long wait: show life
                write(news.index, news.deltas, news.finish_reason)
        write(job.usage())

or `choices = await job.run()` for whole messages. All errors of the client's are raised by
`open_chat`, before anything is written. Errors name fields as /v1/chat/completions spells them.
"""

import dataclasses
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from aiohttp import web

from ..context import Frontend
from ..engine.constraints import constraint_for
from ..engine.job import Job
from ..engine.params import GenerationSpec
from ..parsers.deltas import Delta, Message, join
from ..parsers.glm import TAGS, ParserOptions
from ..text.detokenize import Piece
from .stream import ChatStream

Json = dict[str, Any]


@dataclass(frozen=True)
class ChatRequest:
    """One request of a chat route, in OpenAI's terms.

    `messages` and `tools` are as `conversation.py` leaves them (`normalise_messages`,
    `check_tools`). `spec` is `params.openai_spec`'s; it holds response_format and logprobs, too.
    `tool_choice`: "none" (tools are hidden, nothing is parsed), "auto" or "required";
    `tool_name`: exactly this declared tool, whatever `tool_choice` says. `callable_tools`: of the
    tools, which all are shown, those that may be called (None: all).
    """

    messages: list[Json]
    spec: GenerationSpec
    tools: list[Json] | None = None
    tool_choice: str = "auto"
    tool_name: str | None = None
    callable_tools: frozenset[str] | None = None
    parallel_tool_calls: bool = True
    template_kwargs: Json = field(default_factory=dict)  # the template's: enable_thinking, ...
    separate_reasoning: bool = True  # False: reasoning is joined in front of the content
    include_reasoning: bool = True  # False: it is not sent
    split_reasoning: bool = False  # also without --reasoning_parser

    @property
    def shown_tools(self) -> list[Json] | None:
        """The tools that the model gets to see, and may call."""
        hidden = self.tool_choice == "none" and self.tool_name is None
        return None if hidden else self.tools


@dataclass(frozen=True, slots=True)
class News:
    """What one choice produced since the last `receive`."""

    index: int
    deltas: list[Delta]
    pieces: list[Piece]  # tokens of the content with logprobs, if those were asked for
    finish_reason: str | None  # "stop", "length", "tool_calls" or "abort" once it has ended


@dataclass(frozen=True)
class Choice:
    """One whole reply."""

    index: int
    message: Message
    pieces: list[Piece]
    finish_reason: str
    stop_string: str | None  # of the request's, the one that ended it


@dataclass(frozen=True)
class Usage:
    """Token counts; output and reasoning tokens are summed over choices."""

    prompt_tokens: int
    output_tokens: int
    cached_tokens: int  # of the prompt, found in the prefix cache
    reasoning_tokens: int  # of the output


class ChatJob:
    """An open chat request: a `with` block, left early it aborts what still runs."""

    def __init__(self, job: Job, streams: list[ChatStream]) -> None:
        self._job, self._streams = job, streams

    @property
    def is_open(self) -> bool:
        """Whether more is to come."""
        return self._job.is_open

    @property
    def num_choices(self) -> int:
        """How many replies there will be."""
        return len(self._streams)

    async def receive(self) -> list[News]:
        """Wait for news. Empty after a long wait. Raises the HttpError that fits when the engine
        failed."""
        news = []
        for sequence in await self._job.receive():
            stream, reason = self._streams[sequence.index], None
            if sequence.finished is not None:
                reason = sequence.finish_reason or "stop"
                stream.close(reason)
                if reason == "stop" and stream.parser.num_calls:
                    reason = "tool_calls"
            news.append(News(sequence.index, *stream.take(), reason))
        return news

    async def run(self) -> list[Choice]:
        """Receive until the end: all choices, by index."""
        deltas: list[list[Delta]] = [[] for _ in self._streams]
        pieces: list[list[Piece]] = [[] for _ in self._streams]
        reasons = ["stop"] * len(self._streams)
        while self.is_open:
            for news in await self.receive():
                deltas[news.index] += news.deltas
                pieces[news.index] += news.pieces
                reasons[news.index] = news.finish_reason or "stop"
        return [
            Choice(index, join(deltas[index]), pieces[index], reason, self.stop_string(index))
            for index, reason in enumerate(reasons)
        ]

    def usage(self) -> Usage:
        """Counts so far; final when nothing is open."""
        reasoning = sum(stream.num_reasoning_tokens for stream in self._streams)
        return Usage(*self._job.usage(), reasoning)

    def stop_string(self, index: int) -> str | None:
        """The stop string that ended choice `index`, if one did."""
        return self._streams[index].stop_string

    def __enter__(self) -> "ChatJob":
        self._job.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._job.__exit__(kind, value, tb)


async def prompt_ids(frontend: Frontend, chat: ChatRequest) -> list[int]:
    """The prompt's token ids, for `open_chat` and for counting. Raises RequestError."""
    return await frontend.tokenizer.encode_chat(
        chat.messages,
        chat.shown_tools,
        chat.template_kwargs,
        frontend.client.max_req_total_len,
    )


async def open_chat(frontend: Frontend, request: web.Request, chat: ChatRequest) -> ChatJob:
    """Render, check and submit. Raises RequestError for what the client did wrong,
    OverloadedError or UnavailableError when it cannot be taken now."""
    prompt = await prompt_ids(frontend, chat)
    grammar = await constraint_for(
        frontend,
        chat.spec,
        prompt_ids=prompt,
        tools=chat.shown_tools,
        tool_choice=chat.tool_choice,
        tool_name=chat.tool_name,
        callable_tools=chat.callable_tools,
        parallel_tool_calls=chat.parallel_tool_calls,
    )
    spec = dataclasses.replace(chat.spec, grammar=grammar)
    options = _parser_options(frontend, chat, prompt)
    vocabulary = frontend.tokenizer.vocabulary
    streams: list[ChatStream] = []

    def make_stream(max_new_tokens: int) -> ChatStream:
        streams.append(ChatStream(vocabulary, spec.text, options, max_new_tokens))
        return streams[-1]

    return ChatJob(Job(frontend, request, [prompt], spec, "messages", make_stream), streams)


def _parser_options(frontend: Frontend, chat: ChatRequest, prompt: list[int]) -> ParserOptions:
    config = frontend.config
    ids = frontend.tokenizer.vocabulary.added_ids
    tools = None
    if config.tool_call_parser is not None and chat.shown_tools:
        functions = [tool["function"] for tool in chat.shown_tools]
        tools = {function["name"]: function.get("parameters", {}) for function in functions}
    return ParserOptions(
        tags={ids[tag]: tag for tag in TAGS if tag in ids},
        split_reasoning=config.reasoning_parser is not None or chat.split_reasoning,
        starts_in_reasoning=prompt[-1:] == [ids.get("<think>")],
        tools=tools,
        reasoning_as_content=not chat.separate_reasoning,
        drop_reasoning=not chat.include_reasoning,
        repeat_unclosed=config.repeat_unclosed_reasoning,
    )
