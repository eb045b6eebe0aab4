"""A model that changed on disk is named; one that was touched or copied over itself is not."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from glimmer.shared.config import ServeConfig
from glimmer.shared.errors import ModelError
from glimmer.shared.fingerprint import changed_files, make_stamp, take_fingerprint
from glimmer.shared.lifecycle import CONFIG_FILE, start_child

SHARD = "model-00002-of-00002.safetensors"
LATER = 2_000_000_000  # seconds


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> ServeConfig:
    """A copy, as a launcher has noted it."""
    shutil.copytree(tiny_model, tmp_path / "model")
    config = ServeConfig(model_dir=str(tmp_path / "model"))
    return dataclasses.replace(config, model_files=take_fingerprint(config))


def test_touching_and_copying_change_nothing(model: ServeConfig) -> None:
    files = list(Path(model.model_dir).iterdir())
    assert len(files) >= 7
    for path in files:
        os.utime(path, (LATER, LATER))
        copy = path.with_name("copy")
        shutil.copy(path, copy)
        copy.rename(path)  # another inode
    (Path(model.model_dir) / "README.md").touch()
    assert changed_files(model) == []


def edit(path: Path, position: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        file.write(data)


def edit_quietly(path: Path, old: str, new: str) -> None:
    """Change a text without changing the file's length or time."""
    status, text = path.stat(), path.read_text()
    assert len(old) == len(new)
    assert old in text
    path.write_text(text.replace(old, new))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (SHARD, lambda path: edit(path, path.stat().st_size - 2, b"\1\1")),
        (SHARD, lambda path: path.unlink()),
        (SHARD, lambda path: edit(path, path.stat().st_size, b"\0")),
        ("tokenizer.json", lambda path: edit_quietly(path, '"a"', '"A"')),
        ("chat_template.jinja", lambda path: edit_quietly(path, "user", "USER")),
        ("config.json", lambda path: edit_quietly(path, "1.8", "1.9")),
        ("generation_config.json", lambda path: path.write_text("{}")),
        ("model.safetensors.index.json", lambda path: path.unlink()),
    ],
)
def test_a_file_that_changed_is_named(
    model: ServeConfig, name: str, change: Callable[[Path], object]
) -> None:
    change(Path(model.model_dir) / name)
    assert changed_files(model) == [name]


def test_a_file_that_appears_is_named(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    template = tmp_path / "model/chat_template.jinja"
    template.rename(tmp_path / "other.jinja")
    config = ServeConfig(
        model_dir=str(tmp_path / "model"), chat_template=str(tmp_path / "other.jinja")
    )
    config = dataclasses.replace(config, model_files=take_fingerprint(config))
    shutil.copy(tmp_path / "other.jinja", template)
    (tmp_path / "other.jinja").write_text("none")
    assert changed_files(config) == ["chat_template.jinja", str(tmp_path / "other.jinja")]


def test_of_large_weights_the_beginning_of_each_tensor_counts_unless_all_was_hashed(
    tmp_path: Path,
) -> None:
    half = 40 << 20
    spans = {"a": [0, half], "b": [half, 2 * half]}
    header = json.dumps(
        {
            name: {"dtype": "U8", "shape": [half], "data_offsets": span}
            for name, span in spans.items()
        }
    ).encode()
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2 * half)  # no bytes on the disk
    config = ServeConfig(model_dir=str(tmp_path))
    sampled = dataclasses.replace(config, model_files=take_fingerprint(config))
    known = {str(path): make_stamp(path, whole=True)}
    hashed = dataclasses.replace(config, model_files=take_fingerprint(config, known))
    os.utime(path, (LATER, LATER))
    assert changed_files(sampled) == changed_files(hashed) == []
    middle = 8 + len(header) + half + half // 2
    edit(path, middle, b"\1")
    assert (changed_files(sampled), changed_files(hashed)) == ([], [path.name])
    edit(path, middle, b"\0")
    edit(path, 8 + len(header) + half, b"\1")
    assert changed_files(sampled) == changed_files(hashed) == [path.name]


def test_it_is_part_of_the_hash_that_processes_compare(model: ServeConfig, tmp_path: Path) -> None:
    edit(Path(model.model_dir) / SHARD, 3000, b"\1\2")
    later = dataclasses.replace(model, model_files=take_fingerprint(model))
    assert later.config_hash() != model.config_hash()
    model.save(tmp_path / CONFIG_FILE)
    assert ServeConfig.load(tmp_path / CONFIG_FILE) == model


@pytest.mark.parametrize("role", ["scheduler", "worker", "frontend"])
def test_no_process_starts_over_other_files(model: ServeConfig, tmp_path: Path, role: str) -> None:
    model.save(tmp_path / CONFIG_FILE)
    edit_quietly(Path(model.model_dir) / "tokenizer.json", '"a"', '"A"')
    with pytest.raises(ModelError, match=r"changed on disk.*: tokenizer\.json"):
        start_child(role, ["--runtime_dir", str(tmp_path)])
