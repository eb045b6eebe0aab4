"""`glimmer check --write_golden`: stores the tokens that a checkpoint gives, for later starts.

A server compares its tokens with them before it is ready (`workers/self_test.py`).
"""

import asyncio
import contextlib
import tempfile
from pathlib import Path

import msgspec

from .. import __version__
from ..frontend.text.tokenizer import Tokenizer
from ..shared.config import ServeConfig
from ..shared.errors import ConfigError, ModelError
from ..shared.model_spec import ModelSpec
from ..workers.self_test import GOLDEN_FILE, NUM_TOKENS, Golden, require_same
from ..workers.startup import load_runner

_QUESTION = "Who are you?"
_MAX_PROMPT = 4096


def write_golden(config: ServeConfig, spec: ModelSpec) -> Path:
    """Run the model of a settled config in this process, on one rank, and write its reference.
    Raises ConfigError for several ranks, ModelError if the file cannot be written or the model does
    not give the same tokens twice."""
    if config.tp > 1:
        raise ConfigError(
            "--write_golden runs one rank; its reference holds for any --tp: drop --tp"
        )
    directory = Path(config.model_dir)
    with contextlib.closing(
        Tokenizer(directory, spec.vocab_size, config.chat_template)
    ) as tokenizer:
        messages = [{"role": "user", "content": _QUESTION}]
        prompt = asyncio.run(tokenizer.encode_chat(messages, None, {}, _MAX_PROMPT))
    with tempfile.TemporaryDirectory() as runtime_dir:
        runner = load_runner(config, 0, 0, Path(runtime_dir), lambda *_: None)
    found = require_same(runner, prompt, NUM_TOKENS, config)
    # Of tokens that are equally likely, the chosen one comes first.
    tops = [sorted(entry.top, key=lambda pair: pair[0] != entry.token_id) for entry in found]
    golden = Golden(
        prompt,
        [entry.token_id for entry in found],
        [[(token_id, round(logprob, 5)) for token_id, logprob in top] for top in tops],
        config.data_type or spec.dtype,
        f"glimmer {__version__} on {config.device}",
    )
    path = directory / GOLDEN_FILE
    try:
        path.write_bytes(msgspec.json.encode(golden) + b"\n")
    except OSError as error:
        raise ModelError(f"{path} cannot be written: {error.strerror}") from error
    return path
