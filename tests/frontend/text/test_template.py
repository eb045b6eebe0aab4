"""A renderer outlives what its templates do."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from glimmer.frontend import child
from glimmer.frontend.child import ChildDiedError
from glimmer.frontend.text.template import Renderer, check_template
from glimmer.shared.errors import RequestError
from transformers import AutoTokenizer


@contextmanager
def renderer(template: str, limit_s: float = 20.0, **variables: Any) -> Iterator[Renderer]:
    one = Renderer(template, variables, limit_s)
    with closing(one.child):
        yield one


def test_arguments_and_variables_reach_the_template() -> None:
    with renderer("{{ bos }}{{ x | tojson }}", bos="<s>") as one:
        assert one.render({"x": {"b": "é", "a": [1, 2.5, None]}}).text == (
            '<s>{"b": "é", "a": [1, 2.5, null]}'
        )
        long = "word 👍 " * 300_000
        assert one.render({"x": long, "bos": ""}).text == f'"{long}"'


def test_a_template_that_prints_without_end_is_stopped() -> None:
    with renderer("{{ 'ab' * x }}") as one:
        for factor in (10**8, 10**10):  # too long for the server; too long for the process
            with pytest.raises(RequestError, match=r"at most 33554432|MemoryError|broke down"):
                one.render({"x": factor})
        assert one.render({"x": 2}).text == "abab"


def test_failures_name_the_messages_and_the_next_prompt_works() -> None:
    with renderer("{{ 1 // x }}") as one:
        with pytest.raises(RequestError, match="ZeroDivisionError") as failure:
            one.render({"x": 0})
        assert failure.value.field == "messages"
        assert one.render({"x": 1}).text == "1"
        deep: Any = []
        for _ in range(2000):
            deep = [deep]
        with pytest.raises(RequestError, match="template"):
            one.render({"x": deep})
        assert one.render({"x": 1}).text == "1"


def test_a_process_that_dies_or_swells_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    with renderer("{{ ('x' * n) | length }}") as one:
        assert one.render({"n": 5}).text == "5"
        assert one.child.process_id is not None
        os.kill(one.child.process_id, signal.SIGKILL)
        assert one.render({"n": 5}).text == "5"  # it did not die of this
        with monkeypatch.context() as patched:
            patched.setattr(child, "receive", lambda link: b"")  # as if it died again and again
            with pytest.raises(RequestError, match="broke down"):
                one.render({"n": 5})
        assert one.render({"n": 5}).text == "5"
        with pytest.raises(RequestError, match="MemoryError"):
            one.render({"n": 1 << 40})
        assert one.render({"n": 5}).text == "5"


def test_work_that_holds_the_interpreter_ends_in_time() -> None:
    with renderer("{{ (9 ** n) % 7 }}", limit_s=0.5) as one:
        one.child.start()
        with pytest.raises(RequestError, match=r"longer than 0.5 s"):
            one.render({"n": 1 << 33})
        assert one.render({"n": 1}).text == "2"


def test_the_process_dies_with_the_thread_that_started_it() -> None:
    one = Renderer("x", {})
    thread = threading.Thread(target=one.child.start)
    thread.start()
    thread.join()  # Python says so a moment before the kernel ends the thread
    try:
        assert one.child.process_id is not None
        os.waitid(os.P_PID, one.child.process_id, os.WEXITED | os.WNOWAIT)
        with pytest.raises(ChildDiedError) as death:
            one.child.ask(b"{}")
        assert death.value.code == -signal.SIGKILL
    finally:
        one.child.close()
        one.child.close()


@pytest.mark.parametrize("template", ["{% if %}", "{{ x", "{% for x in %}{% endfor %}"])
def test_wrong_syntax_is_found_before(template: str) -> None:
    with pytest.raises(ValueError, match="line 2"):
        check_template("fine\n" + template)
    check_template(
        "{% generation %}{{ x }}{% endgeneration %}{% for x in y %}{% break %}{% endfor %}"
    )


def test_prompts_are_those_that_transformers_renders(tiny_model: Path) -> None:
    template = (tiny_model / "chat_template.jinja").read_text()
    function = {"name": "f", "arguments": {"a": "é", "b": [1, {"c": None}]}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"x": '"<é>"'}}}]
    messages = [
        {"role": "system", "content": " s \n"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "c", "tool_calls": [{"function": function}]},
        {"role": "tool", "content": "r"},
    ]
    own: Any = AutoTokenizer.from_pretrained(tiny_model)
    with renderer(template, **own.special_tokens_map) as one:
        for arguments in ({"tools": None}, {"tools": tools}, {"enable_thinking": False}):
            expected = own.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False, **arguments
            )
            arguments = {"messages": messages, "add_generation_prompt": True, **arguments}
            assert one.render(arguments).text == expected
