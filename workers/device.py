"""Copies between host and device that nobody waits for."""

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(values: Sequence[object], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A tensor of (nested) host numbers. On CUDA from pinned memory, in stream order: the host
    goes on at once, and the allocator keeps the pinned memory until the copy is done."""
    if torch.device(device).type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


class HostCopy:
    """Device tensors on their way to the host, in stream order."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = list(tensors)
        if any(tensor.is_cuda for tensor in tensors):
            self._host = [_start(tensor) for tensor in tensors]
            self._event = torch.cuda.Event()
            self._event.record()

    @property
    def is_done(self) -> bool:
        """Whether `wait` would return at once."""
        return self._event is None or self._event.query()

    def wait(self) -> list[Tensor]:
        """The tensors on the host, in the order given."""
        if self._event is not None:
            self._event.synchronize()
        return self._host


def _start(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
