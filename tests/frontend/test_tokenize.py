"""Text in: the checkpoint's tokenizer and chat template, guarded."""

import json
import shutil
from pathlib import Path

import pytest
from glimmer.frontend.conversation import normalise_messages
from glimmer.frontend.tokenize import Tokenizer
from glimmer.shared.errors import ConfigError, ModelError, RequestError

LIMIT = 512


async def render(tokenizer: Tokenizer, messages: list[dict], tools=None, **kwargs) -> str:
    ids = await tokenizer.encode_chat(normalise_messages(messages), tools, kwargs, LIMIT)
    return tokenizer.decode(ids)


def call(name: str, arguments: object) -> dict:
    function = {"name": name, "arguments": arguments}
    return {"id": "1", "type": "function", "function": function}


async def test_golden_prompts(tokenizer: Tokenizer) -> None:
    hello = [{"role": "user", "content": "Hello"}]
    assert await render(tokenizer, hello) == "[gMASK]<sop><|user|>Hello<|assistant|><think>"
    assert (
        await render(tokenizer, hello, enable_thinking=False)
        == "[gMASK]<sop><|user|>Hello<|assistant|></think>"
    )
    system = [{"role": "developer", "content": "S"}, {"role": "user", "content": "Hi"}]
    assert (
        await render(tokenizer, system) == "[gMASK]<sop><|system|>S<|user|>Hi<|assistant|><think>"
    )


async def test_golden_tool_conversation_with_argument_strings(tokenizer: Tokenizer) -> None:
    arguments = json.dumps({"a": "x", "b": 2, "c": [1, "y"], "d": True, "e": None})
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "q"}]},
        {
            "role": "assistant",
            "reasoning": "R1",
            "content": "C1",
            "tool_calls": [call("f", arguments), call("g", "")],
        },
        {"role": "tool", "content": [{"type": "text", "text": "out1"}], "tool_call_id": "1"},
        {"role": "tool", "content": "out2", "tool_call_id": "2", "name": None},
    ]
    prompt = await render(tokenizer, messages)
    assert prompt == (
        "[gMASK]<sop><|user|>q<|assistant|><think>R1</think>C1<tool_call>f<arg_key>a</arg_key>"
        "<arg_value>x</arg_value><arg_key>b</arg_key><arg_value>2</arg_value><arg_key>c</arg_key>"
        '<arg_value>[1, "y"]</arg_value><arg_key>d</arg_key><arg_value>true</arg_value><arg_key>e'
        "</arg_key><arg_value>null</arg_value></tool_call><tool_call>g</tool_call><|observation|>"
        "<tool_response>out1</tool_response><tool_response>out2</tool_response><|assistant|><think>"
    )
    messages += [{"role": "assistant", "content": "done"}, {"role": "user", "content": "q2"}]
    assert "R1" not in await render(tokenizer, messages)
    assert "R1" in await render(tokenizer, messages, clear_thinking=False)


async def test_null_content_is_not_rendered_as_a_word(tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [call("f", {"k": "v"})]},
    ]
    assert "None" not in await render(tokenizer, messages)


async def test_tools_reach_the_prompt_whole(tokenizer: Tokenizer) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    prompt = await render(tokenizer, [{"role": "user", "content": "q"}], [tool])
    assert json.dumps(tool) in prompt


@pytest.mark.parametrize(
    "name", ["chat_template", "tokenize", "messages", "truncation", "tools", "self"]
)
async def test_a_request_cannot_take_over_the_template_call(
    tokenizer: Tokenizer, name: str
) -> None:
    with pytest.raises(RequestError) as failure:
        await render_with(tokenizer, {name: "x"})
    assert failure.value.field == f"chat_template_kwargs.{name}"


async def render_with(tokenizer: Tokenizer, kwargs: dict) -> None:
    await tokenizer.encode_chat([{"role": "user", "content": "x"}], None, kwargs, LIMIT)


async def test_a_template_that_fails_is_the_clients_error(tiny_model: Path, tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("{{ raise_exception('no ' ~ messages[0].content) }}")
    own = Tokenizer(tiny_model, 584, str(template))
    with pytest.raises(RequestError, match="no x"):
        await render_with(own, {})
    template.write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    sandboxed = Tokenizer(tiny_model, 584, str(template))
    with pytest.raises(RequestError, match="template"):
        await render_with(sandboxed, {})


async def test_far_too_long_texts_are_refused_at_once(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match=r"4097 characters.*4096.*512") as failure:
        await tokenizer.encode("x" * (8 * LIMIT + 1), "inputs", LIMIT)
    assert failure.value.field == "inputs"
    assert len(await tokenizer.encode(" " * 8 * LIMIT, "inputs", LIMIT)) > 0
    with pytest.raises(RequestError, match="messages"):
        await render(tokenizer, [{"role": "user", "content": "x" * 9 * LIMIT}])


@pytest.mark.parametrize("wrong", [-1, 584, 2**31, 2**63, 10**30])
def test_ids_outside_the_embedding_are_named(tokenizer: Tokenizer, wrong: int) -> None:
    with pytest.raises(RequestError, match=str(wrong)) as failure:
        tokenizer.check_ids([1, wrong, 2], "prompt")
    assert failure.value.field == "prompt"
    tokenizer.check_ids([0, 583], "prompt")
    tokenizer.check_ids([], "prompt")


def test_each_token_has_the_bytes_that_the_tokenizer_gives_it(tokenizer: Tokenizer) -> None:
    for token_id in range(560):
        one = tokenizer._backend.decode([token_id], skip_special_tokens=False)
        assert tokenizer.vocabulary.text(token_id) == one
    assert tokenizer.vocabulary.token_bytes[560:] == [b""] * 24


def test_tags_that_parsers_need_are_never_skipped(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "m")
    raw = json.loads((model / "tokenizer.json").read_text())
    for token in raw["added_tokens"]:
        token["special"] = True
    (model / "tokenizer.json").write_text(json.dumps(raw))
    vocabulary = Tokenizer(model, 584).vocabulary
    assert vocabulary.added_ids["</think>"] not in vocabulary.special_ids
    assert vocabulary.added_ids["<|user|>"] in vocabulary.special_ids


def test_a_checkpoint_that_does_not_fit_is_a_model_error(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="vocab_size"):
        Tokenizer(tiny_model, 500)
    model = shutil.copytree(tiny_model, tmp_path / "m")
    raw = json.loads((model / "tokenizer.json").read_text())
    raw["decoder"] = {"type": "Fuse"}
    (model / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(ModelError, match="byte-level"):
        Tokenizer(model, 584)
    (model / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="tokenizer"):
        Tokenizer(model, 584)
    with pytest.raises(ConfigError, match="nowhere"):
        Tokenizer(tiny_model, 584, str(tmp_path / "nowhere"))
