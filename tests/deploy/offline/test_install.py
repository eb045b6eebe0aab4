"""Installing from a wheelhouse: what arrives damaged or for another machine is refused before
anything is changed; what is whole gets installed without an index."""

import hashlib
import importlib.util
import json
import platform
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from glimmer.deploy.offline.install import check_kept, check_machine, main, read_manifest

HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"


def bundled_pip() -> Path:
    """The wheel of pip that Python brings along."""
    spec = importlib.util.find_spec("ensurepip")
    assert spec is not None
    assert spec.origin is not None
    folders = (Path(spec.origin).with_name("_bundled"), Path("/usr/share/python-wheels"))
    return next(wheel for folder in folders for wheel in folder.glob("pip-*.whl"))


def make_wheel(path: Path, module: str, code: str) -> None:
    """A wheel `NAME-1.0-py3-none-any.whl` with one package."""
    name = path.name.split("-")[0]
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{module}/__init__.py", "")
        wheel.writestr(f"{module}/__main__.py", code)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def wheelhouse(tmp_path: Path) -> Path:
    """One whose only package prints its arguments and ends with 7 when asked to check."""
    folder = tmp_path / "wheelhouse"
    folder.mkdir()
    code = "import sys; print('ran', *sys.argv[1:]); sys.exit(7 * (sys.argv[1] == 'check'))"
    make_wheel(folder / "glimmer_serve-1.0-py3-none-any.whl", "glimmer", code)
    pip = bundled_pip()
    (folder / pip.name).write_bytes(pip.read_bytes())
    (folder / "requirements.txt").write_text("glimmer-serve==1.0\n")
    write_manifest(folder)
    return folder


def write_manifest(folder: Path, **changes: Any) -> None:
    wheels = folder.glob("*.whl")
    files = {w.name: hashlib.sha256(w.read_bytes()).hexdigest() for w in wheels}
    manifest = {"python": HERE, "glibc": [2, 17], "kept": {}, "files": files, **changes}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def run(folder: Path, *flags: str) -> int:
    return main(["--wheelhouse", str(folder), *flags])


def test_all_of_it_is_installed_and_checked_without_an_index(
    wheelhouse: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    node = tmp_path / "node"
    assert run(wheelhouse, "--venv", str(node), "--model_dir", "/models/x") == 7
    assert capfd.readouterr().out.splitlines() == [
        "ran --version",
        "ran check --model_dir /models/x --port 0",
    ]
    code = "import importlib.metadata as m; print([d.name for d in m.distributions()])"
    names = subprocess.check_output([node / "bin" / "python", "-P", "-c", code], text=True)
    assert names.strip() == "['glimmer_serve']"  # not even pip stays
    assert run(wheelhouse, "--venv", str(node)) == 1
    assert "exists already" in capfd.readouterr().err


def test_a_damaged_or_missing_file_is_told_first(
    wheelhouse: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel = wheelhouse / "glimmer_serve-1.0-py3-none-any.whl"
    wheel.write_bytes(wheel.read_bytes()[:-1])
    node = tmp_path / "node"
    assert run(wheelhouse, "--venv", str(node)) == 1
    assert capsys.readouterr().err == f"install: {wheel.name} is damaged, copy it again\n"
    wheel.unlink()
    assert run(wheelhouse, "--venv", str(node)) == 1
    assert f"{wheel.name} cannot be read, copy it again" in capsys.readouterr().err
    (wheelhouse / "manifest.json").unlink()
    assert run(wheelhouse, "--venv", str(node)) == 1
    assert f"{wheelhouse} is no wheelhouse" in capsys.readouterr().err
    assert not node.exists()


def test_a_failed_installation_leaves_no_environment(
    wheelhouse: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (wheelhouse / "requirements.txt").write_text("glimmer-serve==2.0\n")
    node = tmp_path / "node"
    assert run(wheelhouse, "--venv", str(node)) == 1
    assert "install: this failed, see above: env PIP_CONFIG_FILE" in capfd.readouterr().err
    assert not node.exists()


def test_a_package_left_out_must_be_there(
    wheelhouse: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_manifest(wheelhouse, kept={"no-such-package": "1.0"})
    node = tmp_path / "node"
    assert run(wheelhouse, "--venv", str(node)) == 1
    assert "no-such-package 1.0 was left out as installed, but is not" in capsys.readouterr().err
    assert not node.exists()
    check_kept({"fa3-fwd": "1"}, {"Fa3_Fwd": "1"})
    assert capsys.readouterr().err == ""
    check_kept({"torch": "2.11.0"}, {"torch": "2.12.0"})
    assert capsys.readouterr().err == "install: torch is 2.12.0, not 2.11.0 as listed\n"


def test_wheels_for_another_machine_are_refused(
    wheelhouse: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check_machine(read_manifest(wheelhouse))
    write_manifest(wheelhouse, python="3.99")
    assert run(wheelhouse, "--here") == 1
    assert f"the wheels are for Python 3.99, this is {HERE}" in capsys.readouterr().err
    write_manifest(wheelhouse, glibc=[2, 99])
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    assert run(wheelhouse, "--here") == 1
    assert "may need glibc 2.99, this is 2.36" in capsys.readouterr().err
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert run(wheelhouse, "--here") == 1
    assert "for Linux on x86-64, this is Linux on aarch64" in capsys.readouterr().err


def test_the_place_must_be_said(wheelhouse: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(wheelhouse)
    assert "--venv --here is required" in capsys.readouterr().err
