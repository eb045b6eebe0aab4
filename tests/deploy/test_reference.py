"""`glimmer check --reference`: tokenizer and template against those of transformers."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from glimmer.deploy.cli import main
from glimmer.deploy.demo.run import MODEL_DIR
from glimmer.deploy.reference import compare_with_transformers
from glimmer.shared.errors import ModelError, UsageError
from glimmer.shared.model_spec import load_model_spec

ROWS = load_model_spec(MODEL_DIR).vocab_size


def test_glimmer_check_compares_the_demo_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--model_dir", "demo", "--port", "0", "--reference"]) == 0
    assert "ok  tokenizer and template, as in transformers" in capsys.readouterr().out


def test_the_template_of_the_configuration_is_compared(tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% if tools %}{{ raise_exception('no tools') }}{% endif %}{{ messages }}")
    compare_with_transformers(MODEL_DIR, ROWS, str(template))
    template.write_text("{{ strftime_now('%f') }}")  # microseconds are never the same
    with pytest.raises(ModelError, match="token ids of a question differ"):
        compare_with_transformers(MODEL_DIR, ROWS, str(template))


def test_a_token_that_only_transformers_knows_is_a_difference(tmp_path: Path) -> None:
    model = shutil.copytree(MODEL_DIR, tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["extra_special_tokens"] = ["<|new|>"]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"<\|new\|>.* differ from those of transformers at pos"):
        compare_with_transformers(model, ROWS)


def test_transformers_must_be_installed_and_able(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match="transformers cannot read the tokenizer"):
        compare_with_transformers(tmp_path, ROWS)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match="needs transformers: pip install transformers"):
        compare_with_transformers(MODEL_DIR, ROWS)
