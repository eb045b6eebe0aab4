"""The shape of the code base, held by tests: who may import whom, how long things may get, that
each module is exercised by a test, that the docs name what exists, that the wheel is complete.

The figures are defined in `source_shape.py`. Kernels are exempt from the limits on functions: a
compiler for GPUs takes no objects that could bundle parameters.
"""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from glimmer.shared import messages
from source_shape import FOLDERS, Function, count_tokens, docstring_lines, functions, sources, tree

ROOT = Path(__file__).parent.parent
SOURCES = sources(ROOT)
TESTS = sorted((ROOT / "tests").rglob("*.py"))
DOCS = [
    *sorted(ROOT.glob("*.md")),
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
MAX_PARAMETERS = 8
MAX_FUNCTION_LINES = 60
MAX_FILES_IN_A_FOLDER = 20
LONG_FILE_LINES = 400  # longer ones are printed, with the reason if there is one
MAX_FILE_LINES = 500
LONG_FILES: dict[str, str] = {
    "shared/compat_flags.py": "the flag table",
}
# No test imports these, nor a module that imports them.
EXERCISED_OTHERWISE: dict[str, str] = {
    "deploy/bench/fake_server.py": "tests/deploy/bench/test_overhead.py starts it",
    "deploy/launcher/signals.py": "tests/deploy/launcher/test_service.py sends signals to servers",
    "deploy/lightllm/server/api_server.py": "tests/deploy/test_cli.py runs it by its other name",
}
NOT_IN_THE_WHEEL = (
    "deploy/demo/training/",  # made the bundled model; runs from a checkout
    "deploy/monitoring/",  # makes the dashboard; runs from a checkout
    "deploy/container/",  # builds an image from a checkout
    "deploy/kubernetes/",  # a chart for helm, not for Python
)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> list[str]:
    """Absolute dotted names of everything imported, relative ones resolved from `glimmer`."""
    package = ["glimmer", *path.relative_to(ROOT).parent.parts]
    names = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            names += [f"{prefix}.{alias.name}" for alias in node.names]
    return names


@cache
def all_functions() -> list[tuple[str, Function]]:
    """Production functions that are no kernels, with "file:name"."""
    pairs = ((f"{name(p)}:{f.name}", f) for p in SOURCES for f in functions(p))
    return [(where, function) for where, function in pairs if not function.is_kernel]


@cache
def class_names() -> set[str]:
    return {
        node.name
        for path in (*SOURCES, *TESTS)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ClassDef)
    }


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_go_downwards_only(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        for module in imports(path):
            if module.startswith("glimmer."):
                assert module.split(".")[1] in MAY_IMPORT[folder], f"{name(path)} imports {module}"
            assert not module.startswith(FOLDERS), f"{name(path)}: import {module} relatively"


def test_nothing_in_the_wheel_imports_what_is_not_in_it() -> None:
    packages = tuple("glimmer." + folder.replace("/", ".") for folder in NOT_IN_THE_WHEEL)
    for path in SOURCES:
        if not name(path).startswith(NOT_IN_THE_WHEEL):
            modules = [f"{module}." for module in imports(path)]
            assert not [m for m in modules if m.startswith(packages)], name(path)


def test_scheduler_and_frontend_do_not_use_torch() -> None:
    for path in SOURCES:
        if name(path).startswith(("scheduler/", "frontend/")):
            packages = {module.split(".")[0] for module in imports(path)}
            assert not packages & {"torch", "triton"}, name(path)


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
            for m in banned.finditer(text_without_docstrings(path))
            if not re.fullmatch(allowed.get(folder, "never"), m.group())
        ]
        assert not hits, f"{name(path)}: {hits}"


def text_without_docstrings(path: Path) -> str:
    lines = path.read_text().splitlines()
    skipped = docstring_lines(path)
    return "\n".join(line for n, line in enumerate(lines, 1) if n not in skipped)


def test_every_module_says_what_it_is_for() -> None:
    assert not [name(p) for p in SOURCES if not ast.get_docstring(tree(p))]


def test_functions_are_short_and_take_few_parameters() -> None:
    too_long = [f"{w}: {f.length}" for w, f in all_functions() if f.length > MAX_FUNCTION_LINES]
    too_wide = [f"{w}: {f.parameters}" for w, f in all_functions() if f.parameters > MAX_PARAMETERS]
    assert not too_long, f"lines: {too_long}"
    assert not too_wide, f"parameters: {too_wide}"


def test_files_are_few_in_each_folder() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, check=True)
    files = [Path(file) for file in tracked.stdout.decode().splitlines()]
    counts = Counter(str(file.parent) for file in files if (ROOT / file).exists())
    assert not {k: v for k, v in counts.items() if v > MAX_FILES_IN_A_FOLDER}


def test_files_are_short(capsys: pytest.CaptureFixture[str]) -> None:
    lengths = {name(p): len(p.read_text().splitlines()) for p in SOURCES}
    counts = [count_tokens(p) for p in SOURCES]
    tokens, lines = sum(c.tokens for c in counts), sum(c.lines for c in counts)
    with capsys.disabled():
        print(f"\n{len(SOURCES)} files, {sum(lengths.values())} lines, {lines} of code")
        print(f"{tokens / lines:.2f} tokens per line of code")
        for file, length in lengths.items():
            if length > LONG_FILE_LINES:
                print(f"{file}: {length} lines: {LONG_FILES.get(file, 'split it or say why')}")
    too_long = {k: v for k, v in lengths.items() if v > MAX_FILE_LINES and k not in LONG_FILES}
    assert not too_long


def test_every_module_is_exercised() -> None:
    """A test, or a helper of tests, imports the module, or names it to run it as a process; or it
    does so with a module that imports this one. That is seen without running anything."""
    known = {module_name(p): p for p in SOURCES}
    text = "\n".join(p.read_text() for p in TESTS)
    used = {f"glimmer.{m}" for m in re.findall(r"\bglimmer\.([\w.]+)", text)}
    used |= {module for p in TESTS for module in imports(p)}
    direct = {module for module in known if module in used or is_imported(module, used)}
    indirect = {m for module in direct for m in imports(known[module])}
    missing = [
        name(path)
        for module, path in known.items()
        if module not in direct and not is_imported(module, indirect)
    ]
    missing = [file for file in missing if not file.endswith(("__init__.py", "__main__.py"))]
    assert set(missing) <= set(EXERCISED_OTHERWISE)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(["glimmer", *(part for part in parts if part != "__init__")])


def is_imported(module: str, names: set[str]) -> bool:
    """Whether the module, or a name in it, is among the dotted names."""
    return module in names or any(n.rpartition(".")[0] == module for n in names)


def test_the_exceptions_listed_here_still_exist() -> None:
    known = {name(p) for p in SOURCES}
    assert known >= {*LONG_FILES, *EXERCISED_OTHERWISE}
    assert all((ROOT / folder).is_dir() for folder in NOT_IN_THE_WHEEL)


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
    wanted = {f"glimmer/{name(p)}" for p in SOURCES if not name(p).startswith(NOT_IN_THE_WHEEL)}
    assert wanted <= held
    left_out = tuple(f"glimmer/{folder}" for folder in NOT_IN_THE_WHEEL)
    assert not [file for file in held if file.startswith(left_out)]
    kinds = ("jinja", "json", "safetensors")
    data = [p for f in FOLDERS for e in kinds for p in (ROOT / f).rglob(f"*.{e}")]
    data = [p for p in data if not name(p).startswith(NOT_IN_THE_WHEEL)]
    assert {p.suffix for p in data} == {f".{kind}" for kind in kinds}
    assert not [f for p in data if (f := f"glimmer/{name(p)}") not in held]


def test_python_and_torch_ranges_are_as_promised() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11"
    assert "torch>=2.11,<2.14" in project["dependencies"]
