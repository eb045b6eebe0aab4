"""--verify_checksums: each kind of list is understood, each file that differs is named."""

import hashlib
import logging
import os
import shutil
from pathlib import Path

import pytest
from glimmer.deploy.demo.run import MODEL_DIR
from glimmer.deploy.launcher.checksums import verify_checksums
from glimmer.shared.config import ServeConfig
from glimmer.shared.errors import ConfigError, ModelError
from glimmer.shared.fingerprint import digest_of, take_fingerprint

SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy without checksums."""
    shutil.copytree(tiny_model, tmp_path / "model")
    return tmp_path / "model"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def git_name(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def config_of(model: Path) -> ServeConfig:
    return ServeConfig(model_dir=str(model), verify_checksums=True)


def spoil(path: Path) -> None:
    """Flip a bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def list_all(model: Path, name: str, layout: str) -> None:
    files = sorted(path for path in model.iterdir() if path.is_file())
    lines = [layout.format(digest=sha256(path), name=path.name) for path in files]
    (model / name).write_text("# made today\n\n" + "\n".join(lines) + "\n")


def list_each(model: Path, name: str, layout: str) -> None:
    for path in list(model.iterdir()):
        line = layout.format(digest=sha256(path), name=path.name)
        (model / f"{path.name}{name}").write_text(line)


def as_cache(model: Path, name: str, layout: str) -> None:
    """Links to blobs: weights are named by SHA-256, small files by Git."""
    blobs = model.parent / "blobs"
    blobs.mkdir()
    for path in list(model.iterdir()):
        blob = blobs / (sha256(path) if path.suffix == ".safetensors" else git_name(path))
        path.rename(blob)
        path.symlink_to(f"../blobs/{blob.name}")


def as_download(model: Path, name: str, layout: str) -> None:
    """What `hf download --local-dir` leaves."""
    notes = model / ".cache/huggingface/download"
    notes.mkdir(parents=True)
    for path in (path for path in list(model.iterdir()) if path.is_file()):
        etag = sha256(path) if path.suffix == ".safetensors" else git_name(path)
        (notes / f"{path.name}.metadata").write_text(f"{'c' * 40}\n{etag}\n1764600000.0\n")


@pytest.mark.parametrize(
    ("make", "name", "layout"),
    [
        (list_all, "SHA256SUMS", "{digest}  {name}"),
        (list_all, "checksums.txt", "{digest} *./{name}"),
        (list_all, "sha256sum.txt", "SHA256 ({name}) = {digest}"),
        (list_all, "all.sha256", "{digest}\t{name}"),
        (list_each, ".sha256", "{digest}\n"),
        (as_cache, "", ""),
        (as_download, "", ""),
    ],
)
def test_right_files_pass_and_wrong_ones_are_all_named(
    model: Path, caplog: pytest.LogCaptureFixture, make: object, name: str, layout: str
) -> None:
    assert callable(make)
    make(model, name, layout)
    with caplog.at_level(logging.INFO):
        known = verify_checksums(config_of(model))
    assert "checksums are right" in caplog.text
    assert "not verified" not in caplog.text
    # All bytes of the weights were hashed: nothing is hashed twice.
    stamps = dict(take_fingerprint(config_of(model), known))
    assert digest_of(stamps[str(model / SHARD)]) == sha256(model / SHARD)
    spoil(model / SHARD)
    spoil(model / "tokenizer.json")
    with pytest.raises(ModelError, match=r"2 of .* checksums differ") as error:
        verify_checksums(config_of(model))
    for file in (SHARD, "tokenizer.json"):
        assert f"\n  {file} has checksum " in str(error.value)
    assert "config.json" not in str(error.value)


def test_without_checksums_it_says_so(model: Path) -> None:
    with pytest.raises(ConfigError, match="has no checksums to compare with"):
        verify_checksums(config_of(model))


def test_files_without_checksum_and_lines_without_are_told(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (model / "SHA256SUMS").write_text(
        f"{sha256(model / SHARD)}  {SHARD}\n{'0' * 32}  config.json\n{'1' * 64}  original.pth\n"
    )
    verify_checksums(config_of(model))
    assert "SHA256SUMS: line 2 has no SHA-256 checksum" in caplog.text
    assert "not here: original.pth" in caplog.text
    assert "no checksum for config.json" in caplog.text
    assert "model-00002-of-00002.safetensors" in caplog.text


@pytest.mark.parametrize("name", ["../config.json", "/etc/passwd", "a/../../b"])
def test_lists_name_no_files_elsewhere(model: Path, name: str) -> None:
    (model / "SHA256SUMS").write_text(f"{'0' * 64}  {name}\n")
    with pytest.raises(ModelError, match=r"line 1: .* is not in this directory"):
        verify_checksums(config_of(model))


def test_a_list_that_cannot_be_read_is_named(model: Path) -> None:
    (model / "SHA256SUMS").write_bytes(b"\xff" * 70)
    with pytest.raises(ModelError, match="SHA256SUMS: "):
        verify_checksums(config_of(model))
    os.truncate(model / "SHA256SUMS", 17 << 20)
    with pytest.raises(ModelError, match="SHA256SUMS has more than"):
        verify_checksums(config_of(model))


def test_the_demo_model_has_its_checksums(caplog: pytest.LogCaptureFixture) -> None:
    verify_checksums(config_of(MODEL_DIR))
    assert "not verified" not in caplog.text
