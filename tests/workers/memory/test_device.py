"""Copies arrive whole, on the CPU at once and on a card in stream order."""

import pytest
import torch
from glimmer.workers.memory.device import HostCopy, ints_to_device, is_out_of_memory, to_device

CUDA = torch.device("cuda")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_there_and_back(device: str) -> None:
    values = [[1, 2, 3], [4, 5, 6]]
    there = to_device(values, torch.int64, device)
    assert (there.device.type, there.dtype) == (device, torch.int64)
    copy = HostCopy([there, there.float() / 2], there.device)
    whole, halves = copy.wait()
    assert copy.is_done
    assert whole.tolist() == values
    assert halves.tolist() == [[0.5, 1, 1.5], [2, 2.5, 3]]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_run_of_integers(device: str) -> None:
    values = [5, -1, 1 << 40]
    there = ints_to_device(values, device)
    assert (there.device.type, there.dtype) == (device, torch.int64)
    assert there.tolist() == values


def test_nothing_to_copy_is_done_when_the_card_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that samples nothing has not run because it was launched."""

    class Event:
        waited = False

        def record(self) -> None: ...

        def query(self) -> bool:
            return self.waited

        def synchronize(self) -> None:
            self.waited = True

    monkeypatch.setattr(torch.cuda, "Event", Event)
    copy = HostCopy([], CUDA)
    assert not copy.is_done
    assert copy.wait() == []
    assert copy.is_done


@pytest.mark.gpu
def test_a_copy_is_not_waited_for() -> None:
    for _ in range(2):  # pinned memory is allocated by the first ones, which does wait
        HostCopy([to_device([7], torch.int64, "cuda") + 1], CUDA).wait()
    torch.cuda._sleep(500_000_000)  # clock cycles
    copy = HostCopy([to_device([7], torch.int64, "cuda") + 1], CUDA)
    assert not copy.is_done
    nothing = HostCopy([], CUDA)
    assert not nothing.is_done
    assert copy.wait()[0].tolist() == [8]
    assert nothing.wait() == []
    assert nothing.is_done


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_lack_of_memory_has_many_words(error: RuntimeError, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
