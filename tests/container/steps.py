"""Executes a Containerfile without a container engine, and serves the demo from the result.

  sudo python tests/container/steps.py --build_arg FLAVOUR=cpu

RUN, COPY, ARG, ENV, USER, WORKDIR, ENTRYPOINT, CMD and HEALTHCHECK are those of the file. The base
is a Debian tree that mmdebstrap makes. Only Debian and the Python package index are asked, with the
settings that pip has here. Needs root, mmdebstrap and bubblewrap. Prints the time of each step, the
size of the tree, and the answer.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from container.containerfile import FILE, Stage, pairs, parse, words
from container.sandbox import MISSING, Sandbox

ROOT = FILE.parents[2]
WRITABLE = {"/tmp": 1 << 30, "/cache": 1 << 30, "/run/glimmer": 1 << 26, "/dev/shm": 1 << 30}
URL = "http://127.0.0.1:8000"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Builder:
    """Builds the stages that a target needs. Each is a directory in `folder`."""

    def __init__(
        self,
        folder: Path,
        stages: dict[str, Stage],
        arguments: dict[str, str],
        debian: Path | None,
    ) -> None:
        self.folder = folder
        self.stages = stages
        self.arguments = arguments
        self.debian = debian
        self.environments: dict[str, dict[str, str]] = {}

    def build(self, name: str) -> Path:
        """The tree of a stage, built if it is not there."""
        tree = self.folder / name
        if name in self.environments:
            return tree
        stage = self.stages[name]
        if stage.base in self.stages:
            subprocess.run(["cp", "-a", self.build(stage.base), tree], check=True)
            self.environments[name] = dict(self.environments[stage.base])
        else:
            make_debian(tree, stage.base, self.debian)
            self.environments[name] = {"PATH": PATH}
        values: dict[str, str] = {}
        for word, text in stage.steps:
            begin = time.monotonic()
            self._step(name, tree, values, word, text)
            if word in ("RUN", "COPY"):
                print(f"{time.monotonic() - begin:7.1f} s  {name}: {word} {text[:70]}", flush=True)
        return tree

    def _step(self, name: str, tree: Path, values: dict[str, str], word: str, text: str) -> None:
        environment = self.environments[name]
        if word == "ARG":
            key, _, default = text.partition("=")
            values[key] = self.arguments.get(key, default)
        elif word == "ENV":
            environment |= pairs(text, environment)
        elif word == "COPY":
            self._copy(tree, text)
        elif word == "RUN":
            settings, binds = pip_settings()
            box = Sandbox(tree, binds, settings | environment | values)
            box.run(text)
        else:
            assert word in (
                "CMD ENTRYPOINT EXPOSE HEALTHCHECK LABEL STOPSIGNAL USER WORKDIR".split()
            ), word

    def _copy(self, tree: Path, text: str) -> None:
        flags = [word for word in text.split() if word.startswith("--")]
        *sources, target = [word for word in text.split() if not word.startswith("--")]
        stage = next((f.removeprefix("--from=") for f in flags if f.startswith("--from=")), "")
        destination = tree / target.strip("/")
        if stage:
            (source,) = sources
            destination.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(
                ["cp", "-a", self.build(stage) / source.strip("/"), destination], check=True
            )
            return
        for path in context(ROOT):
            for source in sources:
                relative = path.relative_to(ROOT)
                if source == ".":
                    to = destination / relative
                elif relative.match(source):
                    to = destination / path.name
                else:
                    continue
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, to)


def context(root: Path) -> Iterator[Path]:
    """Tracked and new files of the checkout that .dockerignore lets pass. The last pattern that
    matches decides."""
    patterns = [
        line
        for line in (root / ".dockerignore").read_text().splitlines()
        if line[:1] not in ("", "#")
    ]
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in tracked.stdout.splitlines():
        ignored = False
        for pattern in patterns:
            if _matches(name, pattern.removeprefix("!")):
                ignored = not pattern.startswith("!")
        if not ignored and (root / name).is_file():
            yield root / name


def _matches(name: str, pattern: str) -> bool:
    """Whether the pattern names the file or a directory that holds it."""
    parents = [Path(name), *Path(name).parents][:-1]
    if pattern.startswith("**/"):
        return any(parent.name == pattern[3:] for parent in parents)
    return any(
        parent.match(pattern) and len(parent.parts) == pattern.count("/") + 1 for parent in parents
    )


def make_debian(tree: Path, image: str, archive: Path | None) -> None:
    """A tree in the place of the image debian:12-slim, from an archive if there is one."""
    assert "debian:12-slim" in image, f"{image}: this knows only Debian 12"
    begin = time.monotonic()
    tree.mkdir(parents=True)
    command = ["mmdebstrap", "--variant=minbase", "--quiet", "bookworm", str(tree)]
    if archive is not None:
        command = ["tar", "-C", str(tree), "-xf", str(archive)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    print(f"{time.monotonic() - begin:7.1f} s  {image[:60]}: Debian 12, made by {command[0]}")


def pip_settings() -> tuple[dict[str, str], dict[Path, Path]]:
    """Variables with pip's settings here, and the files and directories that they name, with their
    places in the container."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    variables: dict[str, str] = {}
    binds: dict[Path, Path] = {}
    for line in listed.stdout.splitlines():
        name, _, value = line.partition("=")
        name = name.rpartition(".")[2]
        if name == "constraint":  # the locks decide
            continue
        words = []
        for word in value.strip("'\"").split():
            path = Path(word.removeprefix("file://"))
            if path.is_absolute() and path.exists():
                # An index has links to files that lie beside it.
                shown = path.parent if word.startswith("file:") else path
                place = binds.setdefault(shown, Path("/tmp/pip", str(len(binds))))
                word = word.replace(str(shown), str(place))
            words.append(word)
        variables[f"PIP_{name.replace('-', '_').upper()}"] = " ".join(words)
    return variables, binds


def serve(tree: Path, stage: Stage, environment: dict[str, str]) -> None:
    """Start what the image starts, ask its health check, and one question. Then stop it."""
    user = int(stage.last("USER").partition(":")[0])
    command = words(stage.last("ENTRYPOINT")) + words(stage.last("CMD"))
    container = Sandbox(tree, {}, environment).start(command, user, WRITABLE)
    try:
        check = words(stage.last("HEALTHCHECK").partition("CMD")[2].strip())
        print(f"{container.wait_until(*check, timeout_s=180):7.1f} s  until it is healthy")
        answer = container.enter("glimmer", "ask", URL)
        print(answer.stdout.strip(), answer.stderr, flush=True)
        assert answer.returncode == 0
        family = container.first.children(recursive=True)
        print(f"processes: {len(family) + 1}, users: {sorted({p.uids().real for p in family})}")
        next(process for process in family if "glimmer.frontend" in process.cmdline()).kill()
        seconds = container.wait_until("glimmer", "ask", URL, timeout_s=60)
        family = container.first.children(recursive=True)
        dead = [process for process in family if process.status() == psutil.STATUS_ZOMBIE]
        print(
            f"{seconds:7.1f} s  from SIGKILL of the HTTP process to an answer, {len(dead)} zombies"
        )
        assert not dead
        begin = time.monotonic()
        assert container.stop(60) == 0, "exit code"
        print(f"{time.monotonic() - begin:7.1f} s  from SIGTERM to its end with exit code 0")
    finally:
        container.kill()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--build_arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--target", default="runtime")
    parser.add_argument("--debian", type=Path, help="archive made by mmdebstrap; default: make one")
    parser.add_argument("--keep", type=Path, help="new directory for the trees; default: none")
    args = parser.parse_args()
    if MISSING or not shutil.which("mmdebstrap"):
        parser.error(MISSING or "needs mmdebstrap")
    arguments = dict(word.split("=", 1) for word in args.build_arg)
    stages = parse(FILE.read_text(), arguments)
    with tempfile.TemporaryDirectory() as scratch:
        builder = Builder(args.keep or Path(scratch), stages, arguments, args.debian)
        begin = time.monotonic()
        tree = builder.build(args.target)
        print(f"{time.monotonic() - begin:7.1f} s  in all")
        report(tree)
        serve(tree, inherited(stages, args.target), builder.environments[args.target])


def report(tree: Path) -> None:
    """Print sizes, and the number of packages in the SBOM."""
    for path in (tree, tree / "opt/glimmer"):
        size = subprocess.run(["du", "-smx", path], capture_output=True, text=True, check=True)
        print(f"{size.stdout.split()[0]:>7} MB /{path.relative_to(tree)}")
    sbom = json.loads((tree / "opt/glimmer/sbom.cdx.json").read_text())
    print(f"SBOM: CycloneDX {sbom['specVersion']}, {len(sbom['components'])} components")


def inherited(stages: dict[str, Stage], name: str) -> Stage:
    """The stage with the steps of those that it begins from."""
    stage = stages[name]
    if stage.base not in stages:
        return stage
    before = inherited(stages, stage.base)
    return Stage(before.base, name, [*before.steps, *stage.steps])


if __name__ == "__main__":
    main()
