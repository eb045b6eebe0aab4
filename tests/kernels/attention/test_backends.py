"""Which attention runs, for what was asked and what is there."""

from typing import Any

import pytest
import torch
from glimmer.kernels.attention import backends


class Queries:
    """As much of a CUDA tensor as the choice looks at."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, dim: int = 256) -> None:
        self.is_cuda = True
        self.dtype = dtype
        self.shape = (1, 20, dim)
        self.device = torch.device("cuda")


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "is_hopper", lambda device: True)
    monkeypatch.setattr(backends, "_is_installed", lambda backend: backend in ("fa3", "triton"))


@pytest.mark.parametrize("asked", ["auto", "torch", "triton", "fa3", "flashinfer"])
def test_cpus_and_wide_types_have_the_reference(asked: str) -> None:
    wide: Any = Queries(torch.float32)
    for queries in (torch.zeros(1, 2, 256), wide):
        assert backends.prefill_backend(asked, queries, 256) == "torch"
        assert backends.decode_backend(asked, queries) == "torch"


@pytest.mark.parametrize(
    ("asked", "prefill", "decode"),
    [
        ("auto", "fa3", "triton"),
        ("fa3", "fa3", "triton"),
        ("flashqla", "fa3", "triton"),
        ("triton", "triton", "triton"),
        ("torch", "torch", "torch"),
    ],
)
def test_on_hopper(asked: str, prefill: str, decode: str) -> None:
    queries: Any = Queries()
    assert backends.prefill_backend(asked, queries, 256) == prefill
    assert backends.decode_backend(asked, queries) == decode


@pytest.mark.parametrize(
    ("dtype", "dim", "value_dim"),
    [(torch.float16, 256, 256), (torch.bfloat16, 48, 48), (torch.bfloat16, 256, 128)],
)
@pytest.mark.parametrize("asked", ["auto", "fa3"])
def test_triton_does_what_fa3_has_no_kernel_for(
    asked: str, dtype: torch.dtype, dim: int, value_dim: int
) -> None:
    queries: Any = Queries(dtype, dim)
    assert backends.prefill_backend(asked, queries, value_dim) == "triton"


def test_other_cards_and_missing_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    queries: Any = Queries()
    with pytest.raises(ValueError, match="pip install flashinfer-python"):
        backends.decode_backend("flashinfer", queries)
    with pytest.raises(ValueError, match="pip install flashinfer-python"):
        backends.prefill_backend("flashinfer", queries, 256)
    monkeypatch.setattr(backends, "_is_installed", lambda backend: backend == "triton")
    assert backends.prefill_backend("auto", queries, 256) == "triton"
    with pytest.raises(ValueError, match="pip install fa3-fwd"):
        backends.prefill_backend("fa3", queries, 256)
    monkeypatch.setattr(backends, "is_hopper", lambda device: False)
    assert backends.prefill_backend("auto", queries, 256) == "triton"


@pytest.mark.parametrize(("dim", "value_dim"), [(20, 10), (24, 12), (20, 16)])
def test_heads_of_odd_widths_have_the_reference(dim: int, value_dim: int) -> None:
    queries: Any = Queries(dim=dim)
    assert backends.prefill_backend("auto", queries, value_dim) == "torch"
