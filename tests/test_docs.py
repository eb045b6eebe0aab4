"""Prose is plain: no riddles in the docs, docstrings and comments; short lines and paragraphs."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from source_shape import sources, tree

ROOT = Path(__file__).parent.parent
DOCS = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(ROOT.glob("*/README.md")),
]
MAX_README_COLUMNS = 110
MAX_PARAGRAPH_WORDS = 90
# Phrase -> what to write instead.
RIDDLES = {
    r"nobody('s)?": "padding, dummy or unused",
    r"somebody('s)?": "name the process or request",
    r"whoever": "name the caller",
    r"scrap": "invalid or stale",
    r"in earnest": "in production",
    r"so that it bites": "say what happens",
    r"the ways? (to|out)": "the link or socket to",
    r"what lies": "name the positions or tokens",
    r"for ever": "forever, without limit or until",
    r"taken for right": "accepted",
    r"fill(ed|s)? up": "pad",
    r"gets on": "makes progress",
    r"dearer": "more expensive",
}
SENTENCE_OF_WHAT = r"(?:^|(?<=[.!:]\s))What [^.?!]*[.!]"  # a question may begin so


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def riddles(text: str) -> list[str]:
    """The phrases of a text that say too little."""
    words = " ".join(text.split())
    phrases = [m[0] for p in RIDDLES for m in re.finditer(rf"\b{p}\b", words, re.IGNORECASE)]
    return phrases + [match[0][:60] for match in re.finditer(SENTENCE_OF_WHAT, words)]


def paragraphs(text: str) -> Iterator[str]:
    """Prose of a Markdown file: no code, headings or tables; each item of a list by itself."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^(\||#).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^\s*([-*]|\d+\.) ", "\n\n", text, flags=re.MULTILINE)
    return (paragraph for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip())


def prose_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring and of every block of comments."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None:
                yield node.body[0].lineno, text
    yield from comments(path)


def comments(path: Path) -> Iterator[tuple[int, str]]:
    """Comments on neighbouring lines are one text."""
    block: list[str] = []
    last = 0
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type == tokenize.COMMENT:
            if block and token.start[0] != last + 1:
                yield last - len(block) + 1, " ".join(block)
                block = []
            block.append(token.string.lstrip("# "))
            last = token.start[0]
    if block:
        yield last - len(block) + 1, " ".join(block)


@pytest.mark.parametrize("path", DOCS, ids=name)
def test_docs_speak_plainly(path: Path) -> None:
    offenders = [(phrase, p[:60]) for p in paragraphs(path.read_text()) for phrase in riddles(p)]
    assert not offenders, f"{name(path)}: {offenders}"


@pytest.mark.parametrize("path", DOCS, ids=name)
def test_paragraphs_are_short(path: Path) -> None:
    counts = [(len(p.split()), p.strip()[:60]) for p in paragraphs(path.read_text())]
    too_long = [pair for pair in counts if pair[0] > MAX_PARAGRAPH_WORDS]
    assert not too_long, f"{name(path)}: {too_long}"


def test_the_lines_of_the_readme_are_short() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert not [line for line in lines if len(line) > MAX_README_COLUMNS]


def test_docstrings_and_comments_speak_plainly() -> None:
    offenders = [
        f"{name(path)}:{line}: {phrase}"
        for path in sources(ROOT)
        for line, text in prose_of(path)
        for phrase in riddles(text)
    ]
    assert not offenders, "\n".join(offenders)
