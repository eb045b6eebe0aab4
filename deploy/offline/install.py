"""Installs from a wheelhouse on a node without a network; `wheelhouse.py` puts a copy into each.

  python3 install.py --venv /opt/glimmer       into a new virtual environment
  python3 install.py --here                    into the Python that runs this

Checks first that the wheels are for this Python and arrived whole, asks no index for anything, and
at last has `glimmer` say its version and `glimmer check` say what would keep a server from
starting. Needs nothing but Python.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_VERSIONS = (
    "import importlib.metadata as m, json, sys; "
    "print(json.dumps({d.metadata['Name']: d.version for d in m.distributions()}))"
)


class InstallError(Exception):
    """Cannot be installed. One line saying what was found and what to change."""


def main(argv: Sequence[str] | None = None) -> int:
    """Install and check. Returns the exit code: 0, that of `glimmer check`, or 1 after a line that
    says why not."""
    args = _parser().parse_args(argv)
    try:
        return install(args)
    except InstallError as error:
        print(f"install: {error}", file=sys.stderr)
    except subprocess.CalledProcessError as error:
        command = " ".join(map(str, error.cmd))
        print(f"install: this failed, see above: {command}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="install.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--venv", type=Path, metavar="DIR", help="make a virtual environment there")
    where.add_argument("--here", action="store_true", help="into the Python that runs this")
    add = parser.add_argument
    add("--wheelhouse", type=Path, default=Path(__file__).parent, help="default: beside this file")
    add("--model_dir", default="demo", help="what `glimmer check` looks at (%(default)s)")
    add("--no_check", action="store_true", help="do not run `glimmer check`")
    return parser


def install(args: argparse.Namespace) -> int:
    """Install from `args.wheelhouse`. Returns the exit code of the last check. Raises
    InstallError, and CalledProcessError if pip failed."""
    manifest = read_manifest(args.wheelhouse)
    check_machine(manifest)
    check_files(args.wheelhouse, manifest)
    if args.here:
        return _install_into(Path(sys.executable), args, manifest["kept"])
    python = _make_venv(args.venv, sees_system=bool(manifest["kept"]))
    try:
        return _install_into(python, args, manifest["kept"])
    except BaseException:
        shutil.rmtree(args.venv)
        raise


def _install_into(python: Path, args: argparse.Namespace, kept: Mapping[str, str]) -> int:
    check_kept(kept, _versions(python))
    pip = next(args.wheelhouse.glob("pip-*.whl")) / "pip"  # a wheel of pip runs as it is
    requirements = args.wheelhouse / "requirements.txt"
    # No setting of pip's, from a file or a variable, may add a place to look.
    command = ["env", f"PIP_CONFIG_FILE={os.devnull}", str(python), str(pip), "--isolated"]
    command += ["install", "--no-index", "--no-deps", "--disable-pip-version-check", "--quiet"]
    command += [f"--find-links={args.wheelhouse}", f"--requirement={requirements}"]
    subprocess.run(command, check=True)
    subprocess.run([python, "-P", "-m", "glimmer", "--version"], check=True)
    if args.no_check:
        return 0
    words = ["-P", "-m", "glimmer", "check", "--model_dir", args.model_dir, "--port", "0"]
    return subprocess.run([python, *words], check=False).returncode


def read_manifest(wheelhouse: Path) -> dict[str, Any]:
    """The wheelhouse's list of contents. Raises InstallError if there is none."""
    try:
        manifest: dict[str, Any] = json.loads((wheelhouse / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise InstallError(f"{wheelhouse} is no wheelhouse: {error}") from None
    return manifest


def check_machine(manifest: Mapping[str, Any]) -> None:
    """Raise InstallError if the wheels are for another Python or machine than this one."""
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if here != manifest["python"]:
        raise InstallError(
            f"the wheels are for Python {manifest['python']}, this is {here}: run install.py with "
            f"python{manifest['python']}, or make another wheelhouse with --python_version {here}"
        )
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        found = f"{platform.system()} on {platform.machine()}"
        raise InstallError(f"the wheels are for Linux on x86-64, this is {found}")
    library, version = platform.libc_ver()
    newest = ".".join(map(str, manifest["glibc"]))
    if library == "glibc" and _numbers(version) < _numbers(newest):
        raise InstallError(
            f"the wheels may need glibc {newest}, this is {version}: make another wheelhouse with "
            f"--glibc {version}"
        )


def check_files(wheelhouse: Path, manifest: Mapping[str, Any]) -> None:
    """Raise InstallError if a file is missing or is not what it was."""
    for name, digest in manifest["files"].items():
        try:
            with (wheelhouse / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise InstallError(f"{name} cannot be read, copy it again: {error}") from None
        if found != digest:
            raise InstallError(f"{name} is damaged, copy it again")


def check_kept(kept: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Raise InstallError if a package that was left out, because the node was said to have it, is
    not there."""
    have = {name.lower().replace("_", "-").replace(".", "-"): v for name, v in found.items()}
    for name, version in kept.items():
        if name not in have:
            raise InstallError(
                f"{name} {version} was left out as installed, but is not there: use --here with "
                "the Python that has it, or make another wheelhouse without --installed"
            )
        if have[name] != version:
            print(f"install: {name} is {have[name]}, not {version} as listed", file=sys.stderr)


def _make_venv(path: Path, sees_system: bool) -> Path:
    """A new environment without pip, which comes from the wheelhouse. Returns its Python."""
    if path.exists():
        raise InstallError(f"--venv {path} exists already")
    venv.EnvBuilder(system_site_packages=sees_system, symlinks=True, with_pip=False).create(path)
    return path.absolute() / "bin" / "python"


def _versions(python: Path) -> dict[str, str]:
    output = subprocess.check_output([python, "-P", "-c", _VERSIONS], text=True)
    versions: dict[str, str] = json.loads(output)
    return versions


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


if __name__ == "__main__":
    sys.exit(main())
