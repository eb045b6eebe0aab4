"""Rendered prompts in which texts of the client spell added tokens -> token ids."""

from collections.abc import Callable

from tokenizers import Tokenizer as Backend
from tokenizers import models

from .control import stand_ins

_NO_TOKEN = "\ufffd"  # in place of a stand-in, while tokens are searched
_UNKNOWN = "\0"


class PlainEncoder:
    """Encodes text that has stand-ins (`control.py`): the added tokens that are spelled without one
    become tokens, the pieces between them are encoded as if there were no added tokens. Raises
    ValueError as `stand_ins` does."""

    def __init__(self, backend: Backend) -> None:
        added = backend.get_added_tokens_decoder()
        self._originals = stand_ins([token.content for token in added.values()])
        self._plain = Backend(backend.model)
        # Finds the added tokens as the tokenizer does; any other text is one unknown word.
        self._finder = Backend(models.WordLevel({_UNKNOWN: 0}, unk_token=_UNKNOWN))
        self._finder.add_tokens([added[token_id] for token_id in sorted(added)])
        real_ids = {token.content: token_id for token_id, token in added.items()}
        contents = self._finder.get_added_tokens_decoder()
        self._ids = {n: real_ids[token.content] for n, token in contents.items()}
        if backend.normalizer is not None:
            self._plain.normalizer = self._finder.normalizer = backend.normalizer
        if backend.pre_tokenizer is not None:
            self._plain.pre_tokenizer = backend.pre_tokenizer

    def encode_piece(self, text: str) -> list[int]:
        """Token ids of plain text, whatever it spells."""
        (encoding,) = self._plain.encode_batch_fast([text], add_special_tokens=False)
        ids: list[int] = encoding.ids
        return ids

    def encode(self, text: str, check: Callable[[int], None]) -> list[int]:
        """Token ids. `check` gets their number before they are listed. Other threads run
        meanwhile."""
        hidden = original = text
        for first, stand_in in self._originals.items():
            hidden = hidden.replace(stand_in, _NO_TOKEN)
            original = original.replace(stand_in, first)
        # A template may print surrogates of its own.
        hidden, original = (t.encode("utf-8", "replace").decode() for t in (hidden, original))
        (found,) = self._finder.encode_batch([hidden], add_special_tokens=False)
        pieces = list(zip(found.ids, found.offsets, strict=True))
        texts = [original[start:end] for n, (start, end) in pieces if n not in self._ids]
        encodings = self._plain.encode_batch_fast(texts, add_special_tokens=False)
        check(len(pieces) - len(texts) + sum(map(len, encodings)))
        ids: list[int] = []
        rest = iter(encodings)
        for n, _ in pieces:
            ids += [self._ids[n]] if n in self._ids else next(rest).ids
        return ids
