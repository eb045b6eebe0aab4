"""Text to token ids: the checkpoint's tokenizer and chat template, on threads of their own.

The template comes from the model directory (or `--chat_template`), never from a request, and is
rendered by transformers in Jinja's sandbox; no code of the checkpoint is run.
"""

import asyncio
import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import decoders
from transformers import AutoTokenizer

from ..shared.errors import ConfigError, ModelError, RequestError
from .detokenize import Vocabulary
from .schema import wrong

_THREADS = 2
_MAX_CHARS_PER_TOKEN = 8  # longer texts are refused before they are tokenised
# Never left out of the text, whatever tokenizer.json flags: parsers and clients look for them.
_ALWAYS_VISIBLE = frozenset(
    f"<{slash}{name}>"
    for name in ("think", "tool_call", "tool_response", "arg_key", "arg_value")
    for slash in ("", "/")
)
T = TypeVar("T")


class Tokenizer:
    """The checkpoint's tokenizer. Encoding and rendering run in a small thread pool.

    Raises ModelError when the tokenizer cannot be loaded or is not a byte-level BPE, ConfigError
    when `chat_template` (a path that replaces the checkpoint's template) cannot be read.
    """

    def __init__(self, model_dir: Path, vocab_size: int, chat_template: str | None = None) -> None:
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                model_dir, trust_remote_code=False, local_files_only=True
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{model_dir}: cannot load the tokenizer: {error}") from error
        self._backend = self._tokenizer.backend_tokenizer
        self._template: str | None = self._tokenizer.chat_template
        if chat_template is not None:
            try:
                self._template = Path(chat_template).read_text()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"--chat_template {chat_template}: {error}") from error
        self.vocab_size = vocab_size
        self.vocabulary = _make_vocabulary(self._backend, vocab_size, model_dir)
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="tokenize")
        render_parameters = inspect.signature(self._tokenizer.apply_chat_template).parameters
        self._reserved = frozenset(render_parameters) | {"self", "messages"}

    async def encode(
        self, text: str, field: str, max_tokens: int, add_special_tokens: bool = False
    ) -> list[int]:
        """Token ids of `text`. Raises RequestError naming `field` when it is far too long."""
        check_text_length(len(text), field, max_tokens)
        return await self._run(lambda: self._encode(text, add_special_tokens))

    async def encode_chat(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        template_kwargs: dict[str, Any],
        max_tokens: int,
    ) -> list[int]:
        """Token ids of a conversation, ready for the assistant's turn.

        `messages` as `conversation.py` leaves them. Raises RequestError when the template fails
        on them, or when a keyword would replace one of the template call's own arguments.
        """
        for name in template_kwargs:
            if name in self._reserved:
                raise wrong(f"chat_template_kwargs.{name}", "cannot be set by a request")
        if self._template is None:
            raise RequestError("this model has no chat template; use /v1/completions", "messages")

        def render_and_encode() -> list[int]:
            text = self._render(messages, tools, template_kwargs)
            check_text_length(len(text), "messages", max_tokens)
            return self._encode(text, add_special_tokens=False)

        return await self._run(render_and_encode)

    def check_ids(self, token_ids: Sequence[int], field: str) -> None:
        """Raises RequestError unless all ids are rows of the model's embedding."""
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < self.vocab_size):
            first = next(i for i in token_ids if not 0 <= i < self.vocab_size)
            raise wrong(field, f"token id {first} is outside 0..{self.vocab_size - 1}")

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of whole sequences, special tokens included; for short jobs off the hot path."""
        return b"".join(self.vocabulary.token_bytes[i] for i in token_ids).decode(
            "utf-8", "replace"
        )

    def close(self) -> None:
        """Stop the threads; running jobs end first."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _run(self, job: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, job)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def _render(self, messages: list[dict[str, Any]], tools: Any, kwargs: dict[str, Any]) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=self._template,
                add_generation_prompt=True,
                tokenize=False,
                **kwargs,
            )
        except Exception as error:  # the template is a program of its own: it may raise anything
            raise wrong("messages", f"the chat template fails on them: {error}") from error
        return str(text)


def check_text_length(num_chars: int, field: str, max_tokens: int) -> None:
    """Raises RequestError for texts that can never fit, at a glance."""
    limit = _MAX_CHARS_PER_TOKEN * max_tokens
    if num_chars > limit:
        raise wrong(
            field,
            f"{num_chars} characters; at most {limit} can fit the {max_tokens} tokens of a request "
            "(context_length_exceeded)",
        )


def _make_vocabulary(backend: Any, vocab_size: int, model_dir: Path) -> Vocabulary:
    if not isinstance(backend.decoder, decoders.ByteLevel):
        raise ModelError(f"{model_dir}/tokenizer.json: not a byte-level BPE tokenizer")
    byte_of_char = _byte_of_char()
    token_bytes = [b""] * vocab_size
    for token, token_id in backend.get_vocab(with_added_tokens=True).items():
        if token_id >= vocab_size:
            raise ModelError(f"{model_dir}: token id {token_id} exceeds vocab_size {vocab_size}")
        try:
            token_bytes[token_id] = bytes([byte_of_char[char] for char in token])
        except KeyError:  # an added token with characters that stand for themselves
            token_bytes[token_id] = token.encode()
    added = backend.get_added_tokens_decoder()
    return Vocabulary(
        token_bytes,
        frozenset(i for i, t in added.items() if t.special and t.content not in _ALWAYS_VISIBLE),
        {t.content: i for i, t in added.items()},
    )


def _byte_of_char() -> dict[str, int]:
    """The alphabet of byte-level BPE: printable Latin-1 bytes stand for themselves, the others
    for the characters from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = [byte for byte in range(0x100) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(0x100 + n): b for n, b in enumerate(shifted)}
