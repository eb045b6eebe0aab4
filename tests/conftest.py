"""Fixtures that all tests share."""

import contextlib
import gc
import os
from pathlib import Path

import pytest
import torch
from glimmer.deploy.demo.checkpoint import make_checkpoint

if not torch.cuda.is_available():  # read when Triton is imported, which libraries do, too
    os.environ["TRITON_INTERPRET"] = "1"


E2E_GROUPS = {
    "servers": (
        "test_faults.py",
        "test_keys.py",
        "test_lifecycle.py",
        "test_mtp.py",
        "test_soak.py",
        "test_structured.py",
    ),
    "one server": ("test_bad_input.py", "test_chat.py", "test_clients.py"),
}
LONGEST_GROUPS = (  # by CPU time, see cpu_times.py
    "servers",
    "e2e/test_demo_clients.py",
    "workers/test_drafting.py",
    "e2e/test_exactness.py",
    "engine/test_constraints.py",
    "workers/test_mtp_table.py",
    "training/test_train.py",
    "moe/test_experts_triton.py",
    "one server",
    "workers/test_parity.py",
    "sim/test_sim.py",
    "e2e/test_demo_parity.py",
    "sampling/test_cut_triton.py",
)

with contextlib.suppress(ImportError):  # a machine with a card may lack it
    import hypothesis

    # How long an example takes says something about the machine alone.
    hypothesis.settings.register_profile(
        "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny random checkpoint in the real layout."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    make_checkpoint(path)
    return path


def pytest_addoption(parser: pytest.Parser) -> None:
    """Sizes of the long runs."""
    parser.addoption("--soak", type=int, default=100, help="requests in tests/e2e/test_soak.py")
    parser.addoption(
        "--parity-prompts", type=int, default=6, help="prompts in tests/e2e/test_exactness.py"
    )
    parser.addoption(
        "--mtp-prompts", type=int, default=15, help="prompts in tests/workers/test_mtp_table.py"
    )
    parser.addoption("--mtp-model", type=Path, help="its checkpoint; default: noise")
    parser.addoption(
        "--update-trace", action="store_true", help="write docs/tracing-a-request.md anew"
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m gpu` only files that have such tests, and folders that have such files, are
    imported: a machine with a card may lack what the others need (clients, plugins)."""
    if config.getoption("markexpr") != "gpu":
        return None
    files = collection_path.rglob("test_*.py") if collection_path.is_dir() else [collection_path]
    return None if any("mark.gpu" in file.read_text() for file in files) else True


def pytest_configure(config: pytest.Config) -> None:
    """pytest-xdist hands out groups of tests in our order, not by their number of tests."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `-n 2 --dist loadgroup` the tests of a group run in one process. The longest groups
    come first, so that both processes end at about the same time. Tests that need a card are
    skipped where there is none."""
    items.sort(key=lambda item: _order(_group(item.path)))
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_group(item.path)))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _group(path: Path) -> str:
    """Tests that kill processes or measure time run one after another. A file is a group
    otherwise, but for those that share a server."""
    for group, files in E2E_GROUPS.items():
        if "e2e" in path.parts and path.name in files:
            return group
    return "/".join(path.parts[-2:])


def _order(group: str) -> int:
    return LONGEST_GROUPS.index(group) if group in LONGEST_GROUPS else len(LONGEST_GROUPS)


def pytest_unconfigure() -> None:
    """A scheduler's loop that ran in this process froze what there was; libraries that look for
    leaks at the end would list it all."""
    gc.unfreeze()
