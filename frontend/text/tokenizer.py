"""Text -> token ids: the checkpoint's tokenizer and chat template, on their own threads.

`tokenizer.json` is read by the library that wrote it. transformers reads it in the same way, but
would import torch. The template comes from the model directory (or `--chat_template`), never from a
request, and is rendered in another process (`template.py`). No code of the checkpoint runs in this
one. In chats, only the template makes control tokens (`control.py`); a text that is a prompt by
itself may spell them.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from tokenizers import Tokenizer as Backend
from tokenizers import decoders

from ...shared.errors import ConfigError, ContextLengthError, ModelError, RequestError, StartError
from ..wire.schema import wrong
from .detokenize import Vocabulary
from .fair_queue import LARGE_FOR, FairQueue
from .plain import PlainEncoder
from .template import Rendered, Renderer, TooSlowError, check_template

_THREADS = 2
_MANY_TOKENS = 1 << 18
_LONG_TEXT = 2000  # characters
_LARGE_PROMPTS = 2  # that are prepared at the same time
_RENDER_S = 10.0
_RESERVED = frozenset(
    "self messages tools documents conversation chat_template tokenize truncation padding "
    "max_length return_tensors return_dict tokenizer_kwargs add_generation_prompt "
    "continue_final_message raise_exception strftime_now namespace".split()
)
_CHARS_PER_TOKEN = 4  # as a rule
_MAX_CHARS_PER_TOKEN = 8  # longer texts are refused before they are tokenized
# Never left out of the text, even if tokenizer.json marks them special: parsers need them.
_ALWAYS_VISIBLE = frozenset(
    f"<{slash}{name}>"
    for name in ("think", "tool_call", "tool_response", "arg_key", "arg_value")
    for slash in ("", "/")
)
# Settings that templates use as variables.
_TOKEN_NAMES = tuple(f"{name}_token" for name in "bos eos unk sep pad cls mask".split())
_TRIAL = "Hello, can you hear me?"
T = TypeVar("T")
logger = logging.getLogger(__name__)


class Tokenizer:
    """The checkpoint's tokenizer. Encoding runs in a small thread pool, rendering in another
    process, one prompt at a time. Large prompts have threads and processes of their own, which
    start with the first of them.

    `chat_template` is a path whose file replaces the checkpoint's template; `render_limit_s` is the
    time limit for one prompt. Raises ModelError when the tokenizer cannot be loaded or is not a
    byte-level BPE, ConfigError when `chat_template` cannot be read; one of the two when the
    template has a syntax error.
    """

    def __init__(
        self,
        model_dir: Path,
        vocab_size: int,
        chat_template: str | None = None,
        render_limit_s: float = _RENDER_S,
    ) -> None:
        self._backend = _load_backend(model_dir / "tokenizer.json")
        settings = _load_settings(model_dir / "tokenizer_config.json")
        tokens = _special_tokens(settings)
        template = _load_template(settings.get("chat_template"), model_dir, chat_template)
        # tokenizer_config.json with the template that is used: what other tokenizers need.
        self.info = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
        self.info["chat_template"] = template
        self.vocab_size = vocab_size
        self.vocabulary = _make_vocabulary(self._backend, vocab_size, model_dir)
        try:
            self._plain = PlainEncoder(self._backend)
        except ValueError as error:
            raise ModelError(f"{model_dir}/tokenizer.json: {error}") from error
        self._bad_template = ModelError if chat_template is None else ConfigError
        self._renderer: Renderer | None = None
        self._large = [Preparer() for _ in range(_LARGE_PROMPTS)]
        if template is not None:
            added = list(self.vocabulary.added_ids)
            self._renderer = Renderer(template, tokens, render_limit_s, added)
            for preparer in self._large:
                preparer.renderer = Renderer(template, tokens, render_limit_s, added)
        self._queue = FairQueue(self._large)
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="tokenize")
        # A thread of its own waits for the process, so that a template that hangs does not keep
        # texts from being encoded.
        self._render_pool = ThreadPoolExecutor(1, thread_name_prefix="render")
        self._reserved = _RESERVED | tokens.keys()

    def try_template(self) -> None:
        """Render one user message, which also starts the process for the first prompt. Raises
        ModelError, or ConfigError for a given `chat_template`, if that fails or prints nothing.
        Warns if the message's text is left out."""
        renderer = self._renderer
        if renderer is None:
            return
        messages = [{"role": "user", "content": _TRIAL}]
        arguments = {"messages": messages, "tools": None, "add_generation_prompt": True}
        try:
            # In this thread, with which the process ends.
            text = self._render_pool.submit(renderer.render, arguments).result().text
        except TooSlowError as error:
            logger.warning("a trial of the chat template: %s", error)
            return
        except RequestError as error:
            raise self._bad_template(f"{error}. Tried: one user message, {_TRIAL!r}") from None
        if not text.strip():
            raise self._bad_template("the chat template prints nothing for a user message")
        if _TRIAL not in text:
            logger.warning("the chat template leaves out the text of a user message: %.200r", text)

    async def encode(
        self, text: str, field: str, max_tokens: int, add_special_tokens: bool = False
    ) -> list[int]:
        """Token ids of `text`. Raises RequestError naming `field` when it is far too long."""
        check_text_length(len(text), field, max_tokens)
        return await self.run(partial(self._encode, text, add_special_tokens, field, max_tokens))

    async def encode_chat(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        template_kwargs: dict[str, Any],
        max_tokens: int,
        prefill: str = "",
    ) -> list[int]:
        """Token ids of a conversation, ready for the assistant's turn, which begins with the text
        `prefill`.

        `messages` come from `normalise_messages`. Raises RequestError when the template fails on
        them, or when a keyword would replace one of the template call's own arguments.
        """
        for name in template_kwargs:
            if name in self._reserved:
                raise wrong(f"chat_template_kwargs.{name}", "cannot be set by a request")
        renderer = self._renderer
        if renderer is None:
            raise RequestError("this model has no chat template; use /v1/completions", "messages")
        check_text_length(sum(len(m.get("content", "")) for m in messages), "messages", max_tokens)
        arguments = {
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": True,
            **template_kwargs,
        }
        client = LARGE_FOR.get()
        if client is not None:
            return await self._queue.run(
                client, partial(self._prepare, arguments, max_tokens, prefill)
            )
        loop = asyncio.get_running_loop()
        prompt = await loop.run_in_executor(self._render_pool, renderer.render, arguments)
        return await self.run(partial(self._encode_prompt, prompt, max_tokens, prefill))

    def _prepare(
        self, arguments: dict[str, Any], max_tokens: int, prefill: str, preparer: "Preparer"
    ) -> list[int]:
        assert preparer.renderer is not None, "there is a template"
        return self._encode_prompt(preparer.renderer.render(arguments), max_tokens, prefill)

    def _encode_prompt(self, prompt: Rendered, max_tokens: int, prefill: str = "") -> list[int]:
        check_text_length(len(prompt.text) + len(prefill), "messages", max_tokens)
        start = self._plain.encode_piece(prefill) if prefill else []
        if not prompt.has_stand_ins:
            return self._encode(prompt.text, False, "messages", max_tokens) + start
        check = partial(_check_count, field="messages", max_tokens=max_tokens)
        return self._plain.encode(prompt.text, check) + start

    def check_ids(self, token_ids: Sequence[int], field: str) -> None:
        """Raises RequestError unless all ids are rows of the model's embedding."""
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < self.vocab_size):
            first = next(i for i in token_ids if not 0 <= i < self.vocab_size)
            raise wrong(field, f"token id {first} is outside 0..{self.vocab_size - 1}")

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of whole sequences, special tokens included. Not for the hot path."""
        return b"".join(self.vocabulary.token_bytes[i] for i in token_ids).decode(
            "utf-8", "replace"
        )

    def close(self) -> None:
        """Stop the threads after their running jobs."""
        self._render_pool.shutdown(wait=False, cancel_futures=True)
        if self._renderer is not None:
            self._renderer.child.close()
        for preparer in self._large:
            preparer.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def run(self, job: Callable[[], T]) -> T:
        """Run a job in another thread. Clients with large requests take turns."""
        if LARGE_FOR.get() is not None:
            return await self.run_large(job)
        return await asyncio.get_running_loop().run_in_executor(self._pool, job)

    async def run_large(self, job: Callable[[], T]) -> T:
        """Run a job that takes long. Raises OverloadedError when too many wait."""
        return await self._queue.run(LARGE_FOR.get() or "", lambda _: job())

    def _encode(
        self, text: str, add_special_tokens: bool, field: str = "prompt", max_tokens: int = 1 << 30
    ) -> list[int]:
        ids: list[int]
        if len(text) < _LONG_TEXT:
            ids = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
            return ids
        # `encode` keeps all other threads from running.
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        _check_count(len(encoding), field, max_tokens)
        ids = encoding.ids
        return ids


@dataclass
class Preparer:
    """Prepares large prompts: a thread, and the process that renders for it, if there is a
    template. The process starts with the first prompt."""

    renderer: Renderer | None = None
    thread: Executor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="prepare")
    )

    def close(self) -> None:
        """End both."""
        self.thread.shutdown(wait=False, cancel_futures=True)
        if self.renderer is not None:
            self.renderer.child.close()


def _load_backend(path: Path) -> Backend:
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises no narrower class
        raise ModelError(f"{path}: cannot load the tokenizer: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _load_settings(path: Path) -> dict[str, Any]:
    """tokenizer_config.json, which may be absent."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{path}: {error}") from error


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """Name, such as eos_token, -> text."""
    values = {name: settings.get(name) for name in _TOKEN_NAMES}
    texts = {n: v.get("content") if isinstance(v, dict) else v for n, v in values.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _load_template(setting: Any, model_dir: Path, replacement: str | None) -> str | None:
    """The template's text: from the replacement, else from the checkpoint's file, else `setting`
    from its tokenizer_config.json. None if there is none."""
    path = Path(replacement) if replacement is not None else model_dir / "chat_template.jinja"
    kind: type[StartError] = ModelError
    name = f"{path}"
    if replacement is not None:
        kind, name = ConfigError, f"--chat_template {replacement}"
    template: str | None = setting if isinstance(setting, str) else None
    try:
        if replacement is not None or path.exists():
            template = path.read_text()
        if template is not None:
            check_template(template)
    except (OSError, ValueError, RecursionError) as error:
        raise kind(f"{name}: {error}") from error
    return template


def check_text_length(num_chars: int, field: str, max_tokens: int) -> None:
    """Raises RequestError for texts that are too long to fit, without tokenizing them."""
    if num_chars > _MAX_CHARS_PER_TOKEN * max_tokens:
        raise ContextLengthError(num_chars // _CHARS_PER_TOKEN, max_tokens, field, num_chars)


def _check_count(num_tokens: int, field: str, max_tokens: int) -> None:
    """Raises RequestError for so many tokens that a list of them takes long."""
    if num_tokens > max(2 * max_tokens, _MANY_TOKENS):
        raise ContextLengthError(num_tokens, max_tokens, field)


def _make_vocabulary(backend: Backend, vocab_size: int, model_dir: Path) -> Vocabulary:
    if not isinstance(backend.decoder, decoders.ByteLevel):
        raise ModelError(f"{model_dir}/tokenizer.json: not a byte-level BPE tokenizer")
    byte_of_char = _byte_of_char()
    token_bytes = [b""] * vocab_size
    for token, token_id in backend.get_vocab(with_added_tokens=True).items():
        if token_id >= vocab_size:
            raise ModelError(f"{model_dir}: token id {token_id} exceeds vocab_size {vocab_size}")
        try:
            token_bytes[token_id] = bytes([byte_of_char[char] for char in token])
        except KeyError:  # an added token, whose characters are plain text
            token_bytes[token_id] = token.encode()
    added = backend.get_added_tokens_decoder()
    return Vocabulary(
        token_bytes,
        frozenset(i for i, t in added.items() if t.special and t.content not in _ALWAYS_VISIBLE),
        {t.content: i for i, t in added.items()},
    )


def _byte_of_char() -> dict[str, int]:
    """The alphabet of byte-level BPE: a printable Latin-1 byte is its own character, the others
    are the characters from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = [byte for byte in range(0x100) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(0x100 + n): b for n, b in enumerate(shifted)}
