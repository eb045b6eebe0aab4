"""What goes into a wheelhouse; with `-m slow`, a real one and the installation from it."""

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from glimmer.deploy.offline import wheelhouse
from glimmer.deploy.offline.wheelhouse import (
    Need,
    Package,
    Target,
    WheelhouseError,
    constraints,
    direct_requirements,
    missing,
    parse_glibc,
    parse_installed,
    parse_need,
    parse_resolution,
    platform_tags,
    source_files,
    wheel_requirement,
)

ROOT = Path(wheelhouse.__file__).parents[2]
PROJECT = {
    "dependencies": ["torch>=2.11,<2.14", "msgspec>=0.19"],
    "optional-dependencies": {"gpu": ["Fa3_Fwd>=0.0.3"], "dev": ["pytest"]},
}


def resolution(**needs: str) -> dict[str, Package]:
    """Packages of version 1 with what they need, separated by commas."""
    install = [
        {"metadata": {"name": n, "version": "1", "requires_dist": [r for r in v.split(",") if r]}}
        for n, v in needs.items()
    ]
    return parse_resolution({"install": install})


def names(resolved: dict[str, Package], installed: str, *wanted: str) -> list[str]:
    have = dict.fromkeys(installed.split(), "1")
    return [p.name for p in missing(resolved, have, [parse_need(w) for w in wanted])]


def test_requirements_are_those_of_the_project_and_its_extras() -> None:
    assert direct_requirements(PROJECT, [], None) == PROJECT["dependencies"]
    assert direct_requirements(PROJECT, ["gpu"], None)[-1] == "Fa3_Fwd>=0.0.3"
    assert direct_requirements(PROJECT, ["gpu"], ["fa3-fwd", "MSGSPEC"]) == [
        "Fa3_Fwd>=0.0.3",
        "msgspec>=0.19",
    ]
    with pytest.raises(WheelhouseError, match=r"no extra 'cpu'; there are: gpu, dev"):
        direct_requirements(PROJECT, ["cpu"], None)
    with pytest.raises(WheelhouseError, match="--only numpy: not required; there are: torch"):
        direct_requirements(PROJECT, [], ["numpy"])


def test_the_gpu_extra_has_the_attention_kernels() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {parse_need(r).name for r in direct_requirements(project, ["gpu"], None)}
    assert wanted >= {"fa3-fwd", "flashinfer-python", "pyzmq", "msgspec", "xgrammar", "torch"}


def test_what_is_missing_is_what_is_needed_directly_or_not() -> None:
    resolved = resolution(a="b>=2", b="c; python_version > '3'", c="", d="")
    assert names(resolved, "", "a>1") == ["a", "b", "c"]
    assert names(resolved, "b", "a") == ["a"]
    assert names(resolved, "b", "a", "c") == ["a", "c"]
    assert names(resolved, "a b c", "a") == []


def test_what_only_an_installed_package_needs_stays_out() -> None:
    resolved = resolution(glimmer="torch,zmq", torch="cublas,jinja", cublas="", jinja="", zmq="")
    assert names(resolved, "torch", "glimmer") == ["glimmer", "zmq"]
    assert names(resolved, "torch", "glimmer", "jinja") == ["glimmer", "jinja", "zmq"]


def test_extras_bring_what_they_need_and_only_when_asked_for() -> None:
    resolved = resolution(
        a="kit[runtime]", kit='blas; extra == "blas",run; extra == "runtime"', blas="", run="kit"
    )
    assert names(resolved, "", "a") == ["a", "kit", "run"]
    assert names(resolved, "", "kit[blas]") == ["blas", "kit"]
    assert names(resolved, "kit", "a") == ["a", "run"]  # the node has the kit without that extra


def test_requirements_are_read_as_far_as_names_go() -> None:
    need = parse_need("cuda_Toolkit [cudart, NVCC]~=13.0 ; extra == \"cu13\" or extra == 'all'")
    assert need == Need("cuda-toolkit", frozenset({"cudart", "nvcc"}), frozenset({"cu13", "all"}))
    assert parse_need("Jinja2>=3.1.6") == Need("jinja2", frozenset(), frozenset())
    with pytest.raises(WheelhouseError, match="not a requirement"):
        parse_need(">=3")


def test_a_resolution_is_read_from_pips_report() -> None:
    item = {"metadata": {"name": "Fa3_Fwd", "version": "0.0.3"}, "download_info": {}}
    assert parse_resolution({"install": [item]}) == {"fa3-fwd": Package("fa3-fwd", "0.0.3", ())}


def test_installed_packages_are_read_and_pinned_without_local_parts() -> None:
    text = "# the node\ntorch==2.11.0+cu130\nFlashInfer_Python==0.6.12\n\nglimmer-serve==0.1.0\n"
    installed = parse_installed(text)
    assert installed == {"torch": "2.11.0+cu130", "flashinfer-python": "0.6.12"}
    assert constraints(installed) == ["torch==2.11.0", "flashinfer-python==0.6.12"]
    with pytest.raises(WheelhouseError, match="not name==version: -e"):
        parse_installed("-e /src")


def test_platform_tags_go_down_from_the_nodes_glibc() -> None:
    tags = platform_tags(2, 28)
    assert tags[0] == "manylinux_2_28_x86_64"
    assert {"manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64"} <= set(tags)
    assert "manylinux_2_29_x86_64" not in tags
    flags = Target("3.12", (2, 28)).pip_flags()
    assert {"--python-version=3.12", "--only-binary=:all:"} <= set(flags)


@pytest.mark.parametrize("text", ["2.16", "3.1", "2", "x", "2.100"])
def test_an_odd_glibc_is_refused(text: str) -> None:
    assert parse_glibc("2.39") == (2, 39)
    with pytest.raises(WheelhouseError, match=f"--glibc {text}: must be 2.17 or newer"):
        parse_glibc(text)


def test_wheels_are_pinned_by_their_file_names() -> None:
    assert wheel_requirement("fa3_fwd-0.0.3-cp39-abi3-linux_x86_64.whl") == "fa3-fwd==0.0.3"
    assert wheel_requirement("a.b-1.0+cu1-py3-none-any.whl") == "a-b==1.0+cu1"


def test_the_copy_that_is_built_has_every_module_and_no_tests() -> None:
    files = {str(p) for p in source_files(ROOT)}
    assert {"__init__.py", "deploy/offline/install.py"} <= files
    assert "deploy/demo/chat_template.jinja" in files
    assert not [f for f in files if f.startswith(("tests", ".")) or "__pycache__" in f]


def test_mistakes_are_one_line_and_leave_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "wheelhouse"
    (tmp_path / "node.txt").write_text("nonsense\n")
    for flags, words in (
        (["--extras", "none"], "no extra 'none'"),
        (["--installed", str(tmp_path / "node.txt")], "not name==version: nonsense"),
        (["--installed", str(tmp_path / "gone")], "gone"),
        (["--glibc", "1"], "--glibc 1"),
    ):
        assert wheelhouse.main(["--output", str(output), *flags]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("wheelhouse: ")
        assert words in line
    assert [p.name for p in tmp_path.iterdir()] == ["node.txt"]
    assert wheelhouse.main(["--output", str(tmp_path)]) == 1
    assert "exists already" in capsys.readouterr().err


@pytest.mark.slow
def test_a_wheelhouse_is_made_and_installed_without_an_index(tmp_path: Path) -> None:
    """Needs a package index for the first half."""
    output, node = tmp_path / "wheelhouse", tmp_path / "node"
    script = str(Path(wheelhouse.__file__))
    # What `glimmer --version` imports, and one package with compiled code.
    small = ["--extras", "--only", "msgspec", "pyyaml", "--no_deps"]
    subprocess.run([sys.executable, script, "--output", str(output), *small], check=True)
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["kept"] == {}
    pinned = (output / "requirements.txt").read_text().split()
    assert [p.split("==")[0] for p in pinned] == ["glimmer-serve", "msgspec", "pyyaml"]
    own = next(output.glob("glimmer_serve-*.whl"))
    with zipfile.ZipFile(own) as wheel:
        assert wheel.read("glimmer/commit.txt").decode().strip() == (manifest["commit"] or "")

    install = [sys.executable, str(output / "install.py"), "--venv", str(node), "--no_check"]
    no_index = os.environ | {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_EXTRA_INDEX_URL": ""}
    done = subprocess.run(install, check=True, capture_output=True, text=True, env=no_index)
    assert done.stdout.startswith("glimmer ")
    python = str(node / "bin" / "python")
    code = "import msgspec, glimmer.deploy.bench.report as r; print(r.environment()['commit'])"
    found = subprocess.check_output([python, "-c", code], text=True, cwd=tmp_path).strip()
    assert found == str(manifest["commit"])
