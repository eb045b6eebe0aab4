"""The shape of the code base, held by tests: who may import whom, how long things may get, that
each module has its test, that the docs name what exists, that the wheel holds all of it."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from functools import cache
from pathlib import Path

import pytest
from glimmer.shared import messages

ROOT = Path(__file__).parent.parent
FOLDERS = ("frontend", "scheduler", "workers", "shared", "kernels", "deploy")
SOURCES = [
    ROOT / "__init__.py",
    ROOT / "__main__.py",
    *sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py")),
]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
DOCS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(ROOT.glob("*/README.md")),
]
MAY_IMPORT = {
    "shared": {"shared"},
    "kernels": {"kernels"},
    "frontend": {"frontend", "shared", "__version__"},
    "scheduler": {"scheduler", "shared"},
    "workers": {"workers", "kernels", "shared"},
    "deploy": {*FOLDERS, "__version__"},
}
# The path of one prompt, in reading order.
SPINE = (
    "shared/messages.py",
    "frontend/api/generate.py",
    "frontend/engine/client.py",
    "scheduler/core.py",
    "scheduler/batch.py",
    "workers/runner.py",
    "workers/model/glm4_moe_lite.py",
)
LONG_FILES: dict[str, str] = {
    "shared/compat_flags.py": "the flag table",
}
LONG_FUNCTIONS: dict[str, str] = {}
NO_MIRROR: dict[str, str] = {
    "shared/messages.py": "tests/shared/test_codec.py sends every one of them",
    "shared/sampling.py": "data; its meaning is tested in tests/kernels/sampling/test_sampling.py",
    "kernels/launch.py": "every test of a Triton kernel launches through it",
    "shared/errors.py": "a tree of names, used by the tests of everything else",
    "shared/log.py": "set-up of the standard library's logging",
    "deploy/bench/fake_server.py": "tests/deploy/bench/test_overhead.py starts it",
}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), name(path))


def imports(path: Path) -> list[str]:
    """Absolute dotted names of everything imported, relative ones resolved from `glimmer`."""
    package = ["glimmer", *path.relative_to(ROOT).parent.parts]
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            found += [f"{prefix}.{alias.name}" for alias in node.names]
    return found


def functions(path: Path) -> list[tuple[str, int]]:
    return [
        (f"{name(path)}:{node.name}", (node.end_lineno or node.lineno) - node.lineno + 1)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


@cache
def class_names() -> set[str]:
    return {
        node.name
        for path in (*SOURCES, *TESTS)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ClassDef)
    }


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_imports_go_downwards_only(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    if folder not in MAY_IMPORT:
        return
    for module in imports(path):
        if module.startswith("glimmer."):
            assert module.split(".")[1] in MAY_IMPORT[folder], f"{name(path)} imports {module}"
        assert not module.startswith(FOLDERS), f"{name(path)}: use a relative import of {module}"


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if name(p).startswith(("sched", "front"))], ids=name
)
def test_scheduler_and_frontend_do_not_use_torch(path: Path) -> None:
    assert not [m for m in imports(path) if m.split(".")[0] in ("torch", "triton")]


@pytest.mark.parametrize("module", ["scheduler.loop", "frontend.app"])
def test_importing_these_does_not_import_torch(module: str) -> None:
    code = f"import sys, glimmer.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_environment_is_read_in_one_file() -> None:
    reads = re.compile(r"os\.environ|os\.getenv|\bgetenv\(")
    users = [name(p) for p in SOURCES if reads.search(p.read_text())]
    assert users == ["shared/config.py"]


def test_nothing_that_carries_code_is_decoded() -> None:
    banned = re.compile(
        r"\bc?pickle\b|\bmarshal\b|recv_pyobj|send_pyobj|weights_only=False|\beval\("
        r"|trust_remote_code=True|tcp://\*|time\.time\(\)|\bshell=True"
    )
    allowed = {"frontend": r"time\.time\(\)"}  # `created` is wall time; durations never are
    for path in SOURCES:
        folder = path.relative_to(ROOT).parts[0]
        hits = [
            m.group()
            for m in banned.finditer(ast.unparse(_without_docstrings(tree(path))))
            if not re.fullmatch(allowed.get(folder, "never"), m.group())
        ]
        assert not hits, f"{name(path)}: {hits}"


def _without_docstrings(module: ast.Module) -> ast.Module:
    for node in ast.walk(module):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                body[0] = ast.Pass()
    return module


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(tree(path)), f"{name(path)} has no docstring"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_files_and_functions_stay_short(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= 400 or name(path) in LONG_FILES, f"{name(path)} has {lines} lines"
    for function, length in functions(path):
        assert length <= 60 or function in LONG_FUNCTIONS, f"{function} has {length} lines"


def test_a_prompt_can_be_followed_in_half_an_hour(capsys: pytest.CaptureFixture[str]) -> None:
    spine = {file: len((ROOT / file).read_text().splitlines()) for file in SPINE}
    longest = max((len(p.read_text().splitlines()), name(p)) for p in SOURCES)
    function = max((length, where) for p in SOURCES for where, length in functions(p))
    total = sum(len(p.read_text().splitlines()) for p in SOURCES)
    with capsys.disabled():
        print(f"\nspine {sum(spine.values())} lines {spine}")
        print(f"longest file {longest}, longest function {function}, {total} lines in all")
    assert sum(spine.values()) <= 1700


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_every_module_has_its_test(path: Path) -> None:
    relative = path.relative_to(ROOT)
    if path.name in ("__init__.py", "__main__.py") or name(path) in NO_MIRROR:
        return
    mirror = ROOT / "tests" / relative.parent / f"test_{relative.name}"
    assert mirror.exists(), f"{name(path)} needs {name(mirror)}"


def test_the_exceptions_listed_here_still_exist() -> None:
    known = {name(p) for p in SOURCES}
    where = {f for p in SOURCES for f, _ in functions(p)}
    assert known >= {*LONG_FILES, *NO_MIRROR}
    assert where >= set(LONG_FUNCTIONS)


@pytest.mark.parametrize("path", DOCS, ids=name)
def test_docs_name_only_what_exists(path: Path) -> None:
    text = path.read_text()
    every = {name(p) for p in (*SOURCES, *TESTS)}
    for file in re.findall(r"`([\w/]+\.py)`", text):
        assert any(f == file or f.endswith(f"/{file}") for f in every), f"{name(path)}: {file}"
    for word in re.findall(r"`([A-Z][a-z]+(?:[A-Z][a-z]+)+)`", text):
        assert word in class_names() | {"MessagePack"}, f"{name(path)}: no class {word}"
    for target in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (path.parent / target).exists(), f"{name(path)}: dead link {target}"


def test_every_message_is_in_the_trace_of_a_request() -> None:
    text = (ROOT / "docs" / "tracing-a-request.md").read_text()
    missing = [t.__name__ for t in messages.Message.__subclasses__() if t.__name__ not in text]
    assert not missing


def test_the_wheel_holds_every_module(tmp_path: Path) -> None:
    code = "from setuptools.build_meta import build_wheel; import sys; build_wheel(sys.argv[1])"
    clone = tmp_path / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )
    for file in tracked.stdout.decode().splitlines():
        if (ROOT / file).is_file():
            (clone / file).parent.mkdir(parents=True, exist_ok=True)
            (clone / file).write_bytes((ROOT / file).read_bytes())
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)],
        cwd=clone,
        check=True,
        capture_output=True,
    )
    wheel = zipfile.ZipFile(next(tmp_path.glob("*.whl")))
    held = set(wheel.namelist())
    wheel.close()
    assert not [f for p in SOURCES if (f := f"glimmer/{name(p)}") not in held]
    kinds = ("jinja", "json", "safetensors")
    data = [p for f in FOLDERS for e in kinds for p in (ROOT / f).rglob(f"*.{e}")]
    assert {p.suffix for p in data} == {f".{kind}" for kind in kinds}
    assert not [f for p in data if (f := f"glimmer/{name(p)}") not in held]


def test_python_and_torch_ranges_are_as_promised() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11"
    assert "torch>=2.11,<2.14" in project["dependencies"]
