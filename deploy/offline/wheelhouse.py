"""Collects the wheels for a node without a network, on a machine that has a package index.

  python3.12 deploy/offline/wheelhouse.py --output wheelhouse --installed node.txt

Run it from a checkout, on Linux on x86-64, with the node's Python version. `node.txt` holds what
`pip list --format=freeze` prints on the node. Those packages, and packages that only they need, are
left out. The script needs only Python and pip, which asks the index it is configured for. Then
copy the output to the node and run `install.py` there.
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

_ROOT = Path(__file__).parents[2]


def main(argv: list[str] | None = None) -> None:
    """Make the directory, completely or not at all. Exits with a line that says why if it fails."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--output", type=Path, required=True, help="directory; must not exist")
    parser.add_argument("--installed", type=Path, help="file that lists the node's packages")
    parser.add_argument("--glibc", default="2.28", help="the node's or older (%(default)s)")
    parser.add_argument("--extras", nargs="*", default=["gpu"], help="of pyproject.toml (gpu)")
    args = parser.parse_args(argv)
    if args.output.exists():
        parser.error(f"--output {args.output} exists already")
    if not re.fullmatch(r"2\.(1[7-9]|[2-9]\d)", args.glibc):
        parser.error(f"--glibc {args.glibc}: must be 2.17 or newer, such as 2.28")
    lines = args.installed.read_text().splitlines() if args.installed else []
    for line in lines:
        if not re.fullmatch(r"[\w.-]+==\S+", line):
            parser.error(f"--installed: not name==version: {line}")
    installed = [line for line in lines if not line.startswith("glimmer-serve==")]
    with tempfile.TemporaryDirectory(prefix=".", dir=args.output.absolute().parent) as scratch:
        wheels = Path(scratch, "wheels")
        collect(wheels, Path(scratch), installed, args.glibc, args.extras)
        wheels.rename(args.output)
    print(f"Copy {args.output} to the node. There, python3 install.py --help says how to go on.")


def collect(
    wheels: Path, scratch: Path, installed: list[str], glibc: str, extras: list[str]
) -> None:
    """Fill `wheels`. `installed` are lines such as torch==2.11.0. `scratch` is left with files."""
    _run("-m", "pip", "download", "--no-deps", f"--dest={scratch}", "pip")  # old ones are slow
    pip = next(scratch.glob("pip-*.whl")) / "pip"
    commit = _copy_source(scratch / "source")
    _run(pip, "wheel", "--no-deps", f"--wheel-dir={wheels}", scratch / "source")
    project = str(next(wheels.iterdir())) + (f"[{','.join(extras)}]" if extras else "")

    # Empty wheels stand in for the node's packages, so pip does not look for what those need.
    (scratch / "node").mkdir()
    empty = {line.split("==")[0]: _empty_wheel(scratch / "node", line) for line in installed}
    constraints = scratch / "constraints.txt"
    constraints.write_text("".join(f"{name} @ {file.as_uri()}\n" for name, file in empty.items()))
    tags = [f"manylinux_2_{minor}_x86_64" for minor in range(int(glibc[2:]), 4, -1)]
    tags += ["manylinux2014_x86_64", "manylinux1_x86_64", "linux_x86_64"]
    target = ["--only-binary=:all:", *(f"--platform={tag}" for tag in tags)]
    _run(pip, "download", f"--dest={wheels}", f"--constraint={constraints}", *target, project)
    for file in empty.values():
        (wheels / file.name).unlink(missing_ok=True)

    digests = {file.name: hashlib.sha256(file.read_bytes()) for file in sorted(wheels.iterdir())}
    hashes = [f"./{name} --hash=sha256:{digest.hexdigest()}\n" for name, digest in digests.items()]
    (wheels / "requirements.txt").write_text("".join(hashes))
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    manifest = {"python": python, "glibc": glibc, "complete": not installed, "commit": commit}
    (wheels / "manifest.json").write_text(json.dumps(manifest))
    shutil.copy(Path(__file__).with_name("install.py"), wheels)


def _copy_source(source: Path) -> str:
    """Copy this project with a commit.txt. Returns the commit, with -dirty if files differ."""
    source.mkdir()
    for path in _ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
        elif (path / "__init__.py").exists():
            shutil.copytree(path, source / path.name, ignore=shutil.ignore_patterns("__pycache__"))
    describe = "describe --always --dirty --abbrev=40 --exclude=*"
    command = ["git", "-C", str(_ROOT), *describe.split()]
    try:
        commit = subprocess.check_output(command, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        commit = ""  # no checkout, or no git
    (source / "commit.txt").write_text(f"{commit}\n")
    return commit


def _empty_wheel(directory: Path, requirement: str) -> Path:
    """Write a wheel that has only the name and version of `requirement`, such as torch==2.11.0."""
    name, _, version = requirement.partition("==")
    stem = f"{re.sub('[-.]', '_', name)}-{version}"
    path = directory / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        wheel.writestr(f"{stem}.dist-info/METADATA", metadata)
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    return path


def _run(*words: str | Path) -> None:
    """Run pip. Exits if it fails."""
    command = [sys.executable, *words, "--disable-pip-version-check"]
    if subprocess.run(command, check=False).returncode:
        sys.exit("wheelhouse: pip failed, see above")


if __name__ == "__main__":
    main()
