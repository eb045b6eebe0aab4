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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs a card is skipped where there is none. With `-n 2 --dist loadgroup` the tests of
    one file run in one process, and those of servers one after another, but for those that
    neither break anything nor measure time: both processes so have as much to do."""
    for item in items:
        patient = item.path.name.startswith("test_demo_")
        group = "servers" if "e2e" in item.path.parts and not patient else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_unconfigure() -> None:
    """A scheduler's loop that ran in this process froze what there was; libraries that look for
    leaks at the end would list it all."""
    gc.unfreeze()
