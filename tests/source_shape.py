"""Figures about source text: functions, their lines and parameters, tokens. Nothing is imported.

Terms, as all users of this module count them:
- A code line holds at least one token that is no comment and no part of a docstring. A string of
  several lines that is no docstring counts with all its lines.
- The body of a function begins on the line after its signature and ends with its last line.
- A parameter is any name in the signature but `self` and `cls`.
- A kernel function is one that a GPU compiler translates (`@triton.jit` and the like).
"""

import ast
import io
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDERS = ("frontend", "scheduler", "workers", "shared", "kernels", "deploy")
_NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}
_Definition = ast.FunctionDef | ast.AsyncFunctionDef
_WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Function:
    """One `def`. Lines are numbered from 1 and inclusive."""

    name: str  # qualified within its file: `Class.method`, `outer.inner`
    decorated: int  # line of the first decorator, or of `def`
    start: int  # line of `def`
    body: int  # first line after the signature
    end: int
    parameters: int
    is_kernel: bool

    @property
    def length(self) -> int:
        """Lines from `def` to the end."""
        return self.end - self.start + 1


@dataclass(frozen=True)
class Tokens:
    """Tokens of code, and the lines that hold them."""

    tokens: int
    lines: int

    @property
    def per_line(self) -> float:
        return self.tokens / max(1, self.lines)


def sources(root: Path) -> list[Path]:
    """Production modules of a checkout: no tests."""
    inside = [path for folder in FOLDERS for path in (root / folder).rglob("*.py")]
    return [root / "__init__.py", root / "__main__.py", *sorted(inside)]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


@cache
def functions(path: Path) -> list[Function]:
    """All of a file, nested ones too, in the order of their lines."""
    return sorted(_functions(tree(path), ""), key=lambda function: function.start)


def _functions(node: ast.AST, prefix: str) -> Iterator[Function]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _Definition):
            yield _function(child, prefix)
            yield from _functions(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{prefix}{child.name}.")
        else:
            yield from _functions(child, prefix)


def _function(node: _Definition, prefix: str) -> Function:
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    return Function(
        name=prefix + node.name,
        decorated=min([node.lineno, *(d.lineno for d in node.decorator_list)]),
        start=node.lineno,
        body=node.body[0].lineno,
        end=node.end_lineno or node.lineno,
        parameters=_count_parameters(node.args),
        is_kernel=any("jit" in decorator for decorator in decorators),
    )


def count_returns(path: Path, names: Iterable[str]) -> int:
    """Return statements in the named functions of a file, with those of functions inside them."""
    spans = [(f.start, f.end) for f in functions(path) if f.name in set(names)]
    returns = [node.lineno for node in ast.walk(tree(path)) if isinstance(node, ast.Return)]
    return sum(any(start <= line <= end for start, end in spans) for line in returns)


def _count_parameters(args: ast.arguments) -> int:
    names = [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]
    return sum(name is not None and name.arg not in ("self", "cls") for name in names)


@cache
def docstring_lines(path: Path) -> frozenset[int]:
    """Lines of the docstrings of a module, its classes and functions."""
    lines: set[int] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, _WITH_DOCSTRING) and ast.get_docstring(node) is not None:
            text = node.body[0]
            lines.update(range(text.lineno, (text.end_lineno or text.lineno) + 1))
    return frozenset(lines)


@cache
def code_lines(path: Path) -> frozenset[int]:
    """Lines that hold code: none that are blank, a comment or a docstring."""
    lines: set[int] = set()
    for token in _code_tokens(path):
        lines.update(range(token.start[0], token.end[0] + 1))
    return frozenset(lines)


def count_tokens(path: Path) -> Tokens:
    """Tokens of code, as the running Python's `tokenize` splits them (3.12 splits f-strings, 3.11
    does not)."""
    return Tokens(len(_code_tokens(path)), len(code_lines(path)))


@cache
def _code_tokens(path: Path) -> list[tokenize.TokenInfo]:
    skipped = docstring_lines(path)
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    return [t for t in tokens if t.type not in _NO_CODE and t.start[0] not in skipped]
