"""The JSON report that all benchmarks write: results, settings, and where they were measured.

`{"benchmark", "command", "made_at", "environment", "settings", "results", ...}`. The environment
describes the machine that ran the command: GPU and driver or CPU, versions, commit. It is found
without torch, which would take memory and time beside the measured server.
"""

import csv
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ... import __version__

_ROOT = Path(__file__).parents[2]
_PACKAGES = (
    "torch triton transformers flashinfer-python fa3-fwd llguidance tokenizers aiohttp uvloop"
).split()
_QUERY = "--query-gpu=name,memory.total,driver_version"
_TIMEOUT_S = 20.0


def report(
    benchmark: str, argv: Sequence[str], settings: Any, results: Any, **more: Any
) -> dict[str, Any]:
    """The report of a benchmark. `argv` are its arguments without secrets, `more` are additional
    top-level keys."""
    return {
        "benchmark": benchmark,
        "command": shlex.join(["glimmer", "bench", benchmark, *argv]),
        "made_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        "settings": settings,
        **more,
        "results": results,
    }


def write_report(path: Path, value: dict[str, Any]) -> None:
    """Write a report as JSON. After an error no incomplete file is left. Raises OSError."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(json.dumps(value, indent=1) + "\n")
    unfinished.rename(path)


def environment() -> dict[str, Any]:
    """GPUs, driver, processor, versions and commit of this machine and installation. Missing
    values are None. `device` is the first GPU's name or "CPU"."""
    cards = gpus()
    return {
        "device": cards[0]["name"] if cards else "CPU",
        "gpus": cards,
        "driver": cards[0]["driver"] if cards else None,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "glimmer": __version__,
        "commit": commit(_ROOT),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def gpus() -> list[dict[str, Any]]:
    """Name, memory in MiB and driver of each NVIDIA GPU, from nvidia-smi."""
    try:
        output = _output("nvidia-smi", _QUERY, "--format=csv,noheader,nounits")
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in row] for row in csv.reader(output.splitlines())]
    return [
        {"name": row[0], "memory_mib": int(row[1]) if row[1].isdigit() else None, "driver": row[2]}
        for row in rows
        if len(row) == 3
    ]


def commit(root: Path) -> str | None:
    """The commit of the package in `root`, with "-dirty" if files differ from it. A checkout asks
    git; a wheel made by deploy/offline has the commit in a file."""
    if (root / ".git").exists():  # not a parent's .git: that may be another project
        try:
            words = "describe --always --dirty --abbrev=40 --exclude=*".split()
            return _output("git", "-C", str(root), *words).strip()
        except (OSError, subprocess.SubprocessError):
            return None
    try:
        return (root / "commit.txt").read_text().strip() or None
    except OSError:
        return None


def _output(*command: str) -> str:
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S
    ).stdout


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, None)
