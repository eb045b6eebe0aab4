"""Copies arrive whole, on the CPU at once and on a card in stream order."""

import pytest
import torch
from glimmer.workers.device import HostCopy, to_device


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_there_and_back(device: str) -> None:
    values = [[1, 2, 3], [4, 5, 6]]
    there = to_device(values, torch.int64, device)
    assert (there.device.type, there.dtype) == (device, torch.int64)
    copy = HostCopy([there, there.float() / 2])
    whole, halves = copy.wait()
    assert copy.is_done
    assert whole.tolist() == values
    assert halves.tolist() == [[0.5, 1, 1.5], [2, 2.5, 3]]


@pytest.mark.gpu
def test_a_copy_is_not_waited_for() -> None:
    for _ in range(2):  # pinned memory is allocated by the first ones, which does wait
        HostCopy([to_device([7], torch.int64, "cuda") + 1]).wait()
    torch.cuda._sleep(500_000_000)  # clock cycles
    copy = HostCopy([to_device([7], torch.int64, "cuda") + 1])
    assert not copy.is_done
    assert copy.wait()[0].tolist() == [8]
