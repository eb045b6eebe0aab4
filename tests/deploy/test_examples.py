"""The sample configuration files are read by the parser of `glimmer serve`."""

from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from glimmer.shared.config import ServeConfig
from glimmer.shared.flags import parse_serve_args

EXAMPLES = sorted((Path(__file__).parents[2] / "deploy" / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_key_of_a_sample_is_a_setting_with_that_value(path: Path) -> None:
    values = yaml.safe_load(path.read_text())
    assert values.keys() <= {field.name for field in fields(ServeConfig)}
    config = parse_serve_args(["--config", str(path)], {})
    assert {key: getattr(config, key) for key in values} == values


def test_there_are_samples() -> None:
    assert [path.name for path in EXAMPLES] == ["demo.yaml", "gpu.yaml"]
