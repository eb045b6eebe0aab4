"""The cache directory is the user's where that can be written."""

import tempfile
from pathlib import Path

import pytest
from glimmer.shared.cache_dir import user_cache_dir


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_it_is_where_the_desktop_standard_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert user_cache_dir() == tmp_path / "home" / ".cache" / "glimmer"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert user_cache_dir() == tmp_path / "home" / ".cache" / "glimmer"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert user_cache_dir() == tmp_path / "xdg" / "glimmer"


def test_without_one_a_temporary_directory_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    found = user_cache_dir()
    assert found.parent == tmp_path
    assert found.stat().st_mode & 0o777 == 0o700
