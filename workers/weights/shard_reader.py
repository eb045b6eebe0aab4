"""Reads tensors of checkpoint files into tensors of any device, as fast as files can be read.

Knows bytes, not models. The files are cut into pieces of a few MB in the order of their bytes;
threads take one piece after the other, read it into a small buffer of their own and copy from
there. On CUDA buffers are pinned and each thread has a stream, so that copies overlap with reading.
"""

import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import torch
from torch import Tensor

from ...shared.errors import ModelError
from .checkpoint import TensorEntry

WHOLE = slice(None)
_PIECE_BYTES = 16 << 20
_BUFFERS = 2  # per thread: one is read into while the other is copied from
_STAGING_BYTES = 1 << 30  # of all buffers together
_REPORTS = 200
_TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

Report = Callable[[int, int], None]  # (bytes done, bytes in total)

logger = logging.getLogger(__name__)


class Placement(NamedTuple):
    """`target` [rows] or [rows, columns] takes rows `rows` and columns `columns` of a tensor."""

    target: Tensor
    rows: slice = WHOLE
    columns: slice = WHOLE


class _Part(NamedTuple):
    """Rows of one tensor that lie in one piece."""

    name: str
    file: Path
    begin: int  # in the file
    num_bytes: int
    dtype: torch.dtype
    target: Tensor
    columns: slice


def read_tensors(
    jobs: Iterable[tuple[str, TensorEntry, Placement]],
    device: torch.device,
    num_threads: int,
    report: Report,
) -> None:
    """Fill the targets, converting to their types. Returns when everything is on the device.

    `report` is called in the calling thread. Raises ModelError naming file and tensor when a file
    cannot be read or ends early; then targets are partly filled.
    """
    started = time.monotonic()
    limit = min(_PIECE_BYTES, _STAGING_BYTES // (_BUFFERS * num_threads))
    parts = [part for job in jobs for part in _parts(*job, limit)]
    pieces = deque(_pieces(sorted(parts, key=lambda part: (part.file, part.begin)), limit))
    total = sum(part.num_bytes for part in parts)
    largest = max(map(_size, pieces), default=0)
    num_threads = min(num_threads, len(pieces))
    finished: SimpleQueue[int] = SimpleQueue()
    report(0, total)
    with ThreadPoolExecutor(max(1, num_threads)) as pool:
        try:
            readers = [
                pool.submit(_read_pieces, pieces, device, largest, finished.put)
                for _ in range(num_threads)
            ]
            _follow(finished, num_threads, total, report)
        finally:
            pieces.clear()  # on any error: readers stop after their current piece
    for reader in readers:
        reader.result()
    if device.type == "cuda":  # give back the memory of staging
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()
    seconds = max(time.monotonic() - started, 1e-9)
    rate = total / seconds / 1e9
    logger.info("read %.2f GB in %.1f s: %.2f GB/s", total / 1e9, seconds, rate)


def same_bytes(one: TensorEntry, other: TensorEntry) -> bool:
    """Whether two tensors of files are equal to the byte. Raises ModelError as `read_tensors`."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    buffers = [torch.empty(min(_PIECE_BYTES, one.num_bytes), dtype=torch.uint8) for _ in range(2)]
    for done in range(0, one.num_bytes, _PIECE_BYTES):
        size = min(_PIECE_BYTES, one.num_bytes - done)
        for entry, buffer in zip((one, other), buffers, strict=True):
            _fill(buffer[:size], entry.file, entry.begin + done, f"{entry.shape}")
        if not torch.equal(buffers[0][:size], buffers[1][:size]):
            return False
    return True


def _parts(name: str, entry: TensorEntry, place: Placement, limit: int) -> Iterator[_Part]:
    """The wanted rows, so many at a time that each part is at most `limit` bytes or one row."""
    rows = range(*place.rows.indices(entry.shape[0]))
    row_bytes = entry.num_bytes // entry.shape[0]
    step = max(1, limit // row_bytes)
    for first in range(rows.start, rows.stop, step):
        count = min(step, rows.stop - first)
        target = place.target[first - rows.start :][:count]
        begin, size = entry.begin + first * row_bytes, count * row_bytes
        dtype = _TORCH_DTYPES[entry.dtype]
        yield _Part(name, entry.file, begin, size, dtype, target, place.columns)


def _pieces(parts: Iterable[_Part], limit: int) -> Iterator[list[_Part]]:
    """Runs of parts without gaps in between, aligned so that their bytes can be viewed in place."""
    piece: list[_Part] = []
    for part in parts:
        if piece:
            begin, end = piece[0].begin, piece[-1].begin + piece[-1].num_bytes
            adjoins = (piece[0].file, end) == (part.file, part.begin)
            aligned = (part.begin - begin) % part.dtype.itemsize == 0
            if not (adjoins and aligned and _size(piece) + part.num_bytes <= limit):
                yield piece
                piece = []
        piece.append(part)
    if piece:
        yield piece


def _size(piece: list[_Part]) -> int:
    return sum(part.num_bytes for part in piece)


def _follow(finished: "SimpleQueue[int]", num_readers: int, total: int, report: Report) -> None:
    """Sum up sizes of finished pieces until each reader has said 0, its end."""
    done = reported = 0
    while num_readers:
        size = finished.get()
        num_readers -= size == 0
        done += size
        if done - reported > total // _REPORTS or reported < done == total:
            reported = done
            report(done, total)


def _read_pieces(
    pieces: deque[list[_Part]],
    device: torch.device,
    buffer_bytes: int,
    finished: Callable[[int], None],
) -> None:
    """One thread."""
    try:
        staging = _Staging(device, buffer_bytes)
        while (piece := _take(pieces)) is not None:
            staging.load(piece)
            finished(_size(piece))
        staging.wait()
    except BaseException:
        pieces.clear()  # the others need not go on
        raise
    finally:
        finished(0)


def _take(pieces: deque[list[_Part]]) -> list[_Part] | None:
    try:
        return pieces.popleft()
    except IndexError:
        return None


class _Staging:
    """The buffers of one thread and, on CUDA, the stream that empties them."""

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        """`device` with its index."""
        on_gpu = device.type == "cuda"
        self._stream: torch.cuda.Stream | None = None
        self._emptied: list[torch.cuda.Event] = []
        if on_gpu:
            torch.cuda.set_device(device)  # a thread begins with the first one
            self._stream = torch.cuda.Stream(device)
            # Work queued on the main stream may still use the targets' memory.
            self._stream.wait_stream(torch.cuda.default_stream(device))
            self._emptied = [torch.cuda.Event() for _ in range(_BUFFERS)]
        self._buffers = [
            torch.empty(num_bytes, dtype=torch.uint8, pin_memory=on_gpu)
            for _ in range(_BUFFERS if on_gpu else 1)
        ]
        self._turn = 0

    def load(self, piece: list[_Part]) -> None:
        self._turn = (self._turn + 1) % len(self._buffers)
        buffer = self._buffers[self._turn]
        if self._emptied:
            self._emptied[self._turn].synchronize()
        first = piece[0]
        _fill(buffer[: _size(piece)], first.file, first.begin, first.name)
        with self._copying():
            for part in piece:
                begin = part.begin - first.begin
                _copy(buffer[begin : begin + part.num_bytes].view(part.dtype), part)
        if self._stream is not None:
            self._emptied[self._turn].record(self._stream)

    def wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    def _copying(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def _fill(buffer: Tensor, file: Path, begin: int, name: str) -> None:
    """`buffer` [n] uint8 from byte `begin` of the file, where tensor `name` lies."""
    rest: memoryview = buffer.numpy().data
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while rest:
                count = os.preadv(descriptor, [rest], begin)
                if count == 0:
                    raise ModelError(f"{file}: ends at byte {begin}, in or behind tensor {name}")
                rest, begin = rest[count:], begin + count
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ModelError(f"{file}: tensor {name}: {error}") from error


def _copy(source: Tensor, part: _Part) -> None:
    """source [n]: the part's values."""
    target = part.target
    if target.dim() > 1:
        source = source.view(len(target), -1)
    if target.is_cuda and (source.dtype != target.dtype or part.columns != WHOLE):
        # To be converted or cut over there: it is quicker, and only plain copies are asynchronous.
        source = source.to(target.device, non_blocking=True)
    if part.columns != WHOLE:
        source = source[:, part.columns]
    target.copy_(source, non_blocking=True)
