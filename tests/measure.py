"""Figures of a checkout that anyone can repeat.

`python tests/measure.py path [ROOT]`: the code that one streamed chat executes, by file. The chat
goes through the real frontend, scheduler and worker on a CPU, without tools and drafts
(`traced_chat.py`). A lambda or comprehension belongs to the `def` around it.

Lines of executed functions are counted in two ways, each line once. "Lines" are all lines from
`def` to the end of the function, without nested functions that did not run. "Code lines" are those
of them that lie after the signature and are no docstring, blank line or comment.
"""

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from source_shape import Function, code_lines, functions

HERE = Path(__file__).parent


@dataclass(frozen=True)
class FilePath:
    """What one file adds to the executed path."""

    file: str  # relative to the checkout
    functions: tuple[str, ...]
    lines: int
    code_lines: int


def trace(root: Path) -> list[FilePath]:
    """The executed path of one chat in a checkout, sorted by file."""
    command = [sys.executable, str(HERE / "traced_chat.py"), str(root)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if run.returncode:
        raise RuntimeError(f"the chat failed:\n{run.stdout}\n{run.stderr}")
    by_file: dict[str, set[int]] = defaultdict(set)
    for file, line in json.loads(run.stdout.splitlines()[-1]):
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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    path = commands.add_parser("path", help="the code that one streamed chat executes")
    path.add_argument("root", nargs="?", type=Path, default=HERE.parent)
    args = parser.parse_args(argv)
    print_path(trace(args.root.resolve()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
