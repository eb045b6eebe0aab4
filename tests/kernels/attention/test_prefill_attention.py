"""Backends give the same outputs and log-sum-exps; here those that are installed."""

from typing import Any

import pytest
import torch
from glimmer.kernels.attention import prefill_attention
from glimmer.kernels.attention.prefill_attention import attend_rows
from glimmer.kernels.attention.prefill_attention_triton import launch_attend_rows, launch_merge

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def test_one_row_needs_no_starts() -> None:
    q, k, v = torch.randn(3, 5, 2, 16, device=DEVICE)
    starts = torch.tensor([0, 5], device=DEVICE)
    without, lse = attend_rows(q, k, v, None, (5,), 0.3, "triton")
    out, other = attend_rows(q, k, v, starts, (5,), 0.3, "triton")
    torch.testing.assert_close(without, out)
    torch.testing.assert_close(lse, other)


class FakeFlashInfer:
    """Stands for FlashInfer's wrapper and for the event behind its plans; `done` says in which
    order they were used. Its log-sum-exps are to the base 2, [queries, heads]."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def synchronize(self) -> None:
        self.done.append("wait")

    def record(self) -> None:
        self.done.append("record")

    def plan(self, *_: Any, causal: bool, sm_scale: float, **__: Any) -> None:
        self.done.append("plan")
        self._causal, self._scale = causal, sm_scale

    def run(self, q: Any, k: Any, v: Any, return_lse: bool) -> Any:
        self.done.append("run")
        out, lse = launch_attend_rows(q, k, v, None, len(q), self._causal, self._scale)
        return out, (lse / torch.log(torch.tensor(2.0, device=lse.device))).t().contiguous()


def test_flashinfers_parts_merge_and_its_plans_wait_for_their_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A chunk behind a prefix, in two layers: the first one plans."""
    fakes = {causal: FakeFlashInfer() for causal in (True, False)}
    states = {causal: prefill_attention._FlashInfer(fake, fake) for causal, fake in fakes.items()}
    monkeypatch.setattr(prefill_attention, "_flashinfer_state", lambda _, causal: states[causal])
    for _ in range(2):
        q, k, v = torch.randn(3, 9, 2, 16, device=DEVICE)
        found = []
        for backend in ("triton", "flashinfer"):
            out, lse = attend_rows(q, k, v, None, (9,), 0.3, backend)
            part = attend_rows(q, k[:4], v[:4], None, None, 0.3, backend)
            lse = launch_merge(out, out, lse, *part)
            found.append((out, lse))
        for expected, got in zip(*found, strict=True):
            torch.testing.assert_close(got, expected)
    for fake in fakes.values():
        assert fake.done == ["wait", "plan", "record", "run", "run"]
    q, k, v = torch.randn(3, 7, 2, 16, device=DEVICE)
    attend_rows(q, k, v, None, (7,), 0.3, "flashinfer")
    assert fakes[True].done[-4:] == ["wait", "plan", "record", "run"]


@pytest.mark.gpu
def test_fa3_agrees_with_triton() -> None:
    pytest.importorskip("fa3_fwd_interface")
    lens = (130, 1, 77)
    q, k, v = torch.randn(3, sum(lens), 20, 256, device=DEVICE).bfloat16()
    starts = torch.tensor((0, *lens), device=DEVICE).cumsum(0)
    for args in ((starts, lens), (None, (sum(lens),)), (None, None)):
        expected, expected_lse = attend_rows(q, k, v, *args, 1 / 16, "triton")
        room = torch.empty_like(q)
        out, lse = attend_rows(q, k, v, *args, 1 / 16, "fa3", room)
        assert out.data_ptr() == room.data_ptr()
        torch.testing.assert_close(out.float(), expected.float(), atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(lse, expected_lse, atol=1e-3, rtol=1e-3)
