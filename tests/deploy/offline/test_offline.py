"""A node without a network: a wheelhouse is made from an index and installed from without one.

Project, index and node are tiny ones, made here. With `-m slow` the real project is used."""

import importlib.util
import json
import os
import platform
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pip
import pytest
from glimmer.deploy.offline import wheelhouse
from glimmer.deploy.offline.install import check_machine

pytestmark = pytest.mark.xdist_group("offline")  # makes the wheelhouse once
PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"
PROJECT = """\
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "glimmer-serve"
version = "1.0"
dependencies = ["torch>=2", "Msg.Pack>=1"]
optional-dependencies = { gpu = ["kernels"], dev = ["not-in-the-index"] }
[tool.setuptools]
package-dir = { glimmer = "." }
packages = ["glimmer", "glimmer.deploy"]
package-data = { glimmer = ["commit.txt"] }
"""
# Prints its arguments, and ends with 7 when asked to check.
MAIN = "import sys; print('ran', *sys.argv[1:]); sys.exit(7 * (sys.argv[1] == 'check'))"


def bundled_pip() -> Path:
    """The directory with the wheel of pip that Python brings along."""
    spec = importlib.util.find_spec("ensurepip")
    assert spec is not None
    assert spec.origin is not None
    directories = (Path(spec.origin).with_name("_bundled"), Path("/usr/share/python-wheels"))
    return next(wheel.parent for d in directories for wheel in d.glob("pip-*.whl"))


def add_wheel(index: Path, name: str, *needs: str) -> None:
    """A wheel of version 1.5 in the index."""
    lines = [f"Requires-Dist: {need}\n" for need in needs]
    info = f"{name}-1.5.dist-info"
    with zipfile.ZipFile(index / f"{name}-1.5-py3-none-any.whl", "w") as wheel:
        head = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n"
        wheel.writestr(f"{info}/METADATA", head + "".join(lines))
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheelhouse of a tiny project for a node that has torch."""
    root = tmp_path_factory.mktemp("offline")
    index, project = root / "index", root / "project"
    index.mkdir()
    add_wheel(index, "msg_pack", "helper")
    add_wheel(index, "helper")
    add_wheel(index, "kernels", "torch", "helper")
    (project / "deploy" / "__pycache__").mkdir(parents=True)
    (project / "pyproject.toml").write_text(PROJECT)
    (project / "__init__.py").touch()
    (project / "__main__.py").write_text(MAIN)
    (project / "deploy" / "__init__.py").touch()
    (pip_wheel,) = bundled_pip().glob("pip-*.whl")  # the node has the pip that is used here
    pip_line = "pip==" + pip_wheel.name.split("-")[1]
    lines = ["torch==2.11.0+cu130", "unrelated==3", "glimmer-serve==0.9", pip_line]
    (root / "node.txt").write_text("\n".join(lines))
    output = root / "wheelhouse"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wheelhouse, "_ROOT", project)
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", f"{index} {bundled_pip()}")
        patch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # the index has no setuptools
        wheelhouse.main(["--output", str(output), "--installed", str(root / "node.txt")])
    return output


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a node that has pip, torch and everything else that runs this test."""
    path = tmp_path_factory.mktemp("node") / "venv"
    venv.create(path, symlinks=True)
    (site_packages(path) / "shared.pth").write_text(str(Path(pip.__file__).parents[1]))
    return path / "bin" / "python"


def site_packages(path: Path) -> Path:
    return next(path.glob("lib/python*/site-packages"))


def install(python: Path | str, directory: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [python, directory / "install.py", *flags]
    environment = os.environ | {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_CONSTRAINT": "/none"}
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment)


def test_a_wheelhouse_has_what_the_node_lacks(made: Path) -> None:
    names = {path.name for path in made.iterdir()}
    wheels = {name for name in names if name.endswith(".whl")}
    assert {name.split("-")[0] for name in wheels} == {
        "glimmer_serve",
        "msg_pack",
        "helper",
        "kernels",
    }
    assert names - wheels == {"install.py", "manifest.json", "requirements.txt"}
    assert [path.name for path in made.parent.glob(".*")] == []
    manifest = json.loads((made / "manifest.json").read_text())
    assert (manifest["python"], manifest["glibc"]) == (PYTHON, "2.28")
    with zipfile.ZipFile(made / "glimmer_serve-1.0-py3-none-any.whl") as wheel:
        assert wheel.read("glimmer/commit.txt").decode() == f"{manifest['commit']}\n"
        assert not [name for name in wheel.namelist() if "__pycache__" in name]


def test_everything_is_installed_and_checked_without_an_index(made: Path, node: Path) -> None:
    done = install(node, made, "--here", "--model_dir", "/models/x")
    ran = ["ran --version", "ran check --model_dir /models/x --port 0"]
    assert done.stdout.splitlines()[-2:] == ran, done
    assert done.returncode == 7
    (site_packages(node.parents[1]) / "glimmer" / "__main__.py").unlink()
    done = install(node, made, "--here", "--no_check")  # the same version again, in full
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "ran --version")


def test_a_package_that_was_left_out_and_is_not_there_is_named(made: Path, tmp_path: Path) -> None:
    done = install(sys.executable, made, "--venv", str(tmp_path / "node"))
    assert "requires torch, which is not installed" in done.stdout
    assert "a package that was left out may be missing" in done.stdout


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_nothing_is_installed_if_a_file_is_damaged(made: Path, node: Path, damage: str) -> None:
    wheel = made / "helper-1.5-py3-none-any.whl"
    content = wheel.read_bytes()
    wheel.write_bytes(content + b"x")
    if damage == "missing":
        wheel.unlink()
    done = install(node, made, "--here")
    wheel.write_bytes(content)
    assert done.returncode == 1
    assert "if a file is missing or damaged, copy it again" in done.stderr
    assert "ran" not in done.stdout


def test_wheels_for_another_machine_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    check_machine(PYTHON, "2.36")
    with pytest.raises(SystemExit, match=f"the wheels are for Python 3.99, this is {PYTHON}"):
        check_machine("3.99", "2.17")
    with pytest.raises(SystemExit, match=r"may need glibc 2.37, this is 2.36: .* --glibc 2.36"):
        check_machine(PYTHON, "2.37")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(SystemExit, match="for Linux on x86-64, this is Linux on aarch64"):
        check_machine(PYTHON, "2.17")


def test_mistakes_are_one_line_and_leave_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "node.txt").write_text("nonsense\n")
    output = ["--output", str(tmp_path / "wheelhouse")]
    for flags, words in (
        (["--output", str(tmp_path)], "exists already"),
        ([*output, "--installed", str(tmp_path / "node.txt")], "not name==version: nonsense"),
        ([*output, "--glibc", "2.16"], "--glibc 2.16: must be 2.17 or newer"),
        ([*output, "--glibc", "2.100"], "--glibc 2.100: must be 2.17 or newer"),
    ):
        with pytest.raises(SystemExit):
            wheelhouse.main(flags)
        assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["node.txt"]


@pytest.mark.slow
def test_the_real_project_is_installed_without_an_index(node: Path, tmp_path: Path) -> None:
    """Needs a package index that has aiohttp; the node has the rest."""
    command = [sys.executable, "-m", "pip", "list", "--format=freeze"]
    lines = subprocess.check_output(command, text=True).splitlines()
    listed = [line for line in lines if not line.startswith(("aiohttp==", "glimmer"))]
    (tmp_path / "node.txt").write_text("\n".join(listed))
    output, script = tmp_path / "wheelhouse", str(Path(wheelhouse.__file__))
    flags = ["--output", str(output), "--installed", str(tmp_path / "node.txt"), "--extras"]
    subprocess.run([sys.executable, script, *flags], check=True)
    names = {path.name.split("-")[0] for path in output.glob("*.whl")}
    assert names == {"aiohttp", "glimmer_serve"}

    done = install(node, output, "--here")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok  model directory" in done.stdout
    code = "import aiohttp, glimmer; print(aiohttp.__file__, glimmer.__file__)"
    files = subprocess.check_output([node, "-P", "-c", code], text=True, cwd=tmp_path).split()
    packages = site_packages(node.parents[1])
    assert all(Path(file).is_relative_to(packages) for file in files)
