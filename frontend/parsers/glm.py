"""GLM's output, token by token -> deltas: `--reasoning_parser glm45`, `--tool_call_parser glm47`.

    reasoning</think>content<tool_call>name<arg_key>k</arg_key><arg_value>v</arg_value></tool_call>

The tags are single tokens and are recognised by their ids. The same characters in ordinary tokens
are text, so the result does not depend on how the text is split into tokens. Only this is held
back: newlines next to the tags that end reasoning; whitespace around calls, which is dropped if
nothing else follows; a tool's name until it is complete; values other than strings until they are
complete.

Only calls of declared tools count. Other text after <tool_call> stays text at its position. A call
inside reasoning ends the reasoning.
"""

import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from .arguments import Arguments
from .deltas import CallArguments, CallStart, Content, Delta, Reasoning

TAGS = (
    *("<think>", "</think>", "<tool_call>", "</tool_call>"),
    *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
)
logger = logging.getLogger(__name__)


class State(Enum):
    """The part of a reply that the next token belongs to."""

    REASONING = auto()
    CONTENT = auto()
    NAME = auto()
    CALL = auto()


@dataclass(frozen=True)
class ParserOptions:
    """How to parse a reply. `tags`: id -> tag, for those of `TAGS` that the tokenizer has."""

    tags: Mapping[int, str]
    split_reasoning: bool = True  # False: think tags are text
    starts_in_reasoning: bool = False  # the prompt ends with <think>
    tools: Mapping[str, Any] | None = None  # name -> parameters; None: calls are text
    reasoning_as_content: bool = False  # joined in front of the content, without tags
    drop_reasoning: bool = False
    repeat_unclosed: bool = False  # repeat reasoning as content if the reply ends in it


class GlmParser:
    """One reply. `feed` takes its tokens in order, `finish` ends it; both return new deltas."""

    def __init__(self, options: ParserOptions) -> None:
        self.num_calls = 0
        self._deltas: list[Delta] = []  # of the present `feed` or `finish`
        self._options = options
        self._tags = options.tags
        inside = options.split_reasoning and options.starts_in_reasoning
        self.state = State.REASONING if inside else State.CONTENT
        self._origin = self.state  # the state before NAME; its text belongs there if it is no name
        self._name = ""
        self._arguments: Arguments  # of the open call; set in state CALL only
        self._held = ""  # whitespace that is dropped if a tag follows
        self._has_reasoning = False
        self._has_content = False
        self._skip_newlines = False  # right after </think>
        self._has_logged = False  # a <tool_call> without a declared tool; one line per reply
        self._unclosed: list[str] = []  # all reasoning, with `repeat_unclosed`

    @property
    def is_holding(self) -> bool:
        """Whether there is text that is neither returned nor dropped yet."""
        return bool(self._held) or self.state is State.NAME

    def feed(self, token_id: int, text: str) -> list[Delta]:
        """Add the next token and the text that it completes ("" if it completes none)."""
        tag = self._tags.get(token_id)
        if tag is None:
            if text:
                self._on_text(text)
        elif text:
            if len(text) > len(tag):  # an incomplete character before the tag
                self._on_text(text.removesuffix(tag))
            self._on_tag(tag)
        deltas, self._deltas = self._deltas, []
        return deltas

    def finish(self, by_itself: bool) -> list[Delta]:
        """No more tokens follow. `by_itself`: the model ended its turn, so an open call only lacks
        its end tag and is completed; else the output was cut off, and the call stays as it is."""
        if self.state is State.NAME and by_itself:
            if self._name.strip() in (self._options.tools or {}):
                self._start_call()
            else:
                self._not_a_name()
        if self.state is State.CALL and by_itself:
            self._argue(self._arguments.close())
        if self.state in (State.REASONING, State.CONTENT):
            self._end_text(by_itself)
        deltas, self._deltas = self._deltas, []
        return deltas

    def _end_text(self, by_itself: bool) -> None:
        held, self._held = self._held, ""
        if held and not (self.num_calls and self.state is State.CONTENT):
            self._say(held)
        if self._unclosed and by_itself and self.state is State.REASONING:
            self._deltas.append(Content("".join(self._unclosed)))

    def _on_text(self, text: str) -> None:
        match self.state:
            case State.CONTENT:
                self._content(text)
            case State.REASONING:
                self._reason(text)
            case State.CALL:
                self._argue(self._arguments.text(text))
            case State.NAME:
                self._add_to_name(text)

    def _on_tag(self, tag: str) -> None:
        match self.state:
            case State.REASONING:
                self._tag_in_reasoning(tag)
            case State.CONTENT:
                self._tag_in_content(tag)
            case State.NAME:
                self._tag_in_name(tag)
            case State.CALL:
                self._tag_in_call(tag)

    # --- reasoning and content ---

    def _reason(self, text: str) -> None:
        text = self._held + text
        if not self._has_reasoning:
            text = text.lstrip("\n")
        body = text.rstrip("\n")
        self._held = text[len(body) :]
        if body:
            self._has_reasoning = True
            self._say(body)

    def _tag_in_reasoning(self, tag: str) -> None:
        if tag == "</think>":
            self._end_reasoning()
            self._skip_newlines = True
        elif tag == "<tool_call>" and self._options.tools is not None:
            self._begin_name()
        elif tag != "<think>":
            self._reason(tag)

    def _end_reasoning(self) -> None:
        self.state, self._held, self._unclosed = State.CONTENT, "", []

    def _content(self, text: str) -> None:
        if self._skip_newlines:
            text = text.lstrip("\n")
            if not text:
                return
            self._skip_newlines = False
        if self._options.tools is not None and (self.num_calls or not self._has_content):
            text = self._held + text
            if not self._has_content and self.num_calls:
                text = text.lstrip()
            body = text.rstrip()
            if self.num_calls or not body:
                self._held, text = text[len(body) :], body
            else:
                self._held = ""
        if text:
            self._has_content = True
            self._say(text)

    def _tag_in_content(self, tag: str) -> None:
        if tag == "<tool_call>" and self._options.tools is not None:
            self._begin_name()
        elif self._options.split_reasoning and not self._has_content and tag == "</think>":
            self._end_reasoning()  # a second end tag, or one without a begin tag
            self._skip_newlines = True
        elif self._options.split_reasoning and not self._has_content and tag == "<think>":
            self.state, self._held = State.REASONING, ""
        else:
            self._content(tag)

    def _say(self, text: str) -> None:
        options = self._options
        if self.state is State.REASONING and options.drop_reasoning:
            pass
        elif self.state is State.CONTENT or options.reasoning_as_content:
            self._deltas.append(Content(text))
        else:
            self._deltas.append(Reasoning(text))
            if options.repeat_unclosed:
                self._unclosed.append(text)

    # --- calls ---

    def _begin_name(self) -> None:
        self._origin, self.state, self._name = self.state, State.NAME, ""

    def _add_to_name(self, text: str) -> None:
        self._name += text
        line, newline, _ = self._name.lstrip().partition("\n")
        name = line.rstrip()
        tools = self._options.tools or {}
        if newline and name in tools:
            self._start_call()
        elif newline or not any(tool.startswith(name) for tool in tools):
            self._not_a_name()

    def _tag_in_name(self, tag: str) -> None:
        name = self._name.strip()
        if tag == "<tool_call>" and not name:
            return  # written twice; one counts
        if name in (self._options.tools or {}):
            self._start_call()
        else:
            self._not_a_name()
        self._on_tag(tag)

    def _start_call(self) -> None:
        if self._origin is State.REASONING:
            self._end_reasoning()
        elif not self._has_content:
            self._held = ""
        self._skip_newlines = False
        name = self._name.strip().partition("\n")[0].rstrip()
        self._deltas.append(CallStart(self.num_calls, f"call_{secrets.token_hex(12)}", name))
        self.num_calls += 1
        self._arguments = Arguments((self._options.tools or {})[name])
        self.state = State.CALL

    def _not_a_name(self) -> None:
        """The text after <tool_call> names no declared tool: it is ordinary text."""
        if not self._has_logged:
            logger.info("output has <tool_call> and no declared tool after it: %.64r", self._name)
        self._has_logged = True
        self.state = self._origin
        self._on_text("<tool_call>" + self._name)

    def _tag_in_call(self, tag: str) -> None:
        ends = tag == "</tool_call>"
        begins = tag == "<tool_call>" and not self._arguments.in_value
        if not ends and not begins:
            self._argue(self._arguments.tag(tag))
            return
        self._argue(self._arguments.close())
        self.state = State.CONTENT
        if begins:  # the end tag of the last call is missing
            self._begin_name()

    def _argue(self, text: str) -> None:
        if text:
            self._deltas.append(CallArguments(self.num_calls - 1, text))
