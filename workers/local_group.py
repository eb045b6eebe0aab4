"""Exchanges between the ranks of one machine that compute on CPUs, without any network.

All ranks map one file in memory, in which each has two slots. In an exchange a rank copies its part
into its slot, sends one byte to every other rank over a Unix socket, waits for theirs, and reads
the slots. The slots take turns: a rank that starts exchange k + 2 has heard of all others that they
started exchange k + 1, so they have read the slots of exchange k.

Rank 0 makes the file and a socket pair for each two ranks, and passes them on over a socket in the
runtime directory. They have no names, so no other user can open them and nothing is left behind.
"""

import contextlib
import itertools
import mmap
import os
import select
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

_SLOT_BYTES = 4 << 20  # larger tensors are exchanged piece by piece
_RETRY_S = 0.01
_BELL = b"\0"


class LocalGroup:
    """This rank's end of a group: a connection to each other rank, and the slots of all.

    Every rank must make the same calls in the same order. A call raises RuntimeError when a rank
    is gone, or does not come within the time limit; then the group must not be used again.
    """

    def __init__(
        self, rank: int, links: dict[int, socket.socket], memory_fd: int, timeout_s: float
    ) -> None:
        """`links`: rank -> connected socket, of all other ranks. `memory_fd` is closed."""
        size = len(links) + 1
        self._rank, self._links, self._timeout_s = rank, links, timeout_s
        self._ranks = {link.fileno(): peer for peer, link in links.items()}
        region = mmap.mmap(memory_fd, 2 * size * _SLOT_BYTES)
        os.close(memory_fd)
        self._slots = torch.frombuffer(region, dtype=torch.uint8).view(2, size, _SLOT_BYTES)
        self._turn = 0

    def close(self) -> None:
        """Leave: the next call of another rank fails."""
        for link in self._links.values():
            link.close()

    def all_reduce(self, x: Tensor) -> None:
        """Sum x over ranks, in place. Every rank adds in the order of ranks, so all get the same
        bits."""

        def add(part: Tensor, parts: Sequence[Tensor]) -> None:
            torch.add(parts[0], parts[1], out=part)
            for other in parts[2:]:
                part.add_(other)

        self._exchange(x, add)

    def broadcast(self, x: Tensor) -> None:
        """Rank 0's x everywhere, in place."""
        self._exchange(x, lambda part, parts: part.copy_(parts[0]))

    def gather(self, x: Tensor) -> list[Tensor] | None:
        """The x of every rank, all of one shape, on rank 0; None on the others."""
        if self._rank:
            self._exchange(x, lambda part, parts: None)
            return None
        found = [torch.empty(x.numel(), dtype=x.dtype) for _ in range(len(self._links) + 1)]
        done = 0

        def collect(part: Tensor, parts: Sequence[Tensor]) -> None:
            nonlocal done
            for whole, other in zip(found, parts, strict=True):
                whole[done : done + len(part)] = other
            done += len(part)

        self._exchange(x, collect)
        return [whole.view(x.shape) for whole in found]

    def _exchange(self, x: Tensor, use: Callable[[Tensor, Sequence[Tensor]], object]) -> None:
        """Call `use` for each piece of x, with the pieces of all ranks. It may write to the piece,
        which changes x."""
        flat = x.contiguous().view(-1)
        for part in flat.split(_SLOT_BYTES // x.element_size()):
            num_bytes = part.numel() * part.element_size()
            slots = self._slots[self._turn]
            parts = [slot[:num_bytes].view(x.dtype) for slot in slots]
            self._turn = 1 - self._turn
            parts[self._rank].copy_(part)
            self._meet()
            use(part, parts)
        if flat.data_ptr() != x.data_ptr():
            x.copy_(flat.view(x.shape))

    def _meet(self) -> None:
        """Tell the other ranks that this one has come, and wait until all have."""
        for peer, link in self._links.items():
            try:
                link.send(_BELL)
            except OSError as error:
                raise RuntimeError(f"rank {peer} is gone: {error}") from error
        waiting = dict(self._ranks)
        deadline = time.monotonic() + self._timeout_s
        while waiting:
            poller = select.poll()
            for fd in waiting:
                poller.register(fd, select.POLLIN)
            events = poller.poll(max(0.0, deadline - time.monotonic()) * 1000)
            if not events:
                raise RuntimeError(f"no answer of ranks {sorted(waiting.values())} within the time")
            for fd, _ in events:
                self._hear(waiting.pop(fd))

    def _hear(self, peer: int) -> None:
        with contextlib.suppress(OSError):
            if self._links[peer].recv(1):
                return
        raise RuntimeError(f"rank {peer} is gone")


def join_local(rank: int, size: int, path: Path, timeout_s: float) -> LocalGroup:
    """Meet the other ranks at the socket `path`, which rank 0 makes and removes. Raises
    RuntimeError when they do not come within the time limit."""
    deadline = time.monotonic() + timeout_s
    try:
        return (_invite if rank == 0 else _accept)(rank, size, path, deadline, timeout_s)
    except OSError as error:
        raise RuntimeError(f"rank {rank} did not meet the others: {error}") from error


def _invite(rank: int, size: int, path: Path, deadline: float, timeout_s: float) -> LocalGroup:
    """Wait for all other ranks, then give each the memory and its links."""
    memory_fd = os.memfd_create("glimmer-ranks")
    os.truncate(memory_fd, 2 * size * _SLOT_BYTES)
    guests: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        stack.callback(path.unlink, missing_ok=True)
        listener.listen(size)
        while len(guests) < size - 1:
            listener.settimeout(max(_RETRY_S, deadline - time.monotonic()))
            guest = stack.enter_context(listener.accept()[0])
            guest.settimeout(max(_RETRY_S, deadline - time.monotonic()))
            peer = int.from_bytes(guest.recv(4))
            if not 0 < peer < size:
                raise OSError("a rank left while the others were still to come")
            guests[peer] = guest
        pairs = {}
        for low, high in itertools.combinations(range(size), 2):
            pairs[low, high], pairs[high, low] = socket.socketpair()
        for peer, guest in guests.items():
            theirs = [pairs[peer, other] for other in range(size) if other != peer]
            with contextlib.ExitStack() as given:
                for link in theirs:
                    given.enter_context(link)
                fds = [memory_fd, *(link.fileno() for link in theirs)]
                socket.send_fds(guest, [_BELL], fds)
    return LocalGroup(rank, {peer: pairs[0, peer] for peer in guests}, memory_fd, timeout_s)


def _accept(rank: int, size: int, path: Path, deadline: float, timeout_s: float) -> LocalGroup:
    """Go to rank 0, which may come later, and take what it gives."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as host:
        while True:
            try:
                host.connect(str(path))
                break
            except (FileNotFoundError, ConnectionRefusedError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(_RETRY_S)
        host.settimeout(max(_RETRY_S, deadline - time.monotonic()))
        host.send(rank.to_bytes(4))
        _, fds, _, _ = socket.recv_fds(host, 1, size)
    if len(fds) != size:
        raise OSError("rank 0 is gone")
    links = [socket.socket(fileno=fd) for fd in fds[1:]]
    others = [other for other in range(size) if other != rank]
    return LocalGroup(rank, dict(zip(others, links, strict=True)), fds[0], timeout_s)
