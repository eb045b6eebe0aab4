import dataclasses
import shutil
from pathlib import Path

import pytest
from glimmer.deploy.launcher.preflight import (
    check_access,
    check_memory,
    check_model,
    detect_hardware,
)
from glimmer.shared.config import ServeConfig
from glimmer.shared.errors import ConfigError, ModelError
from glimmer.shared.model_spec import load_model_spec
from glimmer.shared.resolve import Hardware


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> ServeConfig:
    """A copy that may be broken."""
    path = tmp_path / "model"
    shutil.copytree(tiny_model, path)
    return ServeConfig(model_dir=str(path), device="cpu", data_type="float32")


def test_a_complete_model_passes(model: ServeConfig) -> None:
    spec = load_model_spec(Path(model.model_dir))
    check_model(model, spec)
    check_memory(model, spec, detect_hardware())


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "chat_template.jinja", "model.safetensors.index.json"]
)
def test_a_missing_file_is_named(model: ServeConfig, name: str) -> None:
    spec = load_model_spec(Path(model.model_dir))
    (Path(model.model_dir) / name).unlink()
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        check_model(model, spec)


def test_a_missing_tokenizer_is_named(model: ServeConfig) -> None:
    (Path(model.model_dir) / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        check_model(model, load_model_spec(Path(model.model_dir)))


def test_a_truncated_shard_is_found(model: ServeConfig) -> None:
    shard = next(Path(model.model_dir).glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    spec = load_model_spec(Path(model.model_dir))
    with pytest.raises(ModelError, match=shard.name):
        check_model(model, spec)
    shard.unlink()
    check_model(dataclasses.replace(model, load_format="dummy"), spec)


def test_a_template_may_come_from_elsewhere(model: ServeConfig, tmp_path: Path) -> None:
    spec = load_model_spec(Path(model.model_dir))
    (Path(model.model_dir) / "chat_template.jinja").unlink()
    other = tmp_path / "other.jinja"
    given = dataclasses.replace(model, chat_template=str(other))
    with pytest.raises(ConfigError, match=r"other\.jinja is missing"):
        check_model(given, spec)
    other.write_text("{% generation %}{% break %}{% endgeneration %}")
    check_model(given, spec)
    (Path(model.model_dir) / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    check_model(model, spec)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer_config.json", b"{", "Expecting"),
        ("tokenizer_config.json", b"[]", "not a table"),
        ("generation_config.json", b"\xff", "utf-8"),
        ("chat_template.jinja", b"\xff", "utf-8"),
        ("chat_template.jinja", b" \n", "is empty"),
        ("chat_template.jinja", b"a\n{% if %}", "line 2 of the chat template"),
    ],
)
def test_a_broken_text_file_is_named(
    model: ServeConfig, name: str, content: bytes, words: str
) -> None:
    (Path(model.model_dir) / name).write_bytes(content)
    with pytest.raises(ModelError, match=f"{name}.*{words}"):
        check_model(model, load_model_spec(Path(model.model_dir)))


def test_weights_that_cannot_fit_are_refused(model: ServeConfig) -> None:
    spec = load_model_spec(Path(model.model_dir))
    with pytest.raises(ConfigError, match=r"this machine has 0\.0 GiB available"):
        check_memory(model, spec, Hardware(host_memory=1 << 20, num_cpus=1))
    gpu = dataclasses.replace(model, device="cuda", tp=2, mem_fraction=0.5)
    small, large = ((1 << n,) * 2 for n in (20, 30))
    check_memory(gpu, spec, Hardware(0, 1, large))
    with pytest.raises(ConfigError, match="raise --tp or --mem_fraction"):
        check_memory(gpu, spec, Hardware(0, 1, small))


def test_a_cache_that_cannot_hold_a_request_is_refused(model: ServeConfig) -> None:
    spec = load_model_spec(Path(model.model_dir))
    hardware = Hardware(0, 1, (1 << 30,), (9.0,))
    gpu = dataclasses.replace(model, device="cuda", max_req_total_len=400_000)
    check_memory(gpu, spec, hardware)
    longer = dataclasses.replace(gpu, max_req_total_len=900_000)
    with pytest.raises(ConfigError) as caught:
        check_memory(longer, spec, hardware)
    assert "--max_req_total_len 900000 needs 1.1 GiB of KV cache" in str(caught.value)
    fitting = int(str(caught.value).partition("lower it to less than ")[2].split(",")[0])
    check_memory(dataclasses.replace(gpu, max_req_total_len=fitting), spec, hardware)
    check_memory(dataclasses.replace(longer, max_total_token_num=1000), spec, hardware)
    many = dataclasses.replace(gpu, max_total_token_num=900_000)
    with pytest.raises(ConfigError, match="--max_total_token_num 900000 needs"):
        check_memory(many, spec, hardware)
    drafts = dataclasses.replace(gpu, mtp_mode="vanilla_with_att", mtp_step=7)
    with pytest.raises(ConfigError, match="--max_req_total_len 400000 needs 1"):
        check_memory(drafts, spec, hardware)


def test_the_draft_checkpoint_is_checked_too(model: ServeConfig, tiny_model: Path) -> None:
    spec = load_model_spec(Path(model.model_dir))
    draft = dataclasses.replace(model, mtp_mode="eagle_with_att", mtp_step=1)
    check_model(draft, spec)
    empty = Path(model.model_dir) / "empty"
    empty.mkdir()
    with pytest.raises(ModelError, match="empty has neither"):
        check_model(dataclasses.replace(draft, mtp_draft_model_dir=(str(empty),)), spec)


def test_this_machine_has_memory_and_processors() -> None:
    hardware = detect_hardware()
    assert hardware.host_memory > 1 << 28
    assert hardware.num_cpus >= 1


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "127.example"])
def test_a_port_open_to_strangers_without_keys_is_warned_about(
    host: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    check_access(ServeConfig(host=host, port=8123))
    assert len(caplog.records) == 1
    assert f"--host {host}: EVERYBODY WHO REACHES PORT 8123 CAN USE THIS SERVER" in caplog.text
    caplog.clear()
    check_access(ServeConfig(host=host, api_key=("0" * 64,)))
    assert "API keys and prompts travel in the clear" in caplog.text
    assert "metrics_port" not in caplog.text
    check_access(ServeConfig(host=host, api_key=("0" * 64,), metrics_port=9090))
    assert "everybody who reaches --metrics_port can read /metrics" in caplog.text
    caplog.clear()
    for local in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        check_access(ServeConfig(host=local))
    assert not caplog.records
    with pytest.raises(ConfigError, match=r"--api_key_file .*keys: No such file"):
        check_access(ServeConfig(api_key_file=str(tmp_path / "keys")))
