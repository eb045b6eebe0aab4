"""Gathers the wheels that a node without a network lacks, on a machine that has a package index.

  python3 deploy/offline/wheelhouse.py --output wheelhouse --python_version 3.12
  python3 deploy/offline/wheelhouse.py --output wheelhouse --installed node.txt

The node is Linux on x86-64 with CPython 3.11 or 3.12. `node.txt` is what `pip list
--format=freeze` prints there: those packages stay as they are and out of the wheelhouse, with
whatever only they need. The output holds wheels (this project's and pip's, too), `requirements.txt`
with exact versions, `manifest.json` with digests, and `install.py`, which installs all of it
without an index. Run it from a checkout; it needs nothing but Python and pip. The index is
whichever pip is configured for.
"""

import argparse
import hashlib
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[2]
_INSTALLER = Path(__file__).with_name("install.py")
_OLDEST_GLIBC = 5  # of wheels that say 2.N; 2.17 and before are also known by other names
_PYTHONS = ("3.11", "3.12")
_REQUIREMENT = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[([^\]]*)\])?")
_EXTRA = re.compile(r"""\bextra\s*==\s*["']([^"']+)["']""")


class WheelhouseError(Exception):
    """Cannot be made. One line saying what was found and what to change."""


@dataclass(frozen=True)
class Need:
    """A requirement: a package, with these extras. A requirement of a package's own extras holds
    only `for_extras`, if there are any. All names normalized."""

    name: str
    extras: frozenset[str]
    for_extras: frozenset[str]


@dataclass(frozen=True)
class Package:
    """A resolved package and what it needs."""

    name: str
    version: str
    needs: tuple[Need, ...]


@dataclass(frozen=True)
class Target:
    """The node: CPython version as "3.12", newest glibc that wheels may ask for as (2, 28)."""

    python: str
    glibc: tuple[int, int]

    def pip_flags(self) -> list[str]:
        """What makes pip choose wheels for the node instead of for this machine."""
        flags = ["--only-binary=:all:", "--implementation=cp", f"--python-version={self.python}"]
        return flags + [f"--platform={tag}" for tag in platform_tags(*self.glibc)]


def main(argv: Sequence[str] | None = None) -> int:
    """Make a wheelhouse. Returns the exit code: 0, or 1 after a line that says why not."""
    args = _parser().parse_args(argv)
    try:
        make_wheelhouse(args)
    except WheelhouseError as error:
        print(f"wheelhouse: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        command = next(w for w in error.cmd if w in ("download", "install", "wheel"))
        print(f"wheelhouse: pip {command} failed, see above", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    parser = argparse.ArgumentParser(
        prog="wheelhouse.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, help="directory to make; must not exist")
    add("--python_version", choices=_PYTHONS, default=here, help="the node's (this one's)")
    add("--glibc", default="2.28", help="the node's, or older (%(default)s); see ldd --version")
    add("--extras", nargs="*", default=["gpu"], help="of pyproject.toml (gpu)")
    add("--installed", type=Path, metavar="FILE", help="pip list --format=freeze of the node")
    add("--only", nargs="+", metavar="NAME", help="of the direct requirements these alone")
    add("--no_deps", action="store_true", help="no requirements of requirements")
    return parser


def make_wheelhouse(args: argparse.Namespace) -> None:
    """Make the directory, in full or not at all. Raises WheelhouseError, and CalledProcessError
    if pip failed."""
    if args.output.exists():
        raise WheelhouseError(f"--output {args.output} exists already")
    target = Target(args.python_version, parse_glibc(args.glibc))
    _warn_about_markers(target)
    project = _read_project()
    wanted = direct_requirements(project, args.extras, args.only)
    installed = _read_installed(args.installed)
    unfinished = Path(tempfile.mkdtemp(prefix=".wheelhouse-", dir=args.output.absolute().parent))
    try:
        pip = _fetch_pip(unfinished)
        resolved = _resolve(pip, wanted, installed, target, args.no_deps)
        packages = missing(resolved, installed, [parse_need(r) for r in wanted])
        _fetch(pip, [f"{p.name}=={p.version}" for p in packages], target, unfinished)
        _build_own_wheel(pip, project, unfinished)
        kept = {name: version for name, version in installed.items() if name in resolved}
        _write_lists(unfinished, target, project, kept)
        unfinished.chmod(0o755)
        unfinished.rename(args.output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    size = sum(f.stat().st_size for f in args.output.iterdir()) / 1e9
    print(f"{args.output}: {len(list(args.output.glob('*.whl')))} wheels, {size:.2f} GB")
    print("copy it to the node, then: python3 install.py --help")


# --- what is needed -------------------------------------------------------------------------


def direct_requirements(
    project: Mapping[str, Any], extras: Iterable[str], only: Iterable[str] | None
) -> list[str]:
    """The requirements that pyproject.toml's `project` table names, with those of `extras`; with
    `only`, just those of these names. Raises WheelhouseError for unknown names."""
    optional = project.get("optional-dependencies", {})
    wanted = list(project["dependencies"])
    for extra in extras:
        if extra not in optional:
            raise WheelhouseError(f"no extra {extra!r}; there are: {', '.join(optional)}")
        wanted += optional[extra]
    if only is None:
        return wanted
    by_name = {parse_need(r).name: r for r in wanted}
    unknown = [name for name in only if normalized(name) not in by_name]
    if unknown:
        raise WheelhouseError(f"--only {unknown[0]}: not required; there are: {', '.join(by_name)}")
    return [by_name[normalized(name)] for name in only]


def missing(
    resolved: Mapping[str, Package], installed: Mapping[str, str], wanted: Iterable[Need]
) -> list[Package]:
    """What must be brought along, by name: whatever is wanted and what that needs, directly or
    not, other than through a package that is installed."""
    seen: set[tuple[str, str]] = set()  # package and extra, "" for itself
    ahead = list(wanted)
    while ahead:
        need = ahead.pop()
        if need.name not in resolved:  # a marker has ruled it out
            continue
        for extra in {"", *need.extras} - {e for name, e in seen if name == need.name}:
            seen.add((need.name, extra))
            if extra == "" and need.name in installed:
                continue
            every = resolved[need.name].needs
            ahead += [n for n in every if (extra in n.for_extras if extra else not n.for_extras)]
    names = {name for name, _ in seen} - installed.keys()
    return [resolved[name] for name in sorted(names)]


def parse_resolution(report: Mapping[str, Any]) -> dict[str, Package]:
    """What pip's installation report says it would install, by name."""
    packages = {}
    for item in report["install"]:
        about = item["metadata"]
        needs = tuple(parse_need(r) for r in about.get("requires_dist") or ())
        name = normalized(about["name"])
        packages[name] = Package(name, about["version"], needs)
    return packages


def parse_installed(text: str) -> dict[str, str]:
    """Name to version of each `name==version` line, as `pip list --format=freeze` prints them.
    This project itself is not counted: it is always brought along. Raises WheelhouseError."""
    packages = {}
    for line in text.splitlines():
        name, equals, version = line.partition("==")
        if not line.strip() or line.startswith("#"):
            continue
        if not equals or not _REQUIREMENT.fullmatch(name):
            raise WheelhouseError(f"--installed: not name==version: {line:.80}")
        packages[normalized(name.strip())] = version.strip()
    packages.pop("glimmer-serve", None)
    return packages


def constraints(installed: Mapping[str, str]) -> list[str]:
    """Lines that make pip resolve to the installed versions. Local parts ("+cu130") are left out:
    an index has the plain version, and only its requirements are of interest."""
    return [f"{name}=={version.partition('+')[0]}" for name, version in installed.items()]


def platform_tags(major: int, minor: int) -> list[str]:
    """Tags of wheels that run with that glibc on x86-64 Linux, newest first. pip takes just those
    it is told."""
    tags = [f"manylinux_{major}_{n}_x86_64" for n in range(minor, _OLDEST_GLIBC - 1, -1)]
    old = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
    tags += [f"{name}_x86_64" for at_least, name in old.items() if minor >= at_least]
    return [*tags, "linux_x86_64"]


def parse_glibc(text: str) -> tuple[int, int]:
    """Version such as 2.28. Raises WheelhouseError."""
    match = re.fullmatch(r"2\.(\d{1,2})", text)
    if match is None or int(match[1]) < 17:
        raise WheelhouseError(f"--glibc {text}: must be 2.17 or newer, such as 2.28")
    return 2, int(match[1])


def parse_need(requirement: str) -> Need:
    """A requirement such as `cuda-toolkit[cudart]>=13; extra == "cu13"`. Versions and other
    conditions are pip's business. Raises WheelhouseError."""
    match = _REQUIREMENT.match(requirement)
    if match is None:
        raise WheelhouseError(f"not a requirement: {requirement!r}")
    extras = frozenset(normalized(e.strip()) for e in (match[2] or "").split(",") if e.strip())
    for_extras = frozenset(normalized(e) for e in _EXTRA.findall(requirement))
    return Need(normalized(match[1]), extras, for_extras)


def normalized(name: str) -> str:
    """A package's name as the index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


# --- getting it -----------------------------------------------------------------------------


def _fetch_pip(directory: Path) -> Path:
    """The newest pip's wheel, which runs as it is: here, since old ones take forever to resolve
    all this, and on the node."""
    flags = ("--no-deps", "--only-binary=:all:", f"--dest={directory}")
    _run("-m", "pip", "download", *flags, "pip")
    return next(directory.glob("pip-*.whl")) / "pip"


def _resolve(
    pip: Path, wanted: Sequence[str], installed: Mapping[str, str], target: Target, no_deps: bool
) -> dict[str, Package]:
    """Everything that the wanted requirements need, in versions that go together."""
    with tempfile.TemporaryDirectory() as directory:
        report, limits = Path(directory) / "report.json", Path(directory) / "constraints.txt"
        limits.write_text("\n".join(constraints(installed)) + "\n")
        flags = ["--dry-run", "--ignore-installed", f"--target={directory}/nowhere"]
        flags += [f"--report={report}", f"--constraint={limits}", *target.pip_flags()]
        _run(pip, "install", *flags, *(["--no-deps"] if no_deps else []), *wanted)
        return parse_resolution(json.loads(report.read_text()))


def _fetch(pip: Path, pinned: Sequence[str], target: Target, directory: Path) -> None:
    if pinned:
        _run(pip, "download", "--no-deps", f"--dest={directory}", *target.pip_flags(), *pinned)


def _build_own_wheel(pip: Path, project: Mapping[str, Any], directory: Path) -> None:
    """Build this project's wheel from a copy that knows its commit."""
    with tempfile.TemporaryDirectory() as copy:
        source = Path(copy) / "source"
        source.mkdir()
        for name in ("pyproject.toml", "LICENSE", project["readme"]):
            shutil.copyfile(_ROOT / name, source / name)
        for path in source_files(_ROOT):
            (source / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(_ROOT / path, source / path)
        (source / "commit.txt").write_text((_commit() or "") + "\n")
        _run(pip, "wheel", "--no-deps", f"--wheel-dir={directory}", str(source))


def source_files(root: Path) -> list[Path]:
    """The files of the package, below `root`: its modules and the data beside them."""
    folders = (p.parent for p in root.glob("*/__init__.py"))
    files = [p for folder in folders for p in folder.rglob("*") if p.is_file()]
    files += root.glob("*.py")
    return sorted(p.relative_to(root) for p in files if "__pycache__" not in p.parts)


def _write_lists(
    directory: Path, target: Target, project: Mapping[str, Any], kept: Mapping[str, str]
) -> None:
    """`requirements.txt`, `manifest.json` and the installer."""
    wheels = sorted(directory.glob("*.whl"))
    pinned = [wheel_requirement(wheel.name) for wheel in wheels]
    lines = [line for line in pinned if not line.startswith("pip==")]
    (directory / "requirements.txt").write_text("\n".join(lines) + "\n")
    manifest = {
        "project": project["name"],
        "commit": _commit(),
        "python": target.python,
        "glibc": list(target.glibc),
        "kept": dict(kept),
        "files": {w.name: hashlib.sha256(w.read_bytes()).hexdigest() for w in wheels},
    }
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    shutil.copyfile(_INSTALLER, directory / "install.py")


def wheel_requirement(file_name: str) -> str:
    """`name==version` of a wheel's file name."""
    name, version = file_name.split("-")[:2]
    return f"{normalized(name)}=={version}"


def _read_project() -> dict[str, Any]:
    try:
        text = (_ROOT / "pyproject.toml").read_text()
    except FileNotFoundError:
        raise WheelhouseError("run this from a checkout: there is no pyproject.toml") from None
    project: dict[str, Any] = tomllib.loads(text)["project"]
    return project


def _read_installed(path: Path | None) -> dict[str, str]:
    if path is None:
        return {}
    try:
        return parse_installed(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise WheelhouseError(f"--installed {path}: {error}") from None


def _warn_about_markers(target: Target) -> None:
    """pip chooses files for the node but evaluates `; python_version < "3.12"` for itself."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise WheelhouseError("make it on Linux on x86-64: pip resolves for the machine it runs on")
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if here != target.python:
        print(
            f"wheelhouse: conditions on the Python version are judged by {here}, not "
            f"{target.python}; better run this with python{target.python}",
            file=sys.stderr,
        )


def _commit() -> str | None:
    words = "describe --always --dirty --abbrev=40 --exclude=*".split()
    try:
        command = ("git", "-C", str(_ROOT), *words)
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _run(*words: str | Path) -> None:
    command = [sys.executable, *map(str, words), "--quiet", "--disable-pip-version-check"]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    sys.exit(main())
