"""Xid events, memory errors and lost GPUs, by a fake NVML."""

import importlib.util
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from glimmer.deploy.launcher.gpu_health import watch_gpus
from glimmer.deploy.launcher.gpu_watch import FATAL_XIDS, GpuWatcher
from glimmer.shared.config import ServeConfig

FAKE = Path(__file__).parents[1] / "fakes" / "pynvml.py"


@pytest.fixture
def nvml() -> Any:
    """The fake module, without anything that happened before."""
    spec = importlib.util.spec_from_file_location("fake_pynvml", FAKE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_healthy_gpu_stays_healthy(nvml: Any) -> None:
    report = GpuWatcher(nvml, ["GPU-a", "GPU-b"]).look()
    assert not report.fault
    assert [gpu.uuid for gpu in report.gpus] == ["GPU-a", "GPU-b"]
    assert all(gpu.is_healthy for gpu in report.gpus)


@pytest.mark.parametrize("xid", sorted(FATAL_XIDS))
def test_a_fatal_xid_is_a_fault_of_its_gpu(nvml: Any, xid: int) -> None:
    watcher = GpuWatcher(nvml, ["GPU-a", "GPU-b"])
    nvml.script += ["nothing", f"xid={xid}"]
    report = watcher.look()
    assert report.fault == f"GPU 1 (GPU-b): Xid {xid}"
    assert [gpu.is_healthy for gpu in report.gpus] == [True, False]
    assert report.gpus[1].fatal_xids == 1
    assert watcher.look().fault == report.fault, "it stays"


def test_other_xids_are_counted_and_end_nothing(nvml: Any) -> None:
    watcher = GpuWatcher(nvml, ["GPU-a"])
    nvml.script += ["xid=31", "xid=31", "xid=94"]
    for _ in range(3):
        report = watcher.look()
    [gpu] = report.gpus
    assert not report.fault
    assert (gpu.application_xids, gpu.other_xids, gpu.fatal_xids, gpu.last_xid) == (2, 1, 0, 94)


def test_errors_of_the_memory_are_counted(nvml: Any) -> None:
    watcher = GpuWatcher(nvml, ["GPU-a"])
    nvml.script.append("ecc=3")
    [gpu] = watcher.look().gpus
    assert (gpu.corrected_ecc, gpu.uncorrected_ecc, gpu.is_healthy) == (0, 3, True)


def test_a_gpu_without_events_or_ecc_is_still_watched(nvml: Any) -> None:
    nvml.supported_events, nvml.uncorrected = 0, -1
    assert not GpuWatcher(nvml, ["GPU-a"]).look().fault


@pytest.mark.parametrize(("word", "text"), [("lost", "GPU is lost"), ("reset", "reset required")])
def test_a_lost_gpu_is_a_fault(nvml: Any, word: str, text: str) -> None:
    watcher = GpuWatcher(nvml, ["GPU-a"])
    nvml.script.append(word)
    assert watcher.look().fault == f"GPU 0 (GPU-a): {text}"


def test_a_cpu_has_nothing_to_watch() -> None:
    assert watch_gpus(ServeConfig(device="cpu")) is None


@pytest.fixture
def happen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Lets something happen to the GPU of a server that is started afterwards."""
    file = tmp_path / "nvml"
    monkeypatch.setenv("FAKE_NVML", str(file))

    def write(words: str) -> None:
        file.with_suffix(".new").write_text(words)
        os.replace(file.with_suffix(".new"), file)

    return write


def test_a_server_whose_gpu_is_lost_ends_with_6_and_starts_nothing_again(
    serve: Callable[..., Any], happen: Callable[[str], None]
) -> None:
    server = serve("--model_owner", "gpu-fault")
    server.ready_line()
    happen("xid=31")
    server.children("gpu_watch")
    happen("xid=79")
    assert server.wait() == 6
    log = server.await_log("GPU 0 (GPU-0): Xid 79", "frontend told: PeerLost(role='scheduler'")
    assert "started worker 0 again" not in log


def test_a_watcher_that_dies_ends_nothing(serve: Callable[..., Any]) -> None:
    server = serve("--model_owner", "gpu-fault")
    server.ready_line()
    [watcher] = server.children("gpu_watch")
    watcher.kill()
    server.await_log("the health of the GPUs is no longer watched")
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
