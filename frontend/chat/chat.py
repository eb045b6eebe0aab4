"""A conversation in, the assistant's message out: what all chat routes share.

A route turns its body into a `ChatRequest` (`request.py`), opens it with `open_chat`, and writes
the deltas of each reply's `ChatStream` in its own format. Errors name fields as
/v1/chat/completions spells them.
"""

from collections.abc import Sequence
from functools import partial

from aiohttp import web

from ...shared.messages import TokenLogprob
from ..context import CONTEXT, Frontend
from ..engine.job import Job, Reply, open_job
from ..parsers.deltas import Delta, merge
from ..parsers.glm import TAGS, GlmParser, ParserOptions, State
from ..text.detokenize import DecodedToken, Decoder, TextOptions, Vocabulary
from .content_filter import ContentFilter
from .request import ChatRequest


async def open_chat(
    frontend: Frontend, request: web.Request, chat: ChatRequest
) -> "Job[ChatStream]":
    """Render the prompt and submit it. Raises RequestError for mistakes of the client,
    OverloadedError or UnavailableError when the request cannot be taken now."""
    request[CONTEXT].ignore(chat.left_out, frontend.config.strict_fields)
    prompt = await prompt_ids(frontend, chat)
    options = _parser_options(frontend, chat, prompt)
    vocabulary = frontend.tokenizer.vocabulary
    spec, end_id = chat.spec, vocabulary.added_ids.get("</think>", -1)
    if chat.thinking_budget >= 0 and options.starts_in_reasoning and end_id >= 0:
        spec = spec.with_thinking_budget(chat.thinking_budget, end_id)
    make_stream = partial(ChatStream, vocabulary, spec.text, options)
    return await open_job(frontend, request, [prompt], spec, make_stream, "messages", chat.tools)


async def prompt_ids(frontend: Frontend, chat: ChatRequest) -> list[int]:
    """Token ids of the prompt. Raises RequestError."""
    return await frontend.tokenizer.encode_chat(
        chat.messages,
        chat.tools.tools if chat.tools else None,
        chat.template_kwargs,
        frontend.client.max_req_total_len,
        chat.prefill,
    )


def _parser_options(frontend: Frontend, chat: ChatRequest, prompt: list[int]) -> ParserOptions:
    config = frontend.config
    ids = frontend.tokenizer.vocabulary.added_ids
    tools = None
    if config.tool_call_parser is not None and chat.tools is not None:
        functions = [tool["function"] for tool in chat.tools.tools]
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


class ChatStream:
    """One chat reply while its tokens arrive: token ids -> deltas.

    Decodes, parses (`parsers/glm.py`), counts and ends the reply. A `ContentFilter` joins in if
    there are stop strings or if log-probabilities are requested.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        options: TextOptions,
        parser_options: ParserOptions,
        max_new_tokens: int,
    ) -> None:
        self.max_new_tokens = max_new_tokens
        self.num_tokens = 0
        self.num_reasoning_tokens = 0  # of these, without tags and the end token
        self.finish_reason: str | None = None
        self.must_abort = False
        self.parser = GlmParser(parser_options)
        self._stop_token_ids = options.stop_token_ids
        self._decoder = Decoder(vocabulary, options)
        self._filter: ContentFilter | None = None
        if options.stop_strings or options.record_tokens:
            self._filter = ContentFilter(options, self.parser, self._decoder)
        self._deltas: list[Delta] = []  # not taken yet
        self._is_closed = False

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the reply, if one did."""
        return self._filter.stop_string if self._filter else None

    def add(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob] = ()) -> None:
        """Add tokens. `logprobs` is parallel to them or empty."""
        for n, token_id in enumerate(token_ids):
            if self.finish_reason is not None:
                break
            self.num_tokens += 1
            text = self._decoder.text(token_id)
            was_reasoning = self.parser.state is State.REASONING
            deltas = self.parser.feed(token_id, text)
            if was_reasoning and self.parser.state is State.REASONING:
                self.num_reasoning_tokens += bool(text) or not self._decoder.is_silent(token_id)
            if token_id in self._stop_token_ids:
                self.finish_reason = "stop"
            elif self.num_tokens >= self.max_new_tokens:
                self.finish_reason = "length"
            if self._filter is not None:
                token = DecodedToken(token_id, text, 0, logprobs[n] if logprobs else None)
                deltas = self._filter.add(token, self.num_tokens, deltas)
                self._check_stop_string()
            self._deltas += deltas
        if self.finish_reason is not None:
            self.close(self.finish_reason)

    def close(self, reason: str) -> None:
        """No more tokens follow; "stop" means that the model ended its turn. A second call does
        nothing."""
        if self._is_closed or self.stop_string is not None:
            return
        self._is_closed = True
        deltas = self.parser.finish(by_itself=reason == "stop")
        if self._filter is not None:
            deltas = self._filter.finish(deltas, self.num_tokens)
            self._check_stop_string()
        self._deltas += deltas

    def take(self) -> tuple[list[Delta], list[DecodedToken]]:
        """Deltas that were not taken before, neighbours of a kind merged, and the recorded tokens
        of their content."""
        deltas, self._deltas = self._deltas, []
        tokens = self._filter.take_tokens() if self._filter else []
        return merge(deltas) if len(deltas) > 1 else deltas, tokens

    def _check_stop_string(self) -> None:
        """A stop string ends the reply before the engine knows."""
        if self.stop_string is not None:
            self.must_abort = self.finish_reason is None
            self.finish_reason = "stop"


def chat_finish_reason(reply: Reply[ChatStream]) -> str | None:
    """ "stop", "length", "tool_calls" or "abort" once the engine has ended the reply."""
    if reply.finished is None:
        return None
    if reply.finish_reason == "stop" and reply.stream.parser.num_calls:
        return "tool_calls"
    return reply.finish_reason
