"""Writes requirements-FLAVOUR.txt: the exact version and SHA-256 of every package of the image.

  python3.11 deploy/container/lock.py cpu     with an index that has a CPU build of torch
  python3.11 deploy/container/lock.py cuda    with one that has not, such as PyPI
  python3.11 deploy/container/lock.py build   setuptools, and the program that writes the SBOM

Run it from a checkout on Linux on x86-64 with the image's Python version. pip resolves what
pyproject.toml names within constraints.txt, and reports the files that it would install.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
_ROOT = _HERE.parents[1]
_PYTHON = "3.11"  # of the base image
_BUILD = ["setuptools>=77", "cyclonedx-bom>=7"]
_CUDA = ["fa3-fwd>=0.0.3"]  # flashinfer compiles at the start, with a CUDA compiler


def main(argv: list[str] | None = None) -> None:
    """Resolve and write the file. Exits with a line that says why if it fails."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("flavour", choices=("cpu", "cuda", "build"))
    flavour = parser.parse_args(argv).flavour
    if not sys.version.startswith(f"{_PYTHON}."):
        parser.error(f"needs Python {_PYTHON}, that of the image")
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
    wanted = _BUILD if flavour == "build" else project["dependencies"]
    if flavour == "cuda":
        wanted = [*wanted, *_CUDA]
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.json")
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
        command += ["--only-binary=:all:", f"--constraint={_ROOT / 'constraints.txt'}"]
        command += [f"--report={report}", "--quiet", *wanted]
        if subprocess.run(command, check=False).returncode:
            sys.exit("lock: pip failed, see above")
        text = requirements(json.loads(report.read_text()), flavour)
    (_HERE / f"requirements-{flavour}.txt").write_text(text)


def requirements(report: dict[str, Any], flavour: str) -> str:
    """The lines for `pip install --require-hashes`, from pip's report. Exits if torch is the build
    of another flavour, or a file has no hash."""
    lines = [f"# Written by deploy/container/lock.py {flavour}"]
    for item in sorted(report["install"], key=lambda item: item["metadata"]["name"].lower()):
        name, version = item["metadata"]["name"], item["metadata"]["version"]
        if name == "torch" and ("+cpu" in version) != (flavour == "cpu"):
            sys.exit(f"lock: this index offers torch {version}, which is not for {flavour}")
        hashes = item["download_info"].get("archive_info", {}).get("hashes", {})
        if "sha256" not in hashes:
            sys.exit(f"lock: the index tells no SHA-256 of {name}")
        lines.append(f"{name}=={version} --hash=sha256:{hashes['sha256']}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
