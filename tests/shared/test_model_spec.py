"""Dimensions are read from config.json, and a broken one is named."""

import json
from pathlib import Path
from typing import Any

import pytest
from flash import CONFIG as FLASH
from glimmer.deploy.demo.checkpoint import tiny_config
from glimmer.shared.errors import ModelError
from glimmer.shared.model_spec import load_model_spec


def write(path: Path, config: object) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_the_real_model(tmp_path: Path) -> None:
    spec = load_model_spec(write(tmp_path, FLASH))
    assert (spec.latent_dim, spec.qk_head_dim, spec.softmax_scale) == (576, 256, 1 / 16)
    assert spec.eos_token_ids == (154820, 154827, 154829)
    assert spec.rope_interleave
    assert spec.num_token_ids == spec.vocab_size  # no tokenizer beside it: nothing is padding


def test_rope_theta_may_sit_in_rope_parameters(tmp_path: Path) -> None:
    config = {k: v for k, v in FLASH.items() if k not in ("rope_theta", "rope_scaling")}
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 5000.0}
    assert load_model_spec(write(tmp_path, config)).rope_theta == 5000.0


def test_dense_layers_may_be_listed_by_kind(tmp_path: Path) -> None:
    config = {**FLASH, "mlp_layer_types": ["dense"] * 2 + ["sparse"] * 45}
    assert load_model_spec(write(tmp_path, config)).first_dense_layers == 2


@pytest.mark.parametrize("key", [k for k, v in FLASH.items() if isinstance(v, int)])
def test_a_wrong_number_is_named(tmp_path: Path, key: str) -> None:
    for value in (-1, "many", True):
        with pytest.raises(ModelError, match=key):
            load_model_spec(write(tmp_path, {**FLASH, key: value}))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "llama"}, "llama"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "yarn"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "yarn"),
        ({"rope_parameters": ["default"]}, "rope"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"num_experts_per_tok": 65}, "num_experts_per_tok"),
        ({"n_group": 4, "topk_group": 1, "num_experts_per_tok": 17}, "num_experts_per_tok"),
        ({"n_group": 3}, "n_group"),
        ({"topk_group": 2}, "topk_group"),
        ({"mlp_layer_types": ["sparse", "dense"] * 23 + ["sparse"]}, "mlp_layer_types"),
        ({"mlp_layer_types": ["dense", "sparse"]}, "mlp_layer_types"),
        ({"eos_token_id": [154880]}, "eos_token_id"),
    ],
)
def test_what_is_not_supported_is_refused(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(ModelError, match=named):
        load_model_spec(write(tmp_path, {**FLASH, **change}))


@pytest.mark.parametrize("key", [k for k, v in FLASH.items() if type(v) is int])
@pytest.mark.parametrize("value", [10**31, 10**400])
def test_numbers_beyond_all_limits_are_named(tmp_path: Path, key: str, value: int) -> None:
    with pytest.raises(ModelError, match=key):
        load_model_spec(write(tmp_path, {**FLASH, key: value}))


def test_many_experts_in_many_layers_are_refused(tmp_path: Path) -> None:
    config = {**FLASH, "num_hidden_layers": 1000, "n_routed_experts": 4000}
    with pytest.raises(ModelError, match="num_hidden_layers x n_routed_experts"):
        load_model_spec(write(tmp_path, config))


@pytest.mark.parametrize("value", ["Infinity", "NaN", "1e31"])
def test_real_numbers_have_limits(tmp_path: Path, value: str) -> None:
    text = json.dumps({**FLASH, "routed_scaling_factor": "X"}).replace('"X"', value)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match="routed_scaling_factor"):
        load_model_spec(tmp_path)


def test_nested_and_huge_files_are_refused(tmp_path: Path) -> None:
    for text in ('{"a":' * 100_000 + "1" + "}" * 100_000, " " * (17 << 20)):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelError, match=r"config\.json"):
            load_model_spec(tmp_path)
    write(tmp_path, FLASH)
    (tmp_path / "tokenizer.json").write_text("[" * 100_000)
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        load_model_spec(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '"x"', "null"])
def test_a_broken_file_is_a_model_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        load_model_spec(tmp_path)


def test_an_empty_directory_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a model directory"):
        load_model_spec(tmp_path)


def test_a_broken_tokenizer_is_named(tmp_path: Path) -> None:
    write(tmp_path, {**tiny_config(), "vocab_size": 600})
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        load_model_spec(tmp_path)
