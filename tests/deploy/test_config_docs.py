from pathlib import Path

from glimmer.deploy.config_docs import render
from glimmer.shared.config import flag_fields

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == render() + "\n", (
        "run: python -m glimmer.deploy.config_docs > docs/configuration.md"
    )


def test_the_page_has_every_field() -> None:
    page = render()
    assert not [name for name in flag_fields() if f"| `--{name}`" not in page]
    assert "| `--quant_type` | refused unless `none` |" in page
    assert "`LIGHTLLM_LOG_DIR`" in page
