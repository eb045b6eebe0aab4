"""The generated checkpoint can be read by transformers, and its template follows the rules."""

from pathlib import Path
from typing import Any

import pytest
from glimmer.deploy.demo.checkpoint import SPECIAL_TOKENS
from glimmer.shared.model_spec import load_model_spec
from transformers import AutoTokenizer

CALLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "arguments": {"a": "x", "b": 2, "c": [1, "y"], "d": True, "e": None},
        },
    },
    {"type": "function", "function": {"name": "g", "arguments": {}}},
]
CHAIN: list[dict[str, Any]] = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "reasoning_content": "R1", "content": "C1", "tool_calls": CALLS},
    {"role": "tool", "content": "out1"},
    {"role": "tool", "content": "out2"},
]
CALL_TEXT = (
    "<tool_call>f<arg_key>a</arg_key><arg_value>x</arg_value><arg_key>b</arg_key><arg_value>2"
    '</arg_value><arg_key>c</arg_key><arg_value>[1, "y"]</arg_value><arg_key>d</arg_key>'
    "<arg_value>true</arg_value><arg_key>e</arg_key><arg_value>null</arg_value></tool_call>"
    "<tool_call>g</tool_call>"
)
RESULTS = "<|observation|><tool_response>out1</tool_response><tool_response>out2</tool_response>"
SECOND: list[dict[str, Any]] = [
    *CHAIN,
    {"role": "assistant", "reasoning_content": "R2", "content": "done"},
    {"role": "user", "content": "q2"},
]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.mark.parametrize(
    ("messages", "kwargs", "expected"),
    [
        ([{"role": "user", "content": "Hello"}], {}, "<|user|>Hello<|assistant|><think>"),
        (
            [{"role": "user", "content": "Hello"}],
            {"enable_thinking": False},
            "<|user|>Hello<|assistant|></think>",
        ),
        (
            [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}],
            {},
            "<|system|>S<|user|>Hi<|assistant|><think>",
        ),
        (
            CHAIN,
            {},
            f"<|user|>q<|assistant|><think>R1</think>C1{CALL_TEXT}{RESULTS}<|assistant|><think>",
        ),
        (
            SECOND,
            {},
            f"<|user|>q<|assistant|></think>C1{CALL_TEXT}{RESULTS}<|assistant|></think>done"
            "<|user|>q2<|assistant|><think>",
        ),
        (
            SECOND,
            {"clear_thinking": False},
            f"<|user|>q<|assistant|><think>R1</think>C1{CALL_TEXT}{RESULTS}<|assistant|>"
            "<think>R2</think>done<|user|>q2<|assistant|><think>",
        ),
    ],
)
def test_golden_prompts(
    tokenizer: Any, messages: list[dict[str, Any]], kwargs: dict[str, Any], expected: str
) -> None:
    rendered = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **kwargs
    )
    assert rendered == "[gMASK]<sop>" + expected


def test_special_tokens_are_single_ids_at_the_end(tokenizer: Any, tiny_model: Path) -> None:
    ids = [tokenizer.encode(token, add_special_tokens=False) for token in SPECIAL_TOKENS]
    first = ids[0][0]
    assert ids == [[first + i] for i in range(len(SPECIAL_TOKENS))]
    spec = load_model_spec(tiny_model)
    assert spec.num_token_ids == first + len(SPECIAL_TOKENS) < spec.vocab_size


@pytest.mark.parametrize(
    "text", ["What is AI?", "naïve café 🙂 你好\n\n\tx", "<think>a</think>b", ""]
)
def test_text_survives_a_round_trip(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tools_come_first_as_full_objects(tokenizer: Any) -> None:
    tools = [{"type": "function", "function": {"name": "f", "description": "é", "parameters": {}}}]
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "q"}]
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    line = '{"type": "function", "function": {"name": "f", "description": "é", "parameters": {}}}'
    assert text.startswith("[gMASK]<sop><|system|>\n# Tools")
    assert f"<tools>\n{line}\n</tools>" in text
    assert text.endswith("<|system|>S<|user|>q")
