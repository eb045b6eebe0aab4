"""What a request wants its output to look like -> a compiled `Grammar` for the worker.

The text's format was read from the body by `output_format.py`; here joins what tool_choice and
parallel_tool_calls ask for, and all of it is compiled (`grammar/`).
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from ...shared.messages import Grammar
from ..context import Frontend
from ..grammar.source import Calls, GrammarSource, OutputFormat
from ..grammar.tool_calls import TAGS
from ..wire.schema import wrong
from .params import GenerationSpec

Json = dict[str, Any]


async def constraint_for(
    frontend: Frontend,
    spec: GenerationSpec,
    *,
    prompt_ids: Sequence[int] = (),
    tools: list[Json] | None = None,
    tool_choice: str = "auto",
    tool_name: str | None = None,
    callable_tools: frozenset[str] | None = None,
    parallel_tool_calls: bool = True,
) -> Grammar | None:
    """The grammar that a request asks for, None if it asks for none. Put the result into
    `GenerationSpec.grammar`; `Job` does the rest.

    prompt_ids: when they end in `<think>` the grammar begins after `</think>`. tools: as
    `check_tools` leaves them. tool_choice: "none", "auto" or "required"; tool_name: exactly one
    call of this one, whatever tool_choice says. callable_tools: no call of others (None: of any).

    Raises RequestError (400) naming the field: contradictions, unknown tool names, schemas that
    are invalid, unsupported, or over the limits of time, memory or size. Raises OverloadedError
    when too many compilations wait, UnavailableError when the compiling process does not start.
    """
    source = _source(
        spec.output_format, tools, tool_choice, tool_name, callable_tools, parallel_tool_calls
    )
    if source is None:
        return None
    ids = frontend.tokenizer.vocabulary.added_ids
    if source.calls != "no" and any(tag not in ids for tag in TAGS):
        raise wrong("tool_choice", "this model's vocabulary has no tool-call tokens")
    if not spec.sampling.stop_token_ids:
        enforced = "tool_choice, parallel_tool_calls or strict tools"
        raise wrong("ignore_eos", f"cannot be combined with {enforced}")
    grammar = await frontend.grammars.compile(source)
    think, answer = ids.get("<think>"), ids.get("</think>")
    if prompt_ids and prompt_ids[-1] == think and answer is not None:
        banned = tuple(ids[tag] for tag in TAGS if tag in ids)
        return msgspec.structs.replace(grammar, start_id=answer, banned_ids=banned)
    return grammar


def _source(
    form: OutputFormat | None,
    tools: list[Json] | None,
    tool_choice: str,
    tool_name: str | None,
    callable_tools: frozenset[str] | None,
    parallel: bool,
) -> GrammarSource | None:
    choosable = callable_tools if tool_name is None else {tool_name}
    numbered = enumerate(tool["function"] for tool in tools or [])
    chosen = [(n, f) for n, f in numbered if choosable is None or f["name"] in choosable]
    functions = [function for _, function in chosen]
    fields = [f"tools[{n}].function.parameters" for n, _ in chosen]
    if tool_name is not None:
        if not functions:
            raise wrong("tool_choice", f"there is no tool named {tool_name!r:.80}")
        calls: Calls = "must"
        parallel = False
    elif tool_choice == "required":
        if not functions:
            raise wrong("tool_choice", "'required' needs tools")
        calls = "must"
    elif (functions and tool_choice == "auto") and (
        form is not None
        or callable_tools is not None
        or not parallel
        or any(_is_strict(function) for function in functions)
    ):
        if form is not None and form.kind == "ebnf":
            raise wrong(form.field, "cannot be combined with tools")
        calls = "may"
    else:
        calls = "no"
    if calls == "no":
        return None if form is None else GrammarSource(form)
    if calls == "must":
        form = None
    bare = []
    for f in functions:
        # Agents mark tools as strict by habit: of one that need not be called, what no grammar
        # can hold is no reason to refuse the request.
        exact = _is_strict(f) and calls == "must"
        bare.append({"name": f["name"], "parameters": f.get("parameters") or {}, "strict": exact})
    return GrammarSource(form, calls, parallel, tuple(bare), tuple(fields))


def _is_strict(function: Json) -> bool:
    return function.get("strict") is True
