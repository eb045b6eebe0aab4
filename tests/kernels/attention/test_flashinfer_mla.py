"""FlashInfer's planned decode: when there is one, and that it computes the same on a card."""

import logging
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from glimmer.kernels.attention import flashinfer_mla
from glimmer.kernels.attention.flashinfer_mla import FlashInferDecode, flashinfer_decode
from glimmer.kernels.attention.mla_decode import mla_decode
from glimmer.kernels.attention.paged_rows import PagedRows

CARD = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
SCALE = 0.0625


@pytest.mark.parametrize("asked", ["auto", "triton", "torch"])
def test_other_backends_plan_nothing(asked: str) -> None:
    queries = torch.zeros(0, 20, 576, dtype=torch.bfloat16)
    table = torch.zeros(1, 1, dtype=torch.int32)
    assert flashinfer_decode(asked, table, 64, queries, 512, SCALE) is None


def test_where_it_has_no_kernel_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    table = torch.zeros(1, 1, dtype=torch.int32)
    with caplog.at_level(logging.WARNING):
        found = flashinfer_decode("flashinfer", table, 64, torch.zeros(0, 4, 96), 64, SCALE)
    assert found is None
    assert "torch decodes" in caplog.text


def test_plans_name_rows_pages_and_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[list[Any]] = []

    class Wrapper:
        def __init__(self, *args: Any, **options: Any) -> None: ...

        def plan(self, *args: Any) -> None:
            plans.append([arg.tolist() if isinstance(arg, torch.Tensor) else arg for arg in args])

    class Module:
        BatchMLAPagedAttentionWrapper = Wrapper

    class Event:
        def synchronize(self) -> None: ...
        def record(self) -> None: ...

    monkeypatch.setattr(flashinfer_mla, "import_module", lambda name: Module)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    decode = FlashInferDecode(torch.zeros(4, 10, dtype=torch.int32), 64, 20, SCALE)
    decode.plan([2, 0], [70, 5], torch.bfloat16)
    starts, pages, none, lengths, *_ = plans[0]
    assert starts == [0, 1, 2, 2, 2]
    assert (pages[:2], none, lengths) == ([20, 0], [], [70, 5, 0, 0])


@pytest.mark.gpu
@pytest.mark.skipif(not CARD or find_spec("flashinfer") is None, reason="needs Hopper, FlashInfer")
def test_matches_the_reference_and_graphs_follow_plans() -> None:
    num_rows, pages, heads = 40, 60, 20
    kv = torch.randn(num_rows * pages, 3, 64, 576, device="cuda").bfloat16()[:, 1]
    table = torch.randperm(num_rows * pages, device="cuda").int().view(num_rows, pages)
    queries = torch.randn(5, heads, 576, device="cuda").bfloat16()
    decode = flashinfer_decode("flashinfer", table, 64, queries, 512, SCALE)
    assert decode is not None
    decode.plan([0] * 5, [1] * 5, torch.bfloat16)
    decode.run(queries, kv)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decode.run(queries, kv)
    for rows, lengths in (
        ([3, 1, 39, 7, 0], [1, 64, 65, 3840, 700]),
        ([5, 6, 7, 8, 9], [2000, 1, 1, 1, 3]),
    ):
        index = torch.tensor(rows, device="cuda")
        counts = torch.tensor(lengths, device="cuda")
        starts = torch.arange(6, device="cuda")
        paged = PagedRows(table[index], starts, counts, 1, max(lengths))
        expected = mla_decode(queries, kv, paged, 512, SCALE)
        decode.plan(rows, lengths, torch.bfloat16)
        found = decode.run(queries, kv)
        torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)
        graph.replay()
        assert torch.equal(captured, found)
        decode.plan(rows[:2], lengths[:2], torch.bfloat16)
        fewer = decode.run(queries[:2], kv)
        torch.testing.assert_close(fewer, expected[:2], atol=2e-2, rtol=2e-2)
