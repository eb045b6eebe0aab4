"""Rules about a reply's text and tool calls -> a checked `Grammar` for the worker.

`output_format.py` has read the text's format from the body. This module adds what tool_choice and
parallel_tool_calls demand, and has all of it checked (`grammar/`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from ...shared.messages import Grammar
from ..context import Frontend
from ..grammar.source import Calls, GrammarSource, OutputFormat
from ..grammar.tool_calls import TAGS
from ..wire.schema import Json, wrong
from .params import GenerationSpec


@dataclass(frozen=True)
class ToolRules:
    """The tools that the model sees, and which of them it may or must call.

    `tools` is never empty; it is what `check_tools` returns. `name`: exactly one call of this
    declared tool. `callable_names`: calls of these tools only (None: of any).
    """

    tools: list[Json]
    choice: Literal["auto", "required"] = "auto"
    name: str | None = None  # implies "required"
    callable_names: frozenset[str] | None = None
    parallel: bool = True  # whether a reply may have several calls


async def constraint_for(
    frontend: Frontend,
    spec: GenerationSpec,
    prompts: Sequence[list[int]] = (),
    tools: ToolRules | None = None,
) -> Grammar | None:
    """The grammar that a request demands; None if it demands none.

    If all prompts end in `<think>`, the grammar begins after `</think>`.

    Raises RequestError naming the field: contradictions, and schemas that are invalid,
    unsupported, or over the limits of time, memory or size. Raises OverloadedError when too many
    checks wait, UnavailableError when the checking process does not answer.
    """
    source = _source(spec.output_format, tools)
    if source is None:
        return None
    ids = frontend.tokenizer.vocabulary.added_ids
    if source.calls != "no" and any(tag not in ids for tag in TAGS):
        raise wrong("tool_choice", "this model's vocabulary has no tool-call tokens")
    if not spec.sampling.stop_token_ids:
        enforced = "tool_choice, parallel_tool_calls or strict tools"
        raise wrong("ignore_eos", f"cannot be combined with {enforced}")
    grammar = await frontend.grammars.check(source)
    think, answer = ids.get("<think>"), ids.get("</think>")
    in_reasoning = bool(prompts) and all(prompt[-1:] == [think] for prompt in prompts)
    if in_reasoning and answer is not None:
        banned = tuple(ids[tag] for tag in TAGS if tag in ids)
        return msgspec.structs.replace(grammar, start_id=answer, banned_ids=banned)
    return grammar


def _source(form: OutputFormat | None, tools: ToolRules | None) -> GrammarSource | None:
    calls = "no" if tools is None else _calls(form, tools)
    if tools is None or calls == "no":
        return None if form is None else GrammarSource(form)
    names = tools.callable_names if tools.name is None else {tools.name}
    functions = []
    fields = []
    for n, tool in enumerate(tools.tools):
        function = tool["function"]
        if names is not None and function["name"] not in names:
            continue
        # Agents mark tools as strict by habit. If a tool need not be called, a schema that no
        # grammar can express is no reason to refuse the request.
        strict = _is_strict(tool) and calls == "must"
        parameters = function.get("parameters") or {}
        functions.append({"name": function["name"], "parameters": parameters, "strict": strict})
        fields.append(f"tools[{n}].function.parameters")
    if calls == "must":
        form = None
    parallel = tools.parallel and tools.name is None
    return GrammarSource(form, calls, parallel, tuple(functions), tuple(fields))


def _calls(form: OutputFormat | None, tools: ToolRules) -> Calls:
    """Whether the grammar has calls, and whether one must be made."""
    if tools.name is not None or tools.choice == "required":
        return "must"
    is_restricted = tools.callable_names is not None or not tools.parallel
    if form is None and not is_restricted and not any(map(_is_strict, tools.tools)):
        return "no"
    if form is not None and form.kind == "grammar":
        raise wrong(form.field, "cannot be combined with tools")
    return "may"


def _is_strict(tool: Json) -> bool:
    return tool["function"].get("strict") is True
