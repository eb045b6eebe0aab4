"""Compares the tokenizer and chat template of a checkpoint with those of transformers.

The server reads `tokenizer.json` and the template itself, because transformers would import torch
into each HTTP process. `glimmer check --reference` shows that both give the same token ids. That is
worth a look for a checkpoint whose tokenizer or template was changed.
"""

import asyncio
import contextlib
from pathlib import Path
from typing import Any

from ..frontend.text.tokenizer import Tokenizer
from ..shared.errors import ModelError, RequestError, UsageError

_MAX_TOKENS = 100_000
_TEXTS = (
    "Hello, world! 1234567890 3.14 x = y**2;",
    "  two  spaces,\ttab,\r\n\n\nlines  ",
    "naïve café, Größe, Ελληνικά, русский, العربية, हिन्दी, 日本語 한국어 中文, 🙂👩‍👩‍👧",
    "[gMASK]<sop><|system|>s<|user|>u<|assistant|><think>t</think>a<|endoftext|>",
    "<tool_call>f<arg_key>k</arg_key><arg_value>v</arg_value></tool_call>",
    "def f(x):\n    return {'a': [1, None]}  # don't\n",
)
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "find_flight",
            "description": 'Finds "flights" to <city>, é.',
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
_CALL = {"type": "function", "function": {"name": "find_flight", "arguments": {"city": "Køln"}}}
_MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": " Be brief.\n"},
    {"role": "user", "content": "A flight, please."},
    {"role": "assistant", "reasoning_content": "I look.", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "content": '{"flight": 7}'},
    {"role": "assistant", "reasoning_content": "I say it.", "content": "Flight 7."},
    {"role": "user", "content": "Thank you!"},
]
_CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], Any, dict[str, Any]]] = {
    "a question": (_MESSAGES[:2], None, {}),
    "a question with thinking off": (_MESSAGES[:2], None, {"enable_thinking": False}),
    "a question with tools": (_MESSAGES[:2], _TOOLS, {}),
    "a tool's result": (_MESSAGES[:4], _TOOLS, {}),
    "a second question": (_MESSAGES, _TOOLS, {}),
    "a second question with thoughts kept": (_MESSAGES, _TOOLS, {"clear_thinking": False}),
}


def compare_with_transformers(
    model_dir: Path, vocab_size: int, chat_template: str | None = None
) -> None:
    """Raise ModelError at the first text or conversation whose token ids differ, or if transformers
    cannot read the tokenizer, and UsageError if transformers is not installed. `vocab_size` is the
    number of rows of the embedding, `chat_template` a file that replaces the checkpoint's."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise UsageError("--reference needs transformers: pip install transformers") from None
    try:
        reference = AutoTokenizer.from_pretrained(model_dir)
    except (OSError, ValueError) as error:
        raise ModelError(f"transformers cannot read the tokenizer: {error}") from error
    with contextlib.closing(Tokenizer(model_dir, vocab_size, chat_template)) as tokenizer:
        if chat_template is not None:
            reference.chat_template = Path(chat_template).read_text()
        asyncio.run(_compare(tokenizer, reference))


async def _compare(tokenizer: Tokenizer, reference: Any) -> None:
    added_tokens = " ".join(reference.get_added_vocab())
    for text in (*_TEXTS, added_tokens):
        ids = await tokenizer.encode(text, "text", _MAX_TOKENS, add_special_tokens=True)
        _require_equal(repr(text), ids, reference(text)["input_ids"])
    if reference.chat_template is None:
        return
    for name, (messages, tools, options) in _CONVERSATIONS.items():
        try:
            ids = await tokenizer.encode_chat(messages, tools, options, _MAX_TOKENS)
        except RequestError:  # the template takes no such conversation
            continue
        text = reference.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, tokenize=False, **options
        )
        _require_equal(name, ids, reference(text, add_special_tokens=False)["input_ids"])


def _require_equal(name: str, ids: list[int], reference_ids: list[int]) -> None:
    if ids != reference_ids:
        pairs = zip(ids, reference_ids, strict=False)
        equal = [left == right for left, right in pairs]
        position = equal.index(False) if False in equal else len(equal)
        raise ModelError(
            f"token ids of {name} differ from those of transformers at position {position}: "
            f"{ids[position : position + 8]}, transformers {reference_ids[position : position + 8]}"
        )
