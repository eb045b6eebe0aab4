"""Up-projected attention of every backend against a loop, and against the absorbed form."""

import dataclasses
from typing import Any

import pytest
import torch
from glimmer.kernels.attention.backends import prefill_backend
from glimmer.kernels.attention.mla_decode import mla_decode
from glimmer.kernels.attention.mla_prefill import mla_prefill
from glimmer.kernels.attention.mla_projections import up_project
from glimmer.kernels.attention.paged_rows import PagedRows
from glimmer.kernels.attention.prefill_attention_triton import launch_merge

CUDA = torch.cuda.is_available()
PAGE, RANK, ROPE, NOPE, VALUE, HEADS, SCALE = 4, 5, 2, 3, 4, 2, 0.41


def make(counts: list[int], lengths: list[int]) -> dict[str, Any]:
    """Rows in shuffled pages; tokens of a row are `latents[row][position]`."""
    pages = [-(-length // PAGE) for length in lengths]
    kv = torch.full((sum(pages) + 1, PAGE, RANK + ROPE), 50.0)
    order = torch.randperm(len(kv))
    table = torch.zeros(len(lengths), max(pages, default=0), dtype=torch.int32)
    used, new = 0, []
    for row, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        table[row, : pages[row]] = order[used : used + pages[row]]
        used += pages[row]
        latents = torch.randn(length, RANK + ROPE)
        for p in range(length):
            kv[table[row, p // PAGE], p % PAGE] = latents[p]
        new.append(latents[length - count :])
    return {
        "queries": torch.randn(sum(counts), HEADS, NOPE + ROPE),
        "new_tokens": torch.cat(new) if new else torch.empty(0, RANK + ROPE),
        "kv": kv,
        "rows": PagedRows(
            page_table=table,
            query_starts=torch.tensor([0, *torch.tensor(counts).cumsum(0).long().tolist()]),
            lengths=torch.tensor(lengths, dtype=torch.int64),
            max_query_len=max(counts, default=0),
            max_length=max(lengths, default=0),
            query_lens=tuple(counts),
            prefix_lens=tuple(a - b for a, b in zip(lengths, counts, strict=True)),
        ),
        "kv_b": torch.randn(HEADS, NOPE + VALUE, RANK),
    }


def _cast(value: Any, dtype: torch.dtype) -> Any:
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.to(dtype) if is_float else value


def reference(case: dict[str, Any]) -> torch.Tensor:
    out = torch.empty(len(case["queries"]), HEADS, VALUE, dtype=torch.float64)
    kv_b = case["kv_b"].double()
    rows = case["rows"]
    for row, length in enumerate(rows.lengths.tolist()):
        begin, end = rows.query_starts[row : row + 2].tolist()
        table = rows.page_table[row]
        latents = torch.stack([case["kv"][table[p // PAGE], p % PAGE] for p in range(length)])
        for token in range(begin, end):
            seen = latents[: length - end + token + 1].double()
            for head in range(HEADS):
                keys = torch.cat((seen[:, :RANK] @ kv_b[head, :NOPE].T, seen[:, RANK:]), 1)
                values = seen[:, :RANK] @ kv_b[head, NOPE:].T
                query = case["queries"][token, head].double()
                out[token, head] = (keys @ query * SCALE).softmax(0) @ values
    return out


CASES = [([], []), ([1], [1]), ([4, 5, 3], [4, 5, 3]), ([1, 9, 2, 4], [9, 12, 6, 4])]


@pytest.mark.parametrize(("counts", "lengths"), CASES)
@pytest.mark.parametrize(("segment", "blocks"), [(4096, 1 << 24), (4, 10)])
def test_matches_a_loop_whatever_the_blocks(
    counts: list[int],
    lengths: list[int],
    segment: int,
    blocks: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("glimmer.kernels.attention.mla_prefill._SEGMENT", segment)
    monkeypatch.setattr("glimmer.kernels.attention.mla_prefill.MAX_SCORES", blocks)
    case = make(counts, lengths)
    got = mla_prefill(**case, scale=SCALE)
    torch.testing.assert_close(got.double(), reference(case), atol=2e-5, rtol=1e-4)


def test_equals_the_absorbed_form() -> None:
    case = make([3, 1, 6], [3, 10, 13])
    w_uk, w_uv = case["kv_b"][:, :NOPE], case["kv_b"][:, NOPE:]
    nope, rope = case["queries"][..., :NOPE], case["queries"][..., NOPE:]
    absorbed = torch.cat((torch.einsum("thn,hnr->thr", nope, w_uk), rope), -1)
    latent = mla_decode(absorbed, case["kv"], case["rows"], RANK, SCALE)
    got = torch.einsum("thr,hvr->thv", latent, w_uv)
    torch.testing.assert_close(mla_prefill(**case, scale=SCALE), got, atol=2e-5, rtol=1e-4)


def test_bfloat16_stays_near_the_exact_result() -> None:
    case = make([4, 7], [4, 20])
    half = {k: _cast(v, torch.bfloat16) for k, v in case.items()}
    exact = reference({k: _cast(v, torch.float32) for k, v in half.items()})
    got = mla_prefill(**half, scale=SCALE)
    assert got.dtype == torch.bfloat16
    # keys and values are rounded to 8 bits; values reach about 8
    torch.testing.assert_close(got.double(), exact, atol=0.1, rtol=0.02)


def _on(case: dict[str, Any], device: str, dtype: torch.dtype) -> dict[str, Any]:
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in case.items()}
    rows = case["rows"]
    moved["rows"] = dataclasses.replace(
        rows,
        page_table=rows.page_table.to(device),
        query_starts=rows.query_starts.to(device),
        lengths=rows.lengths.to(device),
    )
    return {k: _cast(v, dtype) for k, v in moved.items()}


@pytest.mark.parametrize(
    ("counts", "lengths", "segment"),
    [
        *((*case, 1 << 14) for case in CASES),
        *((*case, 4) for case in CASES[1:]),
        ([9], [21], 4),
        ([12, 3], [12, 23], 8),
        ([12, 3], [12, 23], 1 << 14),
    ],
)
def test_kernels_match_whatever_the_segments(
    counts: list[int], lengths: list[int], segment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glimmer.kernels.attention.mla_prefill._FAST_SEGMENT", segment)
    case = make(counts, lengths)
    placed = _on(case, "cuda", torch.float16) if CUDA else case
    got = mla_prefill(**placed, scale=SCALE, backend="triton").double().cpu()
    tolerance = 3e-2 if CUDA else 2e-5
    torch.testing.assert_close(got, reference(case), atol=tolerance, rtol=tolerance)
    if max(counts, default=0) <= segment:
        placed["new_tokens"] = up_project(placed["new_tokens"], placed["kv_b"], NOPE)
        again = mla_prefill(**placed, scale=SCALE, backend="triton").double().cpu()
        assert torch.equal(again, got)


def test_segments_are_merged_in_float32_and_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    types = []

    def merge(out: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
        types.append(out.dtype)
        return launch_merge(out, *parts)

    module = "glimmer.kernels.attention"
    monkeypatch.setattr(f"{module}.prefill_attention_triton.launch_merge", merge)
    monkeypatch.setattr(f"{module}.mla_prefill._FAST_SEGMENT", 4)
    case = _on(make([2], [13]), "cuda" if CUDA else "cpu", torch.float16)
    mla_prefill(**case, scale=SCALE, backend="triton")
    assert types == [torch.float32, torch.float32, torch.float16]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["fa3", "flashinfer", "triton"])
@pytest.mark.parametrize(
    ("counts", "lengths"),
    [([1], [1]), ([100, 1, 517, 64], [100, 1, 517, 64]), ([300, 77, 5], [1300, 77, 70])],
)
def test_full_size_on_the_card(
    backend: str, counts: list[int], lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"PAGE": 64, "RANK": 512, "ROPE": 64, "NOPE": 192}.items():
        monkeypatch.setitem(globals(), name, value)
    monkeypatch.setitem(globals(), "VALUE", 256)
    monkeypatch.setitem(globals(), "HEADS", 20)
    monkeypatch.setattr("glimmer.kernels.attention.mla_prefill._FAST_SEGMENT", 512)
    case = make(counts, lengths)
    case["kv_b"] /= 23
    half = _on(case, "cuda", torch.bfloat16)
    try:
        prefill_backend(backend, half["queries"], 256)
    except ValueError as error:
        pytest.skip(str(error))
    exact = mla_prefill(**_on(half, "cuda", torch.float32), scale=1 / 16)
    got = mla_prefill(**half, scale=1 / 16, backend=backend)
    torch.testing.assert_close(got.float(), exact, atol=1e-2, rtol=2e-2)
    in_one_call = max(counts) <= 512
    if in_one_call:
        half["new_tokens"] = up_project(half["new_tokens"], half["kv_b"], 192)
    out = torch.full_like(got, 7.0)
    again = mla_prefill(**half, scale=1 / 16, backend=backend, out=out)
    assert torch.equal(again, got)
    assert (again.data_ptr() == out.data_ptr()) == (backend == "fa3" and in_one_call)
