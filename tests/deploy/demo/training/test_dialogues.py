from pathlib import Path

import pytest
from glimmer.deploy.demo.checkpoint import make_checkpoint
from glimmer.deploy.demo.training.data import Renderer
from glimmer.deploy.demo.training.dialogues import KINDS, dialogue
from tokenizers import Tokenizer
from transformers import AutoTokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_dialogues_end_with_the_assistants_reply(kind: str) -> None:
    for seed in range(60):
        item = dialogue(seed, held_out=bool(seed % 2), kind=kind)
        assert item.kind == kind
        assert item.messages[-1]["role"] == "assistant"
        first = item.messages[item.first_reply]
        assert [m["role"] for m in item.messages[item.first_reply - 1 :][:2]] == [
            "user",
            "assistant",
        ]
        assert bool(item.tools) == (kind != "chat")
        calls = first.get("tool_calls", [])
        if kind in ("call", "parallel", "result"):
            assert calls
        if kind == "no_call":
            assert first["content"]
            assert not calls
        for text in item.must_say:
            assert text in item.messages[-1]["content"]


def test_two_requests_in_one_text_leave_values_as_they_are() -> None:
    for seed in range(300):
        item = dialogue(seed, held_out=bool(seed % 2), kind="parallel")
        asked = item.messages[item.first_reply - 1]["content"]
        for call in item.messages[-1]["tool_calls"]:
            for value in call["function"]["arguments"].values():
                assert not isinstance(value, str) or value in asked


def test_all_kinds_come_and_thinking_is_on_and_off() -> None:
    dialogues = [dialogue(seed) for seed in range(200)]
    assert {item.kind for item in dialogues} == set(KINDS)
    assert {item.thinking for item in dialogues} == {True, False}


def test_training_text_is_what_the_server_renders(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    renderer = Renderer(Tokenizer.from_file(str(tmp_path / "tokenizer.json")))
    for seed in range(80):
        item = dialogue(seed)
        text = renderer.text(item)
        hidden = () if item.thinking else ("reasoning_content",)
        messages = [{k: v for k, v in m.items() if k not in hidden} for m in item.messages]
        prompt = tokenizer.apply_chat_template(
            messages[:-1], tools=item.tools or None, tokenize=False, add_generation_prompt=True,
            enable_thinking=item.thinking, clear_thinking=not item.keeps_thoughts,
        )  # fmt: skip
        if item.thinking or item.messages[-2]["role"] == "user":
            assert text.startswith(prompt), (text, prompt)
