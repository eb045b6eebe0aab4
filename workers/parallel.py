"""Tensor parallelism: how weights are split over ranks, and the three exchanges of a step.

Heads, MLP widths and the head's vocabulary are split; everything else, the latent KV included, is
replicated. Rank 0 alone samples and tells the others, so ranks cannot drift apart. One machine
only: NCCL between GPUs, shared memory on CPUs (`local_group.py`).
"""

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore

from ..shared.errors import ConfigError
from ..shared.model_spec import ModelSpec
from .local_group import LocalGroup, join_local


@dataclass(frozen=True)
class Ranks:
    """This rank's number in its group. `group` is None when it is alone."""

    rank: int = 0
    size: int = 1
    group: Any = None  # a LocalGroup or torch's ProcessGroupNCCL, which has no types

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place; returns x."""
        if isinstance(self.group, LocalGroup):
            self.group.all_reduce(x)
        elif self.group is not None:
            _wait(self.group.allreduce([x], _in_order(dist.AllreduceOptions())))
        return x

    def part_of(self, stream: Tensor) -> Tensor:
        """The tensor to which a rank adds its part of a sum over ranks; see `add_up`."""
        return stream if self.group is None else torch.zeros_like(stream)

    def add_up(self, part: Tensor, stream: Tensor) -> None:
        """Add the parts of all ranks to `stream`. `part` is from `part_of`; a rank that is alone
        has added to the stream itself."""
        if self.group is not None:
            stream.add_(self.all_reduce(part))

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's x everywhere, in place; returns x."""
        if isinstance(self.group, LocalGroup):
            self.group.broadcast(x)
        elif self.group is not None:
            _wait(self.group.broadcast([x], _in_order(dist.BroadcastOptions())))
        return x

    def gather_columns(self, x: Tensor) -> Tensor | None:
        """[n, width] of each rank -> [n, size * width] on rank 0, None on the others."""
        if self.group is None:
            return x
        if isinstance(self.group, LocalGroup):
            found = self.group.gather(x)
            return None if found is None else torch.cat(found, dim=1)
        parts = [[torch.empty_like(x) for _ in range(self.size)]] if self.rank == 0 else []
        _wait(self.group.gather(parts, [x.contiguous()], _in_order(dist.GatherOptions())))
        return torch.cat(parts[0], dim=1) if self.rank == 0 else None

    def split(self, size: int) -> slice:
        """This rank's share of `size` rows; the last ranks get less if it does not divide."""
        share = -(-size // self.size)
        return slice(min(size, self.rank * share), min(size, (self.rank + 1) * share))


def _in_order(options: Any) -> Any:
    """Run NCCL on the current stream. By default it has its own stream, for which the current one
    waits, and its own thread, which releases tensors some time later."""
    options.asyncOp = False
    return options


def _wait(work: Any) -> None:
    """On CUDA the host does not wait, and there may be no work object."""
    if work is not None:
        work.wait()


def join_ranks(
    rank: int, size: int, epoch: int, runtime_dir: Path, timeout_s: float, device: str = "cpu"
) -> Ranks:
    """Meet the other ranks of this epoch. `timeout_s` bounds the meeting and every exchange after
    it; RuntimeError when it passes or a rank is gone. On CUDA each rank needs a card of its own,
    and exchanges are in stream order: the host does not wait for them."""
    if size == 1:
        return Ranks()
    path = runtime_dir / f"ranks-{epoch}"
    if device == "cpu":
        return Ranks(rank, size, join_local(rank, size, path, timeout_s))
    timeout = timedelta(seconds=timeout_s)
    store = FileStore(str(path), size)
    store.set_timeout(timeout)
    return Ranks(rank, size, _nccl(store, rank, size, timeout, device))


def _nccl(store: FileStore, rank: int, size: int, timeout: timedelta, device: str) -> Any:
    nccl: Any = getattr(dist, "ProcessGroupNCCL")  # noqa: B009 - absent from CPU builds
    options = nccl.Options()
    options._timeout = timeout
    group = nccl(store, rank, size, options)
    # Makes the communicator, now and not in the first step.
    Ranks(rank, size, group).all_reduce(torch.zeros(1, device=device))
    torch.cuda.synchronize()
    return group


def rank_device(device: str, rank: int) -> str:
    """The device of a rank: "cpu", or its card as "cuda:<rank>", which becomes the current one.
    Raises ConfigError if there are fewer cards."""
    if device == "cpu":
        return device
    count = torch.cuda.device_count()
    if rank >= count:
        raise ConfigError(f"rank {rank} has no GPU: {count} are visible; lower --tp to {count}")
    torch.cuda.set_device(rank)
    return f"cuda:{rank}"


def check_split(spec: ModelSpec, tp: int) -> None:
    """Raises ConfigError naming `tp` and the dimension it does not divide."""
    dims = {"num_attention_heads": spec.num_heads}
    if spec.first_dense_layers:
        dims["intermediate_size"] = spec.intermediate_size
    if spec.first_dense_layers < spec.num_layers:
        dims["moe_intermediate_size"] = spec.moe_intermediate_size
    for name, size in dims.items():
        if tp < 1 or size % tp:
            raise ConfigError(f"--tp {tp} must divide {name} {size}")
