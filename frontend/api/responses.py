"""OpenAI's /v1/responses, stateless: writes a chat reply as output items and their events.

Every event has its type as name and a running `sequence_number`. An item is announced empty, filled
by deltas, and repeated whole when it is done; the last event repeats the whole response. A reply
that does not stream is the response after the same steps.
"""

import secrets
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import msgspec
from aiohttp import web

from ...shared.errors import HttpError
from ...shared.sampling import SamplingParams
from ..chat.chat import ChatStream, chat_finish_reason, open_chat
from ..chat.client_tools import ClientTool, Forms, input_text, own_arguments
from ..context import Frontend
from ..engine.job import Reply, Usage
from ..parsers.deltas import CallArguments, CallStart, Content, Delta, Reasoning
from ..text.detokenize import DecodedToken, Vocabulary
from ..wire.body import Payload, encode_json, json_reply
from ..wire.schema import Json, spelled
from ..wire.sse import KEEP_ALIVE, stream_reply
from .openai import chat_logprobs
from .responses_request import ResponsesBody, responses_chat

_NAMES = {
    "messages": "input",
    r"tools\[(\d+)\]\.function": r"tools[\1]",
    "max_tokens": "max_output_tokens",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
_TEXT_ITEMS = ("message", "reasoning")
_STATUS = {"stop": "completed", "tool_calls": "completed", "length": "incomplete"}
_ECHOED = (
    *("instructions", "max_output_tokens", "max_tool_calls", "metadata", "user"),
    *("previous_response_id", "safety_identifier", "prompt_cache_key"),
    *("temperature", "top_p", "presence_penalty", "frequency_penalty"),
)


async def responses(
    frontend: Frontend, request: web.Request, payload: Payload
) -> web.StreamResponse:
    """POST /v1/responses: the next items of a conversation. Nothing is stored."""
    build = partial(responses_chat, facts=frontend.facts)
    with spelled(_NAMES):
        body, conversation = await payload.decode(ResponsesBody, build, "input")
        opening = open_chat(frontend, request, conversation)
        forms = conversation.forms
        _fill(body, conversation.spec.sampling)
        del conversation
        opened = await opening
    with opened as job:
        writer = ResponseWriter(body, frontend.tokenizer.vocabulary, job.usage, forms)
        if body.stream:
            return await stream_reply(job, writer)
        while job.generation.is_open:  # the events are dropped, the items remain
            for reply in await job.receive():
                writer.add(reply)
        writer.end()
        return await json_reply(job, lambda: writer.response)


class ResponseWriter:
    """The items and events of one response. `response` is its state so far."""

    keep_alive = KEEP_ALIVE

    def __init__(
        self,
        body: ResponsesBody,
        vocabulary: Vocabulary,
        usage: Callable[[], Usage],
        forms: Forms,
    ) -> None:
        self.response = _opening(body)
        self._forms = forms
        self._vocabulary = vocabulary
        self._count_usage = usage
        self._sequence_number = 0
        self._finish_reason = "stop"
        self._item: Json | None = None  # the open one, the last of the output
        self._texts: list[str] = []  # its text or arguments so far
        self._logprobs: list[Json] = []
        self.opening = self._event("response.created", response=self.response)
        self.opening += self._event("response.in_progress", response=self.response)

    def add(self, reply: Reply[ChatStream]) -> bytes:
        """The events for new deltas."""
        events: list[bytes] = []
        deltas, tokens = reply.stream.take()
        for delta in deltas:
            events += self._delta(delta, tokens if isinstance(delta, Content) else [])
            tokens = [] if isinstance(delta, Content) else tokens
        if tokens and self._open_type == "message":
            events.append(self._text_delta("", tokens))  # of text that was sent before
        self._finish_reason = chat_finish_reason(reply) or self._finish_reason
        return b"".join(events)

    def end(self) -> bytes:
        """The end: completed, incomplete, or failed if the reply was aborted."""
        status = _STATUS.get(self._finish_reason)
        if status is None:
            return self._failed("the request was aborted")
        events = [*self._close(status)]
        if status == "incomplete":
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            self.response["completed_at"] = int(time.time())
        return b"".join([*events, self._finish(status)])

    def fail(self, error: HttpError) -> bytes:
        """The last events of a response that breaks."""
        return self._failed(str(error))

    def _failed(self, message: str) -> bytes:
        events = [*self._close("incomplete")]
        self.response["error"] = {"code": "server_error", "message": message}
        return b"".join([*events, self._finish("failed")])

    def _finish(self, status: str) -> bytes:
        self.response["status"] = status
        self.response["usage"] = _usage(self._count_usage())
        return self._event(f"response.{status}", response=self.response)

    # --- items ---

    def _delta(self, delta: Delta, tokens: list[DecodedToken]) -> Iterator[bytes]:
        match delta:
            case Reasoning(text):
                if self._open_type != "reasoning":
                    yield from self._open({"id": _new_id("rs"), "type": "reasoning", "summary": []})
                self._texts.append(text)
                yield self._part_event("response.reasoning_text.delta", delta=text)
            case Content(text):
                if self._open_type != "message":
                    item = {"id": _new_id("msg"), "type": "message", "role": "assistant"}
                    yield from self._open(item)
                yield self._text_delta(text, tokens)
            case CallStart(_, call_id, name):
                yield from self._open(_call(self._forms.get(name), call_id, name))
            case CallArguments(_, text):
                self._texts.append(text)
                if self._open_type == "function_call":  # else the arguments are no JSON text
                    yield self._item_event("response.function_call_arguments.delta", delta=text)

    def _text_delta(self, text: str, tokens: list[DecodedToken]) -> bytes:
        logprobs = chat_logprobs(self._vocabulary, tokens)["content"] if tokens else []
        self._texts.append(text)
        self._logprobs += logprobs
        return self._part_event("response.output_text.delta", delta=text, logprobs=logprobs)

    def _open(self, item: Json) -> Iterator[bytes]:
        yield from self._close("completed")
        self._item, self._texts, self._logprobs = item, [], []
        item["status"] = "in_progress"
        if item["type"] in _TEXT_ITEMS:
            item["content"] = []
        self.response["output"].append(item)
        yield self._output_event("response.output_item.added")
        if item["type"] in _TEXT_ITEMS:
            yield self._part_event("response.content_part.added", part=self._part())

    def _close(self, status: str) -> Iterator[bytes]:
        item = self._item
        if item is None:
            return
        text = "".join(self._texts)
        if item["type"] not in _TEXT_ITEMS:
            yield from self._close_call(item, text)
        else:
            item["content"] = [self._part()]
            if item["type"] == "reasoning":
                yield self._part_event("response.reasoning_text.done", text=text)
            else:
                done = {"text": text, "logprobs": self._logprobs}
                yield self._part_event("response.output_text.done", **done)
            yield self._part_event("response.content_part.done", part=item["content"][0])
        item["status"] = status
        yield self._output_event("response.output_item.done")
        self._item = None

    def _close_call(self, item: Json, arguments: str) -> Iterator[bytes]:
        match item["type"]:
            case "function_call":
                item["arguments"] = arguments
                done: Json = {"name": item["name"], "arguments": arguments}
                yield self._item_event("response.function_call_arguments.done", **done)
            case "custom_tool_call":
                item["input"] = input_text(arguments)
                yield self._item_event("response.custom_tool_call_input.delta", delta=item["input"])
                yield self._item_event("response.custom_tool_call_input.done", input=item["input"])
            case "apply_patch_call":
                item["operation"] |= own_arguments(arguments)
            case _:
                item["action"] |= own_arguments(arguments)

    def _part(self) -> Json:
        """The content of the open item."""
        text = "".join(self._texts)
        if self._open_type == "reasoning":
            return {"type": "reasoning_text", "text": text}
        part = {"type": "output_text", "text": text, "annotations": []}
        return {**part, "logprobs": self._logprobs}

    @property
    def _open_type(self) -> str | None:
        return self._item["type"] if self._item is not None else None

    # --- events ---

    def _part_event(self, kind: str, **more: Any) -> bytes:
        return self._item_event(kind, content_index=0, **more)

    def _item_event(self, kind: str, **more: Any) -> bytes:
        assert self._item is not None, "an event about an item that is not open"
        position = {"item_id": self._item["id"], "output_index": len(self.response["output"]) - 1}
        return self._event(kind, **position, **more)

    def _output_event(self, kind: str) -> bytes:
        index = len(self.response["output"]) - 1
        return self._event(kind, output_index=index, item=self._item)

    def _event(self, kind: str, **more: Any) -> bytes:
        data = {"type": kind, "sequence_number": self._sequence_number, **more}
        self._sequence_number += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), encode_json(data))


def _call(form: ClientTool | None, call_id: str, name: str) -> Json:
    """The item of a call, in the form of the tool that the function stands for."""
    form = form or ClientTool("function", name)
    match form.kind:
        case "function":
            item = {"id": _new_id("fc"), "type": "function_call", "call_id": call_id}
            item |= {"name": form.name, "arguments": ""}
        case "custom":
            item = {"id": _new_id("ctc"), "type": "custom_tool_call", "call_id": call_id}
            item |= {"name": form.name, "input": ""}
        case "apply_patch":
            item = {"id": _new_id("apc"), "type": "apply_patch_call", "call_id": call_id}
            return {**item, "operation": {}}
        case "local_shell":
            item = {"id": _new_id("lsh"), "type": "local_shell_call", "call_id": call_id}
            return {**item, "action": {"type": "exec", "command": [], "env": {}}}
        case "shell":
            item = {"id": _new_id("sh"), "type": "shell_call", "call_id": call_id}
            action: Json = {"commands": [], "timeout_ms": None, "max_output_length": None}
            return {**item, "action": action}
    return item if form.namespace is None else {**item, "namespace": form.namespace}


def _opening(body: ResponsesBody) -> Json:
    """The response before anything was generated: what was asked for, with defaults."""
    text = {"format": {"type": "text"}, **_without_nulls(msgspec.to_builtins(body.text or {}))}
    if text["format"].get("type") == "json_schema":
        text["format"] = {"description": None, "strict": False, **text["format"]}
    fields = {key: getattr(body, key) for key in _ECHOED}
    return {
        "id": _new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "model": body.model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "reasoning": msgspec.to_builtins(body.reasoning) or {"effort": None, "summary": None},
        "service_tier": "default",
        "store": False,
        "text": text,
        "tool_choice": body.tool_choice or "auto",
        "tools": [_whole_tool(tool) for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "truncation": "disabled",
        "usage": None,
        **fields,
        "metadata": body.metadata or {},
    }


def _fill(body: ResponsesBody, sampling: SamplingParams) -> None:
    """Put the values that are used where the client sent none."""
    body.temperature, body.top_p = sampling.temperature, sampling.top_p
    body.presence_penalty = sampling.presence_penalty
    body.frequency_penalty = sampling.frequency_penalty


def _whole_tool(tool: Json) -> Json:
    """A tool with every field of its schema."""
    if tool.get("type") != "function":
        return tool
    filled = {"description": None, "parameters": None, **tool}
    return {**filled, "strict": tool.get("strict") is True}


def _without_nulls(fields: Json) -> Json:
    return {key: value for key, value in fields.items() if value is not None}


def _usage(usage: Usage) -> Json:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.output_tokens,
    }


def _new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(24)}"
