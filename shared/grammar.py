"""Grammars of structured output, as the frontend's check and the worker both read them.

llguidance is imported on first use: a process without grammars does not pay for it.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from .errors import ModelError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

END_TOKEN = "<|endoftext|>"


def parser_limits() -> "LLParserLimits":
    """The limits of one grammar. A matcher that exceeds one is in an error state from then on.

    A lexer state takes 1 to 2 kB, so a matcher takes at most some 50 MB. The limits of a step
    allow about 10 ms for one mask; ordinary grammars take less than 1 ms.
    """
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=100_000,
        step_max_items=20_000,
        max_items_in_row=3_000,  # an object with 750 optional properties
        max_lexer_states=25_000,
        max_grammar_size=500_000,
        verbose_errors=False,
    )


def make_matcher(tokenizer: "LLTokenizer", text: str) -> "LLMatcher":
    """A matcher at the beginning of the grammar `text`. It never raises: look at `is_error`.

    The constructor may overflow the stack of its thread for a grammar that was not checked.
    """
    from llguidance import LLMatcher

    return LLMatcher(tokenizer, text, log_level=0, limits=parser_limits())


def read_tokenizer(model_dir: Path, vocab_size: int) -> "LLTokenizer":
    """The model's vocabulary for matchers, padded to `vocab_size` ids. Takes seconds.

    All added tokens are special, so that no text can spell them: a grammar names them by id. The
    bit of `LLTokenizer.eos_token` in a mask means that the output may end: `END_TOKEN`, or the
    first added token. Raises ModelError when tokenizer.json cannot be read.
    """
    from llguidance import LLTokenizer

    path = model_dir / "tokenizer.json"
    try:
        document = msgspec.json.decode(path.read_bytes())
        added = document["added_tokens"]
        for token in added:
            token["special"] = True
        ids = {token["content"]: token["id"] for token in added}
        end_id = ids.get(END_TOKEN, added[0]["id"])
        text = msgspec.json.encode(document).decode()
        return LLTokenizer(text, n_vocab=vocab_size, eos_token=end_id)
    except Exception as error:  # the library raises no narrower class
        raise ModelError(f"{path}: no vocabulary for grammars: {error}") from error
