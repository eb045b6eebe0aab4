"""Figures of checkouts that anyone can repeat.

`python tests/measure.py path [ROOT]`: the code that one streamed chat executes, by file. The chat
goes through the real frontend, scheduler and worker on a CPU, without tools and drafts
(`traced_chat.py`). A lambda or comprehension belongs to the `def` around it.

Lines of executed functions are counted in two ways, each line once. "Lines" are all lines from
`def` to the end of the function, without nested functions that did not run. "Code lines" are those
of them that lie after the signature and are no docstring, blank line or comment.

`python tests/measure.py table [ROOT [ROOT]]`: a table of figures, of two checkouts side by side.
`source_shape.py` defines code lines, parameters and kernels.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from source_shape import (
    FOLDERS,
    Function,
    Tokens,
    code_lines,
    count_returns,
    count_tokens,
    functions,
    sources,
)

HERE = Path(__file__).parent
# Modules of workers/ that take a plan to its result; older checkouts have others of them.
STEP_MODULES = frozenset(
    "loop step forward drafts inputs rows graphs runner drafting mtp pending".split()
)


@dataclass(frozen=True)
class FilePath:
    """What one file adds to the executed path."""

    file: str  # relative to the checkout
    functions: tuple[str, ...]
    lines: int
    code_lines: int


@dataclass(frozen=True)
class Trace:
    """What one chat executes; see `traced_chat.py`. Both are sorted by file."""

    path: list[FilePath]
    rooms: list[FilePath]


def trace(root: Path, num_drafts: int = 0) -> Trace:
    """Serve a checkout's demo model and stream chats. Raises RuntimeError if that fails."""
    command = [sys.executable, str(HERE / "traced_chat.py"), str(root), str(num_drafts)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if run.returncode:
        raise RuntimeError(f"the chat failed:\n{run.stdout}\n{run.stderr}")
    result = json.loads(run.stdout.splitlines()[-1])
    return Trace(count_files(root, result["path"]), count_files(root, result["rooms"]))


def count_files(root: Path, executed: Iterable[tuple[str, int]]) -> list[FilePath]:
    """From (file, first line of a code object) pairs."""
    by_file: dict[str, set[int]] = defaultdict(set)
    for file, line in executed:
        by_file[file].add(line)
    return [count_file(root, file, lines) for file, lines in sorted(by_file.items())]


def count_file(root: Path, file: str, first_lines: Iterable[int]) -> FilePath:
    """The functions of a file in which code objects with these first lines lie."""
    every = functions(root / file)
    executed = {innermost(every, line) for line in first_lines} - {None}
    lines: set[int] = set()
    signatures: set[int] = set()
    for function in every:  # outer ones come first
        span = range(function.start, function.end + 1)
        lines = lines | set(span) if function in executed else lines - set(span)
        signatures.update(range(function.start, function.body))
    code = lines & code_lines(root / file) - signatures
    names = tuple(function.name for function in every if function in executed)
    return FilePath(file, names, len(lines), len(code))


def innermost(every: Sequence[Function], line: int) -> Function | None:
    """The last function to begin that holds the line; None for a lambda of the module itself."""
    around = [f for f in every if f.decorated <= line <= f.end]
    return around[-1] if around else None


def print_path(path: Sequence[FilePath]) -> None:
    """One row per file, then sums per folder, then of all."""
    print(f"{'file':48} {'functions':>9} {'lines':>6} {'code lines':>10}")
    for file in path:
        _print_row(file.file, [file])
        print(f"    {', '.join(file.functions)}")
    print()
    for folder in sorted({file.file.split("/")[0] for file in path}):
        _print_row(f"{folder}/", [file for file in path if file.file.startswith(f"{folder}/")])
    _print_row(f"all, {len(path)} files", path)


def _print_row(label: str, files: Sequence[FilePath]) -> None:
    count = sum(len(file.functions) for file in files)
    lines = sum(file.lines for file in files)
    code = sum(file.code_lines for file in files)
    print(f"{label:48} {count:9} {lines:6} {code:10}")


def table(root: Path) -> dict[str, str]:
    """Figures of a checkout by their names."""
    return {**shape(root), **path_figures(root)}


def path_figures(root: Path) -> dict[str, str]:
    """Figures that need a running server."""
    plain, drafted = trace(root), trace(root, 2)
    return {
        "one streamed chat executes: files": str(len(plain.path)),
        "- functions executed": str(sum(len(file.functions) for file in plain.path)),
        "- lines executed": str(sum(file.lines for file in plain.path)),
        "- code lines executed": str(sum(file.code_lines for file in plain.path)),
        "functions of workers/ that take a plan to its result": _rooms(root, _step_files(plain)),
        "- with 2 drafts": _rooms(root, _step_files(drafted)),
        "functions of workers/ given a StepPlan or a part": _rooms(root, plain.rooms),
        "- with 2 drafts each": _rooms(root, drafted.rooms),
    }


def _step_files(trace: Trace) -> list[FilePath]:
    """Of the executed path: no model, sampling or memory."""
    return [f for f in trace.path if f.file.removeprefix("workers/")[:-3] in STEP_MODULES]


def _rooms(root: Path, rooms: Sequence[FilePath]) -> str:
    count = sum(len(file.functions) for file in rooms)
    returns = sum(count_returns(root / file.file, file.functions) for file in rooms)
    return f"{count} in {len(rooms)} files ({returns} returns)"


def shape(root: Path) -> dict[str, str]:
    """Figures of the source text."""
    files = sources(root)
    every = [function for path in files for function in functions(path)]
    wide = [f.parameters for f in every if f.parameters >= 8 and not f.is_kernel]
    lengths = sorted(function.length for function in every)
    longest = max(files, key=_count_lines)
    folder, most = Counter(path.parent for path in files).most_common(1)[0]
    return {
        "production files": str(len(files)),
        "- lines": str(sum(map(_count_lines, files))),
        "- code lines": str(sum(len(code_lines(path)) for path in files)),
        "- the longest": f"{_count_lines(longest)} ({longest.relative_to(root)})",
        "most Python files in one folder": f"{most} ({folder.relative_to(root)})",
        "tokens per code line": f"{_tokens(files).per_line:.2f}",
        **{f"- {f}": f"{_tokens(_inside(root, f)).per_line:.2f}" for f in FOLDERS},
        "functions with 8 and more parameters, no kernels": str(len(wide)),
        "- with more than 8": str(sum(count > 8 for count in wide)),
        "- most parameters": str(max(f.parameters for f in every if not f.is_kernel)),
        "function length: median": f"{statistics.median(lengths):g}",
        "- 90th percentile": str(lengths[len(lengths) * 9 // 10]),
        "- longest, no kernels": str(max(f.length for f in every if not f.is_kernel)),
        "README lines": str(_count_lines(root / "README.md")),
    }


def _inside(root: Path, folder: str) -> list[Path]:
    return [path for path in sources(root) if path.is_relative_to(root / folder)]


def _tokens(files: Sequence[Path]) -> Tokens:
    counts = [count_tokens(path) for path in files]
    return Tokens(sum(c.tokens for c in counts), sum(c.lines for c in counts))


def _count_lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def print_table(roots: Sequence[Path]) -> None:
    """A Markdown table with a column per checkout."""
    tables = [table(root) for root in roots]
    titles = ["before", "after"] if len(roots) == 2 else [root.name for root in roots]
    print(f"| figure | {' | '.join(titles)} |")
    print("|---" * (1 + len(roots)) + "|")
    for figure in tables[0]:
        print(f"| {figure} | {' | '.join(column[figure] for column in tables)} |")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Figures of checkouts.")
    commands = parser.add_subparsers(dest="command", required=True)
    path = commands.add_parser("path", help="the code that one streamed chat executes")
    path.add_argument("roots", nargs="*", type=Path, metavar="ROOT")
    figures = commands.add_parser("table", help="figures of one or two checkouts, side by side")
    figures.add_argument("roots", nargs="*", type=Path, metavar="ROOT")
    args = parser.parse_args(argv)
    roots = [root.resolve() for root in args.roots] or [HERE.parent]
    if args.command == "table":
        print_table(roots)
        return 0
    for root in roots:
        print_path(trace(root).path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
