"""A bad checkpoint is refused by name from its headers alone, before anything is allocated."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from glimmer.shared.config import ServeConfig
from glimmer.shared.errors import ModelError
from glimmer.shared.model_spec import load_model_spec
from glimmer.workers.startup import load_runner
from glimmer.workers.weights.checkpoint import INDEX_FILE, check_draft, check_weights
from safetensors import safe_open
from safetensors.torch import save_file

SHARD = "model-00002-of-00002.safetensors"
NORM = "model.layers.1.input_layernorm.weight"
EXPERT = "model.layers.2.mlp.experts.3.up_proj.weight"


@pytest.fixture
def broken(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def check(path: Path) -> Any:
    return check_weights(path, load_model_spec(path))


def shard_of(path: Path, name: str) -> str:
    file: str = json.loads((path / INDEX_FILE).read_text())["weight_map"][name]
    return file


def rewrite(path: Path, file: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of one shard, leaving the index as it is."""
    with safe_open(path / file, "pt") as source:
        tensors = {name: source.get_tensor(name) for name in source.keys()}  # noqa: SIM118
    change(tensors)
    save_file(tensors, path / file)


def edit_index(path: Path, change: Callable[[dict[str, str]], Any]) -> None:
    index = json.loads((path / INDEX_FILE).read_text())
    change(index["weight_map"])
    (path / INDEX_FILE).write_text(json.dumps(index))


def drop_everywhere(path: Path, chosen: Callable[[str], bool]) -> list[str]:
    """Remove tensors from their files and from the index."""
    names = [n for n in json.loads((path / INDEX_FILE).read_text())["weight_map"] if chosen(n)]
    for file in {shard_of(path, name) for name in names}:
        rewrite(path, file, lambda tensors: [tensors.pop(n, None) for n in names])
    edit_index(path, lambda table: [table.pop(n) for n in names])
    return names


def test_real_layout_passes_and_leaves_nextn_out(tiny_model: Path) -> None:
    index = check(tiny_model)
    assert index.has_nextn
    assert not [name for name in index.tensors if name.startswith("model.layers.4.")]
    assert index.tensors[NORM].shape == (128,)
    assert index.num_bytes == sum(entry.num_bytes for entry in index.tensors.values())


def test_a_checkpoint_saved_by_transformers_passes(make_reference: Any) -> None:
    path = make_reference("plain").path
    config = json.loads((path / "config.json").read_text())
    assert config.get("num_nextn_predict_layers") is None
    assert not check(path).has_nextn


def test_without_any_nextn_tensor_it_passes_with_a_warning(
    broken: Path, caplog: pytest.LogCaptureFixture
) -> None:
    drop_everywhere(broken, lambda name: name.startswith("model.layers.4."))
    assert not check(broken).has_nextn
    assert "no NextN layer" in caplog.text


def test_copies_of_embedding_and_head_in_the_nextn_layer_may_be_left_out(broken: Path) -> None:
    dropped = drop_everywhere(
        broken, lambda n: n.startswith("model.layers.4.") and ("embed" in n or "head.head" in n)
    )
    assert len(dropped) == 2
    assert check(broken).has_nextn


def spoil_partial_nextn(path: Path) -> tuple[str, str]:
    drop_everywhere(path, lambda name: name == "model.layers.4.eh_proj.weight")
    return "", "model.layers.4.eh_proj.weight is missing"


def spoil_missing(path: Path) -> tuple[str, str]:
    drop_everywhere(path, lambda name: name == EXPERT)
    return "", f"{EXPERT} is missing"


def spoil_missing_but_indexed(path: Path) -> tuple[str, str]:
    file = shard_of(path, EXPERT)
    rewrite(path, file, lambda tensors: tensors.pop(EXPERT))
    return file, f"{EXPERT} is missing"


def spoil_extra(path: Path) -> tuple[str, str]:
    rewrite(path, SHARD, lambda t: t.update({"model.extra": torch.zeros(1)}))
    edit_index(path, lambda m: m.update({"model.extra": SHARD}))
    return SHARD, "model.extra is not part"


def spoil_extra_unindexed(path: Path) -> tuple[str, str]:
    rewrite(path, SHARD, lambda t: t.update({"model.extra": torch.zeros(1)}))
    return SHARD, "model.extra, which"


def spoil_shape(path: Path) -> tuple[str, str]:
    file = shard_of(path, EXPERT)
    rewrite(path, file, lambda t: t.update({EXPERT: t[EXPERT].T.contiguous()}))
    return file, f"{EXPERT} has shape (128, 64), expected (64, 128)"


def spoil_dtype(path: Path) -> tuple[str, str]:
    file = shard_of(path, NORM)
    rewrite(path, file, lambda t: t.update({NORM: t[NORM].float()}))
    return file, f"{NORM} is F32, expected BF16"


def spoil_truncated(path: Path) -> tuple[str, str]:
    data = (path / SHARD).read_bytes()
    (path / SHARD).write_bytes(data[:-1])
    return SHARD, "truncated: tensor model.layers."


def spoil_truncated_header(path: Path) -> tuple[str, str]:
    (path / SHARD).write_bytes((path / SHARD).read_bytes()[:100])
    return SHARD, "truncated?"


def spoil_empty_file(path: Path) -> tuple[str, str]:
    (path / SHARD).write_bytes(b"")
    return SHARD, "truncated?"


def spoil_trailing_bytes(path: Path) -> tuple[str, str]:
    (path / SHARD).write_bytes((path / SHARD).read_bytes() + b"123")
    return SHARD, "3 bytes after the last tensor"


def spoil_missing_shard(path: Path) -> tuple[str, str]:
    (path / SHARD).unlink()
    return SHARD, "is missing"


def spoil_index_names_absent_file(path: Path) -> tuple[str, str]:
    edit_index(path, lambda m: m.update({NORM: "model-00003-of-00002.safetensors"}))
    return "model-00003-of-00002.safetensors", NORM


def spoil_stray_shard(path: Path) -> tuple[str, str]:
    shutil.copy(path / SHARD, path / "model-00009-of-00009.safetensors")
    return "model-00009-of-00009.safetensors", "is not in"


def spoil_index_leaves_directory(path: Path) -> tuple[str, str]:
    edit_index(path, lambda m: m.update({NORM: "../other.safetensors"}))
    return INDEX_FILE, NORM


def spoil_index_syntax(path: Path) -> tuple[str, str]:
    (path / INDEX_FILE).write_text("{")
    return INDEX_FILE, "not an index"


def spoil_no_weights(path: Path) -> tuple[str, str]:
    for file in [*path.glob("*.safetensors"), path / INDEX_FILE]:
        file.unlink()
    return "model.safetensors", "neither"


def spoil_header_entry(path: Path) -> tuple[str, str]:
    header = json.dumps({NORM: {"dtype": "BF16", "shape": ["x"], "data_offsets": [0, 1]}}).encode()
    (path / SHARD).write_bytes(len(header).to_bytes(8, "little") + header + b"0")
    return SHARD, NORM


def spoil_overlap(path: Path) -> tuple[str, str]:
    part = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"a": part, "b": part}).encode()
    (path / SHARD).write_bytes(len(header).to_bytes(8, "little") + header + b"0123")
    return SHARD, "tensor b begins at 0, expected 4"


SPOILS = [value for key, value in sorted(globals().items()) if key.startswith("spoil_")]


@pytest.mark.parametrize("spoil", SPOILS, ids=lambda f: f.__name__.removeprefix("spoil_"))
def test_each_fault_is_named_before_allocation(
    broken: Path,
    tmp_path: Path,
    spoil: Callable[[Path], tuple[str, str]],
    config_of: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, said = spoil(broken)
    with pytest.raises(ModelError) as caught:
        check(broken)
    assert said in str(caught.value)
    assert file in str(caught.value)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("allocated")

    monkeypatch.setattr("glimmer.workers.weights.weights._allocate", refuse)
    with pytest.raises(ModelError):
        load_runner(config_of(broken), 0, 0, tmp_path, lambda *_: None)


def test_the_check_imports_no_torch() -> None:
    code = "import sys, glimmer.workers.weights.checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def check_draft_of(path: Path, **changes: Any) -> Any:
    config = ServeConfig(model_dir=str(path), mtp_mode="eagle_with_att", **changes)
    return check_draft(config, load_model_spec(path))


def test_a_draft_needs_nothing_but_its_layer(
    tiny_model: Path, broken: Path, caplog: pytest.LogCaptureFixture
) -> None:
    drop_everywhere(broken, lambda name: not name.startswith("model.layers.4."))
    for dirs in ((str(broken),), (str(broken), str(tiny_model))):
        found = check_draft_of(tiny_model, mtp_draft_model_dir=dirs)
        assert found.keys() == check_draft_of(tiny_model).keys()
        assert {entry.file.parent for entry in found.values()} == {broken}
    assert "the first directory" in caplog.text


def test_faults_of_a_draft_are_named(tiny_model: Path, broken: Path) -> None:
    name = "model.layers.4.hnorm.weight"
    file = shard_of(broken, name)
    rewrite(broken, file, lambda t: t.update({name: t[name][:5].clone()}))
    with pytest.raises(ModelError, match=f"{file}: tensor {name} has shape"):
        check_draft_of(tiny_model, mtp_draft_model_dir=(str(broken),))
    drop_everywhere(broken, lambda name: name.startswith("model.layers.4."))
    with pytest.raises(ModelError, match=r"model\.layers\.4.* missing: --mtp_mode needs"):
        check_draft_of(tiny_model, mtp_draft_model_dir=(str(broken),))


@pytest.mark.parametrize("kind", ["many tensors", "long header", "nested", "huge shape"])
def test_headers_beyond_all_limits_are_refused(broken: Path, kind: str) -> None:
    entry = {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]}
    header = {
        "many tensors": lambda: json.dumps({str(n): entry for n in range(200_001)}),
        "long header": lambda: " " * (33 << 20) + "{}",
        "nested": lambda: '{"a":' * 100_000,
        "huge shape": lambda: json.dumps({"a": {**entry, "shape": [10**300] * 1000}}),
    }[kind]().encode()
    (broken / SHARD).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ModelError, match=SHARD):
        check(broken)


def test_an_index_beyond_all_limits_is_refused(broken: Path) -> None:
    for text in (" " * (33 << 20), "[" * 100_000):
        (broken / INDEX_FILE).write_text(text)
        with pytest.raises(ModelError, match=INDEX_FILE):
            check(broken)
