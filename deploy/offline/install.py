"""Installs Glimmer on a node without a network, from the wheelhouse that holds this file.

  python3.12 install.py --venv /opt/glimmer    into a new virtual environment
  python3.12 install.py --here                 into the Python that runs this

It checks Python, glibc and the hash of every wheel before it installs any, asks no package index,
and ends with `glimmer check`, which reports what would keep a server from starting.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import venv
from pathlib import Path

_WHEELHOUSE = Path(__file__).resolve().parent


def main() -> int:
    """Install and check. Returns the exit code of `glimmer check`. Exits with a line that says
    what to change if the wheels cannot be installed."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--venv", type=Path, metavar="DIR", help="make a virtual environment there")
    target.add_argument("--here", action="store_true", help="into the Python that runs this")
    parser.add_argument("--model_dir", default="demo", help="for `glimmer check` (%(default)s)")
    parser.add_argument("--no_check", action="store_true", help="do not run `glimmer check`")
    args = parser.parse_args()
    manifest = json.loads((_WHEELHOUSE / "manifest.json").read_text())
    check_machine(manifest["python"], manifest["glibc"])
    python = sys.executable
    if args.venv:
        system = not manifest["complete"]  # packages that were left out must be there
        venv.create(args.venv, system_site_packages=system, symlinks=True)
        python = str(args.venv.absolute() / "bin" / "python")
    _install(python)
    glimmer = [python, "-P", "-m", "glimmer"]
    subprocess.run([*glimmer, "--version"], check=True)
    if args.no_check:
        return 0
    check = [*glimmer, "check", "--model_dir", args.model_dir, "--port", "0"]
    return subprocess.run(check, check=False).returncode


def check_machine(python: str, glibc: str) -> None:
    """Exit if the wheels, for this `python` and up to this `glibc`, cannot run here."""
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if version != python:
        sys.exit(f"install: the wheels are for Python {python}, this is {version}")
    machine = f"{platform.system()} on {platform.machine()}"
    if machine != "Linux on x86_64":
        sys.exit(f"install: the wheels are for Linux on x86-64, this is {machine}")
    library, version = platform.libc_ver()
    if library == "glibc" and int(version.split(".")[1]) < int(glibc.split(".")[1]):
        sys.exit(
            f"install: the wheels may need glibc {glibc}, this is {version}: make another "
            f"wheelhouse with --glibc {version}"
        )


def _install(python: str) -> None:
    """Install every wheel with the pip of this Python, or none if a hash is wrong. Exits if pip
    fails."""
    # No configuration file or variable of pip may add an index or a constraint.
    pip = ["env", f"PIP_CONFIG_FILE={os.devnull}", sys.executable, "-P", "-m", "pip", "--isolated"]
    pip += ["--python", python]
    flags = "--no-index --no-deps --require-hashes --force-reinstall --quiet".split()
    install = [*pip, "install", *flags, "--requirement=requirements.txt"]
    if subprocess.run(install, cwd=_WHEELHOUSE, check=False).returncode:
        sys.exit("install: pip failed, see above; if a file is missing or damaged, copy it again")
    if subprocess.run([*pip, "check"], check=False).returncode:
        print("install: pip found the problems above: a package that was left out may be missing")


if __name__ == "__main__":
    sys.exit(main())
