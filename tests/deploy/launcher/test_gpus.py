"""A GPU that cannot be used is reported in one line, with the reason and the remedy."""

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from glimmer.deploy.launcher import gpus
from glimmer.deploy.launcher.gpus import check_gpus, find_gpus
from glimmer.shared.config import ServeConfig
from glimmer.shared.errors import ConfigError
from glimmer.shared.resolve import Hardware

TWO = """\
0, GPU-aaa, 81000, 9.0, 580.65.06, NVIDIA H100 80GB HBM3
1, GPU-bbb, 40000, 8.0, 580.65.06, NVIDIA A100-SXM4-40GB
"""
Fake = Callable[..., None]


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """driver(output, exit code): this nvidia-smi, with a torch for CUDA 13."""

    def install(output: str, code: int = 0) -> None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\ncat <<'END'\n{output}END\nexit {code}\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        monkeypatch.setattr(gpus, "_torch_cuda", lambda: 13)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return install


@pytest.mark.parametrize(
    ("visible", "memory", "capabilities"),
    [
        (None, (81000 << 20, 40000 << 20), (9.0, 8.0)),
        ("1", (40000 << 20,), (8.0,)),
        ("GPU-aaa", (81000 << 20,), (9.0,)),
    ],
)
def test_gpus_are_those_that_cuda_may_use(
    driver: Fake,
    monkeypatch: pytest.MonkeyPatch,
    visible: str | None,
    memory: tuple[int, ...],
    capabilities: tuple[float, ...],
) -> None:
    driver(TWO)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert find_gpus() == (memory, capabilities, "")


@pytest.mark.parametrize(
    ("output", "code", "said"),
    [
        ("", 0, "nvidia-smi lists no GPU: nothing"),
        ("0, GPU-a, [N/A], [N/A], [N/A], lost\n", 0, "lists no GPU: 0, GPU-a"),
        ("Failed to initialize NVML: Driver/library\nmismatch\n", 18, "library mismatch"),
        (TWO.replace("580.65.06", "550.54.14"), 0, "driver 550.54.14 is too old for CUDA 13"),
    ],
)
def test_a_driver_that_cannot_be_used_is_warned_about(
    driver: Fake, caplog: pytest.LogCaptureFixture, output: str, code: int, said: str
) -> None:
    driver(output, code)
    memory, capabilities, reason = find_gpus()
    assert (memory, capabilities) == ((), ())
    assert said in reason
    assert reason in caplog.text


def test_hidden_gpus_and_a_torch_without_cuda_are_told(
    driver: Fake, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    driver(TWO)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_gpus()[2] == "CUDA_VISIBLE_DEVICES= hides all 2 GPUs: unset it"
    assert not caplog.text
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert "CUDA_VISIBLE_DEVICES=7 hides all" in find_gpus()[2]
    monkeypatch.setattr(gpus, "_torch_cuda", lambda: None)
    assert find_gpus()[2].startswith("the installed torch is built without CUDA")


def test_without_a_driver_nobody_is_warned(
    driver: Fake, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    driver(TWO)
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert find_gpus()[2].startswith("nvidia-smi was not found")
    assert not caplog.text


def test_torch_is_asked_without_importing_it() -> None:
    import torch

    major = torch.version.cuda and int(torch.version.cuda.split(".")[0])
    assert gpus._torch_cuda() == major


def check(*capabilities: float, installed: tuple[str, ...] = (), **changes: Any) -> None:
    config = ServeConfig(**{"device": "cuda", "tp": len(capabilities), **changes})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: name in installed or None)
        check_gpus(config, Hardware(0, 1, (1,) * len(capabilities), capabilities))


def test_a_hopper_with_its_libraries_passes(caplog: pytest.LogCaptureFixture) -> None:
    both: dict[str, Any] = {
        "llm_prefill_att_backend": ("fa3",),
        "llm_decode_att_backend": ("flashinfer",),
    }
    for module in ("flash_attn_interface", "fa3_fwd_interface"):
        check(9.0, 9.0, installed=(module, "flashinfer"), **both)
    check(9.0, llm_decode_att_backend=("fa3",))
    check(7.5, device="cpu", **both)
    assert not caplog.text


def test_older_gpus_are_slower_or_refused(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check(9.0, 8.6)
    assert "GPU 1 has compute capability 8.6: slower" in caplog.text
    with pytest.raises(ConfigError, match=r"GPU 0 has compute capability 7\.5, .* use another"):
        check(7.5)


@pytest.mark.parametrize("capability", [8.0, 10.0])
def test_fa3_needs_a_hopper(capability: float) -> None:
    with pytest.raises(ConfigError, match=r"--llm_prefill_att_backend fa3 needs .*_backend auto"):
        check(capability, installed=("fa3_fwd_interface",), llm_prefill_att_backend=("fa3",))


@pytest.mark.parametrize(
    ("flag", "backend", "package"),
    [
        ("llm_prefill_att_backend", "fa3", "fa3-fwd"),
        ("llm_decode_att_backend", "flashinfer", "flashinfer-python"),
        ("llm_decode_att_backend", "triton", "triton"),
    ],
)
def test_a_missing_library_is_named(flag: str, backend: str, package: str) -> None:
    with pytest.raises(ConfigError, match=f"--{flag} {backend} needs {package}, .* pip install"):
        check(9.0, **{flag: (backend,)})
