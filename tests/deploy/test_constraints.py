"""constraints.txt names a version of every package that the project asks for, and one it takes."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def test_every_requirement_has_a_tested_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    tested = [Requirement(line) for line in lines if not line.startswith("#")]
    by_name = {item.name.lower().replace("_", "-"): item for item in tested}
    for requirement in map(Requirement, wanted):
        item = by_name.get(requirement.name.lower())
        if requirement.name in ("torch", "triton"):
            assert item == requirement  # builds of torch differ from machine to machine
        elif requirement.name != "setuptools":  # pip freeze leaves it out on Python 3.11
            assert item is not None, requirement.name
            (version,) = item.specifier
            assert version.operator == "=="
            assert requirement.specifier.contains(version.version), requirement
