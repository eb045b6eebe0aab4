"""Compiled grammars for tests below the frontend: files as the compiling process writes them."""

from pathlib import Path
from typing import Any

import msgspec
from glimmer.frontend.grammar.compile_child import Library, Order, Setup
from glimmer.frontend.grammar.source import GrammarSource, OutputFormat
from glimmer.frontend.text.detokenize import Vocabulary
from glimmer.shared.messages import Grammar


class GrammarFiles:
    """A directory of compiled grammars for one vocabulary."""

    def __init__(self, directory: Path, vocabulary: Vocabulary, end_ids: tuple[int, ...]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        tokens, added = vocabulary.token_bytes, vocabulary.added_ids
        setup = Setup(str(directory), tokens, added, list(end_ids), 1, 4096.0, 256.0, 60.0)
        self._library = Library(setup)
        self._count = 0

    def make(self, kind: Any, source: Any = None, **fields: Any) -> Grammar:
        """A format's grammar; `fields` are those of `Grammar`."""
        return self.compile(GrammarSource(OutputFormat(kind, source, "field")), **fields)

    def compile(self, source: GrammarSource, **fields: Any) -> Grammar:
        """Any source's."""
        self._count += 1
        name = f"grammar{self._count}"
        answer = self._library.compile(Order(self._count, name, msgspec.json.encode(source)))
        assert not answer.error, answer
        return Grammar(name, str(self._directory / name), **fields)
