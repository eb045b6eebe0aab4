"""Bytes of files end up in the right rows and columns, in pieces of any size; broken files are
named."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from glimmer.shared.errors import ModelError
from glimmer.workers.weights import shard_reader
from glimmer.workers.weights.checkpoint import TensorEntry
from glimmer.workers.weights.shard_reader import WHOLE, Placement, read_tensors, same_bytes
from safetensors.torch import save_file

ALL = {
    "big": torch.arange(60_000).view(300, 200).to(torch.bfloat16),
    "bias": torch.randn(7),
    "norm": torch.randn(33).bfloat16(),
    "wide": torch.randn(3, 50_000, dtype=torch.float16),
}


@pytest.fixture
def entries(tmp_path: Path) -> dict[str, TensorEntry]:
    path = tmp_path / "a.safetensors"
    save_file(ALL, path)
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    found = {}
    for name, part in header.items():
        begin, end = part["data_offsets"]
        shape = tuple(part["shape"])
        found[name] = TensorEntry(path, part["dtype"], shape, 8 + size + begin, end - begin)
    return found


def read(jobs: Any, threads: int = 1, device: str = "cpu") -> list[tuple[int, int]]:
    reports: list[tuple[int, int]] = []
    where = torch.empty(0, device=device).device
    read_tensors(jobs, where, threads, lambda *r: reports.append(r))
    return reports


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("piece", [1, 1000, 30_000, 16 << 20])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_rows_and_columns_arrive(
    entries: dict[str, TensorEntry],
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype | None,
    piece: int,
    threads: int,
    device: str,
) -> None:
    monkeypatch.setattr(shard_reader, "_PIECE_BYTES", piece)
    jobs, wanted = [], []
    for name, rows, columns in (
        ("norm", WHOLE, WHOLE),
        ("big", slice(100, 299), WHOLE),
        ("bias", WHOLE, WHOLE),
        ("wide", WHOLE, slice(7, 49_000)),
    ):
        whole = ALL[name]
        part = whole[rows] if whole.dim() == 1 else whole[rows, columns]
        wanted.append(part.to(dtype or whole.dtype))
        target = torch.zeros_like(wanted[-1], device=device)
        jobs.append((name, entries[name], Placement(target, rows, columns)))
    reports = read(jobs, threads, device)
    for (_, _, place), part in zip(jobs, wanted, strict=True):
        assert torch.equal(place.target.cpu(), part)
    total = sum(t.nbytes for t in ALL.values()) - 101 * 400
    assert reports[0] == (0, total)
    assert reports[-1] == (total, total)
    assert [done for done, _ in reports] == sorted({done for done, _ in reports})


def test_nothing_to_read_is_done(entries: dict[str, TensorEntry]) -> None:
    assert read([]) == [(0, 0)]


@pytest.mark.parametrize("threads", [1, 3])
def test_a_file_cut_off_while_loading_is_named(
    entries: dict[str, TensorEntry], monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr(shard_reader, "_PIECE_BYTES", 10_000)
    path = entries["wide"].file
    path.write_bytes(path.read_bytes()[: entries["wide"].begin + 5])
    jobs = [(n, e, Placement(torch.empty(e.shape))) for n, e in entries.items()]
    with pytest.raises(ModelError, match=r"a\.safetensors: ends at byte \d+, .* tensor wide"):
        read(jobs, threads)
    path.unlink()
    with pytest.raises(ModelError, match=r"a\.safetensors: tensor \w+: .*No such file"):
        read(jobs, threads)


def test_a_failing_report_ends_the_threads(entries: dict[str, TensorEntry]) -> None:
    def refuse(done: int, total: int) -> None:
        if done:
            raise KeyError("launcher is gone")

    jobs = [(n, e, Placement(torch.empty(e.shape))) for n, e in entries.items()]
    with pytest.raises(KeyError):
        read_tensors(jobs, torch.device("cpu"), 3, refuse)


def test_equal_bytes_are_found(
    entries: dict[str, TensorEntry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_reader, "_PIECE_BYTES", 1000)
    big = entries["big"]
    other = TensorEntry(tmp_path / "b", big.dtype, big.shape, 3, big.num_bytes)
    data = big.file.read_bytes()[big.begin : big.begin + big.num_bytes]
    other.file.write_bytes(b"abc" + data)
    assert same_bytes(big, big)
    assert same_bytes(big, other)
    other.file.write_bytes(b"abc" + data[:-1] + bytes([data[-1] ^ 1]))
    assert not same_bytes(big, other)
    assert not same_bytes(big, entries["bias"])
    other.file.write_bytes(b"abc")
    with pytest.raises(ModelError, match="b: ends at byte 3"):
        same_bytes(big, other)
