import dataclasses
import shutil
from pathlib import Path

import pytest
from glimmer.deploy import preflight
from glimmer.deploy.preflight import check_memory, check_model, detect_hardware
from glimmer.shared.config import ServeConfig
from glimmer.shared.errors import ConfigError, ModelError
from glimmer.shared.model_spec import load_model_spec
from glimmer.shared.resolve import Hardware

NVIDIA_SMI = "#!/bin/sh\necho '0, GPU-aaa, 81000'\necho '1, GPU-bbb, 40000'\n"


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


@pytest.mark.parametrize(
    ("visible", "memory"),
    [
        (None, (81000 << 20, 40000 << 20)),
        ("1", (40000 << 20,)),
        ("GPU-aaa", (81000 << 20,)),
        ("", ()),
    ],
)
def test_gpus_are_those_that_cuda_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, memory: tuple[int, ...]
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(NVIDIA_SMI)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(preflight, "_torch_has_cuda", lambda: True)
    assert detect_hardware().gpu_memory == memory
    monkeypatch.setattr(preflight, "_torch_has_cuda", lambda: False)
    assert detect_hardware().gpu_memory == ()


def test_torch_is_asked_without_importing_it() -> None:
    import torch

    assert preflight._torch_has_cuda() == (torch.version.cuda is not None)


def test_this_machine_has_memory_and_processors() -> None:
    hardware = detect_hardware()
    assert hardware.host_memory > 1 << 28
    assert hardware.num_cpus >= 1
