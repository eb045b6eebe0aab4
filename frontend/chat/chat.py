"""A conversation in, the assistant's message out: what all chat routes share.

A route turns its body into a `ChatRequest` (`request.py`), opens it with `open_chat`, and writes
the deltas of each reply's `ChatStream` in its own format. Errors name fields as
/v1/chat/completions spells them.
"""

from collections.abc import Sequence
from functools import partial

from aiohttp import web

from ...shared.messages import TokenLogprob
from ..context import Frontend
from ..engine.job import Job, Reply, open_job
from ..parsers.deltas import Content, Delta, merge
from ..parsers.glm import TAGS, GlmParser, ParserOptions, State
from ..text.detokenize import DecodedToken, Decoder, StopStrings, TextOptions, Vocabulary
from .request import ChatRequest


async def open_chat(
    frontend: Frontend, request: web.Request, chat: ChatRequest
) -> "Job[ChatStream]":
    """Render the prompt and submit it. Raises RequestError for mistakes of the client,
    OverloadedError or UnavailableError when the request cannot be taken now."""
    prompt = await prompt_ids(frontend, chat)
    options = _parser_options(frontend, chat, prompt)
    vocabulary = frontend.tokenizer.vocabulary
    make_stream = partial(ChatStream, vocabulary, chat.spec.text, options)
    return await open_job(
        frontend, request, [prompt], chat.spec, make_stream, "messages", chat.tools
    )


async def prompt_ids(frontend: Frontend, chat: ChatRequest) -> list[int]:
    """Token ids of the prompt. Raises RequestError."""
    return await frontend.tokenizer.encode_chat(
        chat.messages,
        chat.tools.tools if chat.tools else None,
        chat.template_kwargs,
        frontend.client.max_req_total_len,
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

    Decodes, parses (`parsers/glm.py`) and looks for stop strings. Stop strings are looked for in
    the content only, not in reasoning or calls, and never across a call. Log-probabilities are
    kept for the tokens that together are the content.
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
        self.stop_string: str | None = None  # the one that ended the reply
        self._parser = GlmParser(parser_options)
        self._options = options
        self._decoder = Decoder(vocabulary, options)
        self._stops = StopStrings(options.stop_strings)
        self._deltas: list[Delta] = []  # released, not taken yet
        self._held = ""  # content that may begin a stop string
        self._num_content = 0  # characters of content so far, with the held ones
        self._tokens: list[DecodedToken] = []  # of the content, not taken yet
        self._undecided: list[DecodedToken] = []  # whitespace that the parser holds
        self._name_tokens: list[DecodedToken] = []  # of text that may be the name of a tool
        self._is_closed = False

    @property
    def has_calls(self) -> bool:
        """Whether the reply has called a tool."""
        return self._parser.num_calls > 0

    def add(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob] = ()) -> None:
        """Add tokens. `logprobs` is parallel to them or empty."""
        options, parser = self._options, self._parser
        for n, token_id in enumerate(token_ids):
            if self.finish_reason is not None:
                break
            self.num_tokens += 1
            text = self._decoder.text(token_id)
            was_reasoning = parser.state is State.REASONING
            deltas = parser.feed(token_id, text)
            if was_reasoning and parser.state is State.REASONING:
                self.num_reasoning_tokens += bool(text) or not self._decoder.is_silent(token_id)
            if token_id in options.stop_token_ids:
                self.finish_reason = "stop"
            elif self.num_tokens >= self.max_new_tokens:
                self.finish_reason = "length"
            if options.record_tokens:
                logprob = logprobs[n] if logprobs else None
                self._record(DecodedToken(token_id, text, 0, logprob), deltas)
            self._release(deltas)
        if self.finish_reason is not None:
            self.close(self.finish_reason)

    def close(self, reason: str) -> None:
        """No more tokens follow; "stop" means that the model ended its turn. A second call does
        nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        if self.stop_string is None:
            deltas = self._parser.finish(by_itself=reason == "stop")
            if _has_content(deltas):
                self._show([*self._undecided, *self._name_tokens])
            self._release(deltas)
        self._release_held()

    def take(self) -> tuple[list[Delta], list[DecodedToken]]:
        """Deltas that were not taken before, neighbours of a kind merged, and the recorded tokens
        of their content."""
        deltas, self._deltas = self._deltas, []
        return merge(deltas) if len(deltas) > 1 else deltas, self._take_tokens()

    def _take_tokens(self) -> list[DecodedToken]:
        if not self._tokens:
            return []
        released = self._num_content - len(self._held)
        count = sum(token.offset < released for token in self._tokens)
        taken, self._tokens = self._tokens[:count], self._tokens[count:]
        return taken

    def _record(self, token: DecodedToken, deltas: list[Delta]) -> None:
        """Decide which tokens became content with this one."""
        if _has_content(deltas):
            self._show([*self._undecided, *self._name_tokens, token])
            self._undecided, self._name_tokens = [], []
        elif self._parser.state is State.NAME:
            self._name_tokens.append(token)
        elif deltas or self._parser.state is State.CALL:
            self._name_tokens = []
            if not self._parser.is_holding:  # whitespace before a call may still be held
                self._undecided = []
        elif self._parser.is_holding or self._is_part_of_character(token):
            self._undecided.append(token)
        else:
            self._undecided, self._name_tokens = [], []

    def _is_part_of_character(self, token: DecodedToken) -> bool:
        return not token.text and not self._decoder.is_silent(token.token_id)

    def _show(self, tokens: list[DecodedToken]) -> None:
        self._tokens += [token._replace(offset=self._num_content) for token in tokens]

    def _release(self, deltas: list[Delta]) -> None:
        """Append to the released deltas, up to a stop string."""
        for delta in deltas:
            if isinstance(delta, Content):
                self._release_content(delta)
            else:
                self._release_held()
                self._deltas.append(delta)
            if self.stop_string is not None:
                return

    def _release_content(self, delta: Content) -> None:
        self._num_content += len(delta.text)
        if not self._options.stop_strings or self.num_tokens < self._options.min_new_tokens:
            self._deltas.append(delta)
            return
        cut = self._stops.feed(delta.text)
        text = self._held + delta.text
        kept = len(text) - (cut or self._stops.num_partial)
        self._held = text[kept:]
        if kept:
            self._deltas.append(Content(text[:kept]))
        if cut:
            self._stop()

    def _stop(self) -> None:
        """The held text begins with a stop string: drop it and end the reply."""
        matches = [s for s in self._options.stop_strings if s and self._held.startswith(s)]
        self.stop_string = min(matches, key=len)  # a longer one would have ended later
        self._num_content -= len(self._held)
        self._held = ""
        self._tokens = [token for token in self._tokens if token.offset < self._num_content]
        self.must_abort = self.finish_reason is None
        self.finish_reason = "stop"

    def _release_held(self) -> None:
        if self._held:
            self._deltas.append(Content(self._held))
            self._held = ""
            self._stops = StopStrings(self._options.stop_strings)


def chat_finish_reason(reply: Reply[ChatStream]) -> str | None:
    """ "stop", "length", "tool_calls" or "abort" once the engine has ended the reply."""
    if reply.finished is None:
        return None
    if reply.finish_reason == "stop" and reply.stream.has_calls:
        return "tool_calls"
    return reply.finish_reason


def _has_content(deltas: list[Delta]) -> bool:
    return any(isinstance(delta, Content) for delta in deltas)
