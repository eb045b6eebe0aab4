"""Plants faults in a copy of the code, one at a time, and runs the tests that should find each.

`python tests/planted_faults.py [--only NAME] [--jobs N] [--results FILE] [--before ROOT]` prints
one line per fault and a summary. `planted_faults.toml` lists the faults. Verdicts:

- found: a test failed, or did not end in time.
- SURVIVED: all tests passed.
- BROKEN: the fault could not be planted, or pytest could not run the tests.

`--results` keeps the verdicts in a JSON file. The next run with that file skips faults that have a
verdict and have not changed since. `--unharmed` runs the named tests without any fault first, and
stops if one fails. `--before` plants the faults in a checkout of commit c27d334 instead: the table
`before` of a fault says what differs there.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

ROOT = Path(__file__).parent.parent
LIST = Path(__file__).with_suffix(".toml")
TIMEOUT_S = 400.0
_LARGE_BYTES = 1 << 20  # larger files are linked, not copied
_FAILED, _PASSED = 1, 0  # exit codes of pytest


@dataclass(frozen=True)
class Fault:
    """One change of production code. `old` occurs once in `file`."""

    name: str
    file: str
    old: str
    new: str
    reason: str  # what goes wrong
    tests: tuple[str, ...]  # arguments of pytest


@dataclass(frozen=True)
class Verdict:
    """The outcome for one fault; `detail` is the first failed test, or an error."""

    verdict: str
    detail: str
    seconds: float


def load_faults(is_before: bool = False) -> dict[str, Fault]:
    """The faults by name, as they are planted here or in the older checkout."""
    faults = {}
    for entry in tomllib.loads(LIST.read_text())["fault"]:
        before = entry.pop("before", {})
        if is_before:
            entry |= before
        fault = Fault(**{**entry, "tests": tuple(entry["tests"])})
        assert fault.name not in faults, f"two faults are named {fault.name}"
        faults[fault.name] = fault
    return faults


def _git(directory: Path, *command: str) -> str:
    run = subprocess.run(["git", *command], cwd=directory, capture_output=True, check=True)
    return run.stdout.decode()


def _make_python(directory: Path, tree: Path) -> str:
    """A Python with the packages of this one, for which `tree` is the package `glimmer`, also in
    processes that get another environment."""
    packages = directory / "packages"
    packages.mkdir(parents=True)
    (packages / "glimmer").symlink_to(tree)
    venv.create(directory / "venv", symlinks=True)
    (site,) = (directory / "venv" / "lib").glob("python3*/site-packages")
    installed = [path for path in sys.path if path.endswith("site-packages")]
    (site / "copy.pth").write_text("\n".join([str(packages), *installed]) + "\n")
    return str(directory / "venv" / "bin" / "python")


class Copy:
    """A copy of a checkout's files, in which one fault at a time is planted."""

    def __init__(self, checkout: Path, directory: Path) -> None:
        self._tree = directory / "tree"
        self._python = _make_python(directory, self._tree)
        self._changed_at = int(time.time())
        for file in _git(checkout, "ls-files", "-co", "--exclude-standard").splitlines():
            if (checkout / file).is_file():
                self._copy(checkout / file, self._tree / file)

    @staticmethod
    def _copy(source: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.stat().st_size > _LARGE_BYTES:
            target.symlink_to(source)
        else:
            shutil.copy(source, target)

    def try_fault(self, fault: Fault, timeout_s: float) -> Verdict:
        """Plant it, run its tests, take it out again."""
        path = self._tree / fault.file
        if not path.exists():
            return Verdict("BROKEN", f"no file {fault.file}", 0.0)
        original = path.read_text()
        if original.count(fault.old) != 1:
            return Verdict("BROKEN", f"the text occurs {original.count(fault.old)} times", 0.0)
        self._write(path, original.replace(fault.old, fault.new))
        try:
            return self.run(fault.tests, timeout_s)
        finally:
            self._write(path, original)

    def _write(self, path: Path, text: str) -> None:
        """With a time of its own, as Python recompiles a module when time or size have changed."""
        self._changed_at += 1
        path.write_text(text)
        os.utime(path, (self._changed_at, self._changed_at))

    def run(self, tests: Iterable[str], timeout_s: float) -> Verdict:
        """Run tests up to the first failure."""
        missing = [test for test in tests if not (self._tree / test.split("::")[0]).exists()]
        if missing:
            return Verdict("BROKEN", f"no tests {missing}", 0.0)
        started = time.monotonic()
        command = [self._python, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(
                command,
                cwd=self._tree,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            code = _wait(process, timeout_s)
            output.seek(0)
            text = output.read()
        seconds = time.monotonic() - started
        if code is None:
            return Verdict("found", "not within the time", seconds)
        if code == _PASSED:
            return Verdict("SURVIVED", "", seconds)
        if code != _FAILED:
            return Verdict("BROKEN", "\n".join(text.splitlines()[-15:]), seconds)
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE)
        return Verdict("found", failed[1] if failed else "", seconds)


def _wait(process: subprocess.Popen[bytes], timeout_s: float) -> int | None:
    """The exit code; None after the timeout. Ends whatever the process started."""
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Results:
    """Verdicts by name of the fault, kept in a JSON file if there is a path."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._entries: dict[str, Any] = {}
        if path is not None and path.exists():
            self._entries = json.loads(path.read_text())

    def get(self, fault: Fault) -> Verdict | None:
        """The verdict of an earlier run on the same fault."""
        entry = self._entries.get(fault.name)
        if entry is None or entry["fault"] != json.loads(json.dumps(asdict(fault))):
            return None
        return Verdict(**entry["verdict"])

    def put(self, fault: Fault, verdict: Verdict) -> None:
        self._entries[fault.name] = {"fault": asdict(fault), "verdict": asdict(verdict)}
        if self._path is not None:
            self._path.write_text(json.dumps(self._entries, indent=1))


def try_all(
    faults: Sequence[Fault], checkout: Path, results: Results, jobs: int, timeout_s: float
) -> dict[str, Verdict]:
    """Verdicts by name, printed as they come."""
    verdicts: dict[str, Verdict] = {}
    with tempfile.TemporaryDirectory(prefix="planted-") as directory:
        copies: SimpleQueue[Copy] = SimpleQueue()
        for number in range(jobs):
            copies.put(Copy(checkout, Path(directory) / str(number)))

        def try_one(fault: Fault) -> Verdict:
            copy = copies.get()
            try:
                return copy.try_fault(fault, timeout_s)
            finally:
                copies.put(copy)

        with ThreadPoolExecutor(jobs) as pool:
            for fault, verdict in zip(faults, pool.map(try_one, faults), strict=True):
                results.put(fault, verdict)
                verdicts[fault.name] = verdict
                show(fault, verdict)
    return verdicts


def show(fault: Fault, verdict: Verdict) -> None:
    """One line, or more for an error."""
    row = f"{verdict.verdict:8} {fault.file:44} {fault.name:44} {verdict.seconds:5.0f} s"
    print(f"{row}  {verdict.detail}", flush=True)


def summarize(faults: Sequence[Fault], verdicts: dict[str, Verdict]) -> None:
    """Counts per folder and in all."""
    per_folder: dict[str, Counter[str]] = {}
    for fault in faults:
        folder = fault.file.split("/")[0]
        per_folder.setdefault(folder, Counter())[verdicts[fault.name].verdict] += 1
    for folder, counts in sorted(per_folder.items()):
        print(f"{folder:12} {dict(counts)}")
    print(f"{'all':12} {dict(Counter(v.verdict for v in verdicts.values()))}")


def check_unharmed(faults: Sequence[Fault], checkout: Path, timeout_s: float) -> None:
    """Raises SystemExit if a test fails without a fault."""
    tests = sorted({test for fault in faults for test in fault.tests})
    with tempfile.TemporaryDirectory(prefix="planted-") as directory:
        verdict = Copy(checkout, Path(directory)).run(tests, timeout_s * len(tests))
    if verdict.verdict != "SURVIVED":
        raise SystemExit(f"without a fault: {verdict.detail}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Plant faults and run the tests that find them.")
    parser.add_argument("--only", action="append", help="this fault; may be repeated")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time")
    parser.add_argument("--results", type=Path, help="JSON file to keep verdicts in")
    parser.add_argument("--before", type=Path, help="plant them in this older checkout")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, help="seconds for one fault")
    parser.add_argument("--unharmed", action="store_true", help="first without any fault")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """0 if all were found."""
    args = parse(argv)
    checkout = ROOT if args.before is None else args.before.resolve()
    every = load_faults(is_before=args.before is not None)
    faults = [every[name] for name in args.only or every]
    if args.unharmed:
        check_unharmed(faults, checkout, args.timeout)
    results = Results(args.results)
    verdicts = {f.name: known for f in faults if (known := results.get(f)) is not None}
    for fault in faults:
        if fault.name in verdicts:
            show(fault, verdicts[fault.name])
    waiting = [fault for fault in faults if fault.name not in verdicts]
    verdicts |= try_all(waiting, checkout, results, args.jobs, args.timeout)
    summarize(faults, verdicts)
    return int(any(verdict.verdict != "found" for verdict in verdicts.values()))


if __name__ == "__main__":
    sys.exit(main())
