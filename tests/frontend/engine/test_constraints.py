"""What requests ask of their output reaches the engine as a grammar, or is refused in time."""

import asyncio
from typing import Any

import pytest

pytestmark = pytest.mark.asyncio(loop_scope="module")
THINK, ANSWER, CALL = 545, 546, 547
PLAIN = {"enable_thinking": False}
CHAT = "/v1/chat/completions"
TOOL = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": TOOL}},
    {"type": "function", "function": {"name": "g"}},
]
JSON = {"response_format": {"type": "json_object"}}


@pytest.fixture
def server(module_server: Any) -> Any:
    """One for all tests: its grammar checker takes a while to start."""
    return module_server.reset()


def body(**fields: Any) -> dict[str, Any]:
    return {
        "model": "m",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 2,
        **fields,
    }


async def test_grammars_reach_the_engine(server: Any) -> None:
    status, _ = await server.post(CHAT, body(**JSON, n=2))
    assert status == 200
    grammars = [submit.grammar for submit in server.engine.submits]
    assert grammars[0] == grammars[1]
    assert grammars[0] is not None
    assert '"{"' in grammars[0].text
    assert grammars[0].field == "response_format"
    assert (grammars[0].start_id, CALL in grammars[0].banned_ids) == (ANSWER, True)
    assert server.engine.submits[0].prompt_ids[-1] == THINK
    await server.post(CHAT, body(**JSON, chat_template_kwargs=PLAIN))
    last = server.engine.submits[-1].grammar
    assert last is not None
    assert (last.text, last.start_id, last.banned_ids) == (grammars[0].text, -1, ())
    await server.post(CHAT, body())
    assert server.engine.submits[-1].grammar is None
    parameters = {"guided_json": '{"type": "null"}', "max_new_tokens": 2}
    assert (await server.post("/generate", {"inputs": "x", "parameters": parameters}))[0] == 200
    assert server.engine.submits[-1].grammar is not None
    completion = {"model": "m", "prompt": ["x", "y"], "guided_regex": "a+", "max_tokens": 2}
    assert (await server.post("/v1/completions", completion))[0] == 200
    assert server.engine.submits[-1].grammar is not None


def allowed(mode: str) -> Any:
    """A tool_choice: only f may be called."""
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": TOOLS[:1]}}


async def test_the_choice_of_tools_decides_the_grammar(server: Any) -> None:
    async def name(**fields: Any) -> str | None:
        status, reply = await server.post(CHAT, body(tools=TOOLS, **fields))
        assert status == 200, reply
        grammar = server.engine.submits[-1].grammar
        return None if grammar is None else grammar.text

    assert await name() is None
    assert await name(tool_choice="none") is None
    assert await name(tool_choice="none", parallel_tool_calls=False) is None
    required = await name(tool_choice="required")
    one = await name(tool_choice="required", parallel_tool_calls=False)
    named = {"type": "function", "function": {"name": "f"}}
    f = await name(tool_choice=named)
    g = await name(tool_choice={"type": "function", "function": {"name": "g"}})
    most_one = await name(parallel_tool_calls=False)
    either = await name(**JSON)
    alone = await name(**JSON, tool_choice="none")
    may_f, must_f = [await name(tool_choice=allowed(mode)) for mode in ("auto", "required")]
    names = [required, one, f, g, most_one, either, alone, may_f, must_f]
    assert None not in names
    assert len(set(names)) == len(names)
    assert await name(tool_choice=named, **JSON) == f  # a call that must be made comes first
    assert await name(tool_choice=named, parallel_tool_calls=True) == f


def tool(name: str, parameters: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **fields}}


UNIQUE = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}


async def test_one_unusual_tool_does_not_spoil_the_others(server: Any) -> None:
    tools = [*TOOLS, tool("odd", UNIQUE), tool("dict", {"type": "dict", "properties": {}})]
    named = {"type": "function", "function": {"name": "odd"}}
    for fields in ({"tool_choice": "required"}, {"parallel_tool_calls": False}, JSON):
        status, reply = await server.post(CHAT, body(tools=tools, **fields))
        assert (status, server.engine.submits[-1].grammar is None) == (200, False), reply
    assert (await server.post(CHAT, body(tools=tools, tool_choice=named)))[0] == 200
    tools.append(tool("exact", UNIQUE, strict=True))
    status, reply = await server.post(CHAT, body(tools=tools, tool_choice="required"))
    assert (status, reply["error"]["param"]) == (400, "tools[4].function.parameters")
    assert "#/properties/a: uniqueItems is not supported" in reply["error"]["message"]


async def test_a_strict_tool_is_enforced_wherever_it_may_be_called(server: Any) -> None:
    tools = [*TOOLS, tool("exact", TOOL, strict=True)]

    async def grammar(**fields: Any) -> Any:
        status, reply = await server.post(CHAT, body(**fields))
        assert status == 200, reply
        return server.engine.submits[-1].grammar

    auto = await grammar(tools=tools)
    assert (auto.start_id, CALL in auto.banned_ids) == (ANSWER, True)
    assert (await grammar(tools=tools, tool_choice="auto")).text == auto.text
    assert (await grammar(tools=tools, parallel_tool_calls=False)).text != auto.text
    assert await grammar(tools=tools, tool_choice="none") is None
    for lax in (False, None):
        assert await grammar(tools=[*TOOLS, tool("exact", TOOL, strict=lax)]) is None
    status, reply = await server.post(CHAT, body(tools=tools, ignore_eos=True))
    assert (status, reply["error"]["param"]) == (400, "ignore_eos")
    assert await grammar(tools=[tool("f", UNIQUE, strict=True)]) is not None, "as far as it goes"
    response = {"model": "m", "input": "Hi", "max_output_tokens": 16}
    flat = {"type": "function", "name": "f", "parameters": TOOL, "strict": True}
    assert (await server.post("/v1/responses", {**response, "tools": [flat]}))[0] == 200
    assert server.engine.submits[-1].grammar is not None


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"guided_grammar": 'root ::= "a"', "tools": TOOLS}, "guided_grammar"),
    (
        {
            "tools": [
                {"type": "function", "function": {"name": "f", "parameters": {"type": "null"}}}
            ],
            "tool_choice": "required",
        },
        "tools[0].function.parameters",
    ),
    ({"tools": TOOLS, "tool_choice": "required", "ignore_eos": True}, "ignore_eos"),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": {"$ref": "#"}},
            }
        },
        "response_format.json_schema.schema",
    ),
    ({"guided_json": {"type": "nothing"}}, "guided_json"),
    ({"regular_constraint": "("}, "regular_constraint"),
    ({"guided_regex": "(a{1000}){1000}"}, "guided_regex"),
    ({"guided_json": {"title": "x" * 300_000}}, "guided_json"),
]


async def test_refusals_come_before_the_stream(server: Any) -> None:
    for fields, param in REFUSED:
        for stream in (False, True):
            status, reply = await server.post(CHAT, body(stream=stream, **fields))
            assert (status, reply["error"]["param"]) == (400, param)
    assert server.engine.submits == []


HUGE = 10**30
WITH_HUGE: list[dict[str, Any]] = [
    {"type": "integer", "minimum": -HUGE, "maximum": HUGE},
    {"type": "number", "exclusiveMinimum": -(10**40), "exclusiveMaximum": 1e308},
    {"enum": [HUGE, -HUGE], "minimum": -HUGE},
    {"const": 2**64},
    {"type": "string", "default": HUGE, "x-unknown": {"a": [-HUGE]}},
]


async def test_integers_of_any_size_are_taken(server: Any) -> None:
    for schema in WITH_HUGE:
        named = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
        parameters = {"type": "object", "properties": {"a": schema}}
        tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
        for fields in (
            {"response_format": named},
            {"guided_json": schema},
            {"tools": tools, "tool_choice": "required"},
        ):
            status, reply = await server.post(CHAT, body(**fields))
            assert status == 200, (schema, reply)
            assert server.engine.submits[-1].grammar is not None


BEYOND_LIMITS: list[tuple[Any, str]] = [
    ({"type": "string", "minLength": 10**40}, "minLength must be at most"),
    ({"type": "array", "minItems": 1e300}, "minItems must be at most"),
    ({"type": "integer", "minimum": HUGE}, "minimum must be within"),
    ('{"type": "number", "maximum": 1e400}', "is not JSON"),
    ('{"type": "number", "maximum": NaN}', "is not JSON"),
    ('{"const": %s}' % ("9" * 5000), "is not JSON"),
]


async def test_numbers_beyond_a_limit_are_named(server: Any) -> None:
    for schema, problem in BEYOND_LIMITS:
        status, reply = await server.post(CHAT, body(guided_json=schema))
        assert (status, reply["error"]["param"]) == (400, "guided_json"), schema
        assert problem in reply["error"]["message"]


async def test_a_model_without_tool_tokens_cannot_be_made_to_call(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(server.frontend.tokenizer.vocabulary.added_ids, "<arg_key>")
    status, reply = await server.post(CHAT, body(tools=TOOLS, tool_choice="required"))
    assert (status, reply["error"]["param"]) == (400, "tool_choice")


async def test_ends_stay_with_a_format_whatever_ignore_eos_says(server: Any) -> None:
    await server.post(CHAT, body(**JSON, ignore_eos=True))
    assert server.engine.submits[-1].sampling.stop_token_ids == (524, 531, 533)
    await server.post(CHAT, body(ignore_eos=True))
    assert server.engine.submits[-1].sampling.stop_token_ids == ()


MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
HELLO = {"model": "m", "max_tokens": 200, "messages": [{"role": "user", "content": "Hello"}]}


async def test_anthropics_format_is_enforced_and_its_errors_are_named(server: Any) -> None:
    def formatted(schema: Any) -> dict[str, Any]:
        return {**HELLO, "output_config": {"format": {"type": "json_schema", "schema": schema}}}

    status, _ = await server.post(MESSAGES, formatted({"type": "object"}))
    assert status == 200
    assert server.engine.submits[-1].grammar is not None
    status, reply = await server.post(MESSAGES, formatted({"type": "nothing"}))
    assert status == 400
    assert reply["error"]["message"].startswith("output_config.format.schema: ")
    bad = {"name": "f", "strict": True, "input_schema": {"type": "object", "properties": []}}
    status, reply = await server.post(
        MESSAGES, {**HELLO, "tools": [bad], "tool_choice": {"type": "any"}}
    )
    assert status == 400
    assert reply["error"]["message"].startswith("tools[0].input_schema: ")


async def test_anthropics_tool_choice_is_enforced(server: Any) -> None:
    flat = [{"name": name, "input_schema": TOOL} for name in ("weather", "noop")]
    for choice in ({"type": "any"}, {"type": "tool", "name": "noop"}, {"type": "auto"}):
        await server.post(MESSAGES, {**HELLO, "tools": flat, "tool_choice": choice})
    grammars = [submit.grammar for submit in server.engine.submits]
    assert [grammar is None for grammar in grammars] == [False, False, True]
    assert grammars[0] != grammars[1]


async def test_the_format_of_responses_is_enforced_and_its_errors_are_named(server: Any) -> None:
    def formatted(schema: Any) -> dict[str, Any]:
        return {"input": "x", "text": {"format": {"type": "json_schema", "name": "n", **schema}}}

    status, _ = await server.post(RESPONSES, formatted({"schema": {"type": "object"}}))
    assert status == 200
    assert server.engine.submits[-1].grammar is not None
    for schema in ({"schema": {"type": "nothing"}}, {"schema": 5}, {}):
        status, reply = await server.post(RESPONSES, formatted(schema))
        assert (status, reply["error"]["param"]) == (400, "text.format.schema"), reply
    status, reply = await server.post(
        RESPONSES, {"input": "x", "text": {"format": {"type": "xml"}}}
    )
    assert (status, reply["error"]["param"]) == (400, "text.format.type"), reply


@pytest.mark.parametrize("stream", [False, True])
async def test_a_grammar_that_fails_on_its_way_ends_the_reply_with_an_error(
    server: Any, stream: bool
) -> None:
    server.engine.manual = True
    fields = {**JSON, "stream": stream, "chat_template_kwargs": PLAIN}
    asking = asyncio.create_task(
        server.session.post(server.url + CHAT, json=body(**fields)).__aenter__()
    )
    submit = (await server.engine.submitted())[0]
    assert submit.grammar.field == "response_format"
    server.engine.tokens(submit, [519])
    if stream:
        await (await asking).content.readany()
    server.engine.finish(submit, "invalid", 1, message="it is too complex", field="response_format")
    reply = await asking
    data = await reply.text()
    assert "it is too complex" in data
    assert reply.status == (200 if stream else 400)
    assert stream or (await reply.json())["error"]["param"] == "response_format"
    server.engine.manual = False
    assert (await server.post(CHAT, body()))[0] == 200
