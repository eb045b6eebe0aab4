"""Text in: the checkpoint's tokenizer and chat template, guarded."""

import asyncio
import json
import shutil
from contextlib import closing
from pathlib import Path

import pytest
from glimmer.frontend.chat.request import normalise_messages
from glimmer.frontend.text.tokenizer import Tokenizer
from glimmer.shared.errors import ConfigError, ModelError, RequestError
from transformers import AutoTokenizer

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
    messages += [
        {"role": "assistant", "content": "done", "reasoning_content": "R2"},
        {"role": "user", "content": "q2"},
    ]
    history = prompt.removesuffix("<|assistant|><think>").removeprefix("[gMASK]<sop><|user|>q")
    tail = "<|user|>q2<|assistant|><think>"
    cleared = history.replace("<think>R1</think>", "</think>")
    assert await render(tokenizer, messages) == (
        f"[gMASK]<sop><|user|>q{cleared}<|assistant|></think>done{tail}"
    )
    assert await render(tokenizer, messages, clear_thinking=False) == (
        f"[gMASK]<sop><|user|>q{history}<|assistant|><think>R2</think>done{tail}"
    )
    assert await render(tokenizer, messages, clear_thinking=True) == (
        f"[gMASK]<sop><|user|>q{cleared}<|assistant|></think>done{tail}"
    )


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
    with closing(Tokenizer(tiny_model, 584, str(template))) as own:
        with pytest.raises(RequestError, match="no x") as failure:
            await render_with(own, {})
        assert failure.value.field == "messages"


async def test_a_template_that_never_ends_harms_its_own_requests_alone(
    tiny_model: Path, tmp_path: Path
) -> None:
    template = tmp_path / "t.jinja"
    loops = "".join(f"{{% for x{n} in range(99999) %}}" for n in range(4))
    ends = "{% endfor %}" * 4
    template.write_text(
        f"{{% if messages[0].content == 'loop' %}}{loops}{ends}{{% endif %}}{{{{ 'done' }}}}"
    )
    with closing(Tokenizer(tiny_model, 584, str(template), render_limit_s=0.5)) as own:
        looping = asyncio.create_task(
            own.encode_chat([{"role": "user", "content": "loop"}], None, {}, LIMIT)
        )
        assert own.decode(await own.encode("meanwhile", "inputs", LIMIT)) == "meanwhile"
        with pytest.raises(RequestError, match=r"longer than 0.5 s"):
            await looping
        ids = await own.encode_chat([{"role": "user", "content": "x"}], None, {}, LIMIT)
        assert own.decode(ids) == "done"


async def test_closing_ends_a_rendering_at_once(tiny_model: Path, tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    loops = "".join(f"{{% for x{n} in range(99999) %}}" for n in range(4))
    template.write_text(loops + "{% endfor %}" * 4)
    own = Tokenizer(tiny_model, 584, str(template), render_limit_s=600)
    looping = asyncio.create_task(render_with(own, {}))
    async with asyncio.timeout(30):
        while own._renderer is None or own._renderer.child.process_id is None:
            await asyncio.sleep(0.01)
        own.close()
        with pytest.raises(RequestError, match="template"):
            await looping


async def test_far_too_long_texts_are_refused_at_once(tokenizer: Tokenizer) -> None:
    with pytest.raises(
        RequestError, match=r"is 512 tokens.*1024 tokens .*4097 characters"
    ) as failure:
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


def test_the_files_are_read_as_transformers_reads_them(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "m")
    raw = json.loads((model / "tokenizer.json").read_text())
    raw["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (model / "tokenizer.json").write_text(json.dumps(raw))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["eos_token"] = {"__type": "AddedToken", "content": "<|user|>", "special": True}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    template = (model / "chat_template.jinja").read_text()
    theirs = AutoTokenizer.from_pretrained(model)
    with closing(Tokenizer(model, 584)) as ours:
        for text in (
            "",
            "What is AI?\n\n  123 naïve 東京 🙂",
            "[gMASK]<sop><|user|>x<think></think>",
        ):
            assert ours._encode(text, True) == theirs(text)["input_ids"]
        assert ours._renderer is not None
        assert ours._renderer.variables == theirs.special_tokens_map
        assert ours._renderer.template == theirs.chat_template == template
    (model / "chat_template.jinja").unlink()
    with closing(Tokenizer(model, 584)) as bare:
        assert bare._renderer is None
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": "inside"}))
    with closing(Tokenizer(model, 584)) as ours:
        assert ours._renderer is not None
        assert ours._renderer.template == "inside"


def test_tags_that_parsers_need_are_never_skipped(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "m")
    raw = json.loads((model / "tokenizer.json").read_text())
    for token in raw["added_tokens"]:
        token["special"] = True
    (model / "tokenizer.json").write_text(json.dumps(raw))
    with closing(Tokenizer(model, 584)) as own:
        vocabulary = own.vocabulary
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
    (tmp_path / "broken").write_text("one\n{% if %}")
    with pytest.raises(ConfigError, match=r"broken: line 2"):
        Tokenizer(tiny_model, 584, str(tmp_path / "broken"))


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ raise_exception('no system message') }}", "no system message"),
        ("{{ messages[1].content }}", "UndefinedError"),
        ("{% if tools %}{{ messages }}{% endif %}\n", "prints nothing"),
    ],
)
def test_a_template_that_fails_on_a_simple_message_is_found_at_the_start(
    tiny_model: Path, tmp_path: Path, template: str, problem: str
) -> None:
    path = tmp_path / "t.jinja"
    path.write_text(template)
    with (
        closing(Tokenizer(tiny_model, 1056, str(path))) as tokenizer,
        pytest.raises(ConfigError, match=problem),
    ):
        tokenizer.try_template()
    shutil.copytree(tiny_model, tmp_path / "model")
    shutil.copy(path, tmp_path / "model/chat_template.jinja")
    with (
        closing(Tokenizer(tmp_path / "model", 1056)) as tokenizer,
        pytest.raises(ModelError, match=problem),
    ):
        tokenizer.try_template()


def test_a_template_without_the_users_text_or_too_slow_on_a_busy_machine_is_a_warning(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "t.jinja"
    for template, warning in (
        ("hello", "leaves out the text"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "longer",
        ),
    ):
        path.write_text(template)
        with closing(Tokenizer(tiny_model, 1056, str(path), render_limit_s=0.5)) as tokenizer:
            tokenizer.try_template()
        assert warning in caplog.text
        caplog.clear()


def test_a_trial_of_a_good_template_says_nothing(
    tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(Tokenizer(tiny_model, 1056)) as tokenizer:
        tokenizer.try_template()
    assert not caplog.records
