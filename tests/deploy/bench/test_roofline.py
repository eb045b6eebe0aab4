"""The cost model against figures worked out by hand for GLM-4.7-Flash."""

import pytest
from flash import SPEC as FLASH
from glimmer.deploy.bench.roofline import Roofline, distinct_experts, gpu_of


def roofline(card: str = "H100", drafts: int = 0, is_chained: bool = False) -> Roofline:
    gpu = gpu_of(card)
    assert gpu is not None
    return Roofline(FLASH, gpu, drafts, is_chained)


@pytest.mark.parametrize(("tokens", "experts"), [(1, 4.0), (2, 7.75), (32, 55.9), (256, 64.0)])
def test_distinct_experts(tokens: int, experts: float) -> None:
    assert distinct_experts(FLASH, tokens) == pytest.approx(experts, abs=0.05)


@pytest.mark.parametrize(
    ("card", "rows", "context", "ms"),
    [
        ("NVIDIA H100 80GB HBM3", 1, 1024, 2.40),
        ("NVIDIA H100 80GB HBM3", 32, 1024, 18.0),
        ("NVIDIA H100 80GB HBM3", 256, 1024, 24.5),
        ("NVIDIA H200", 32, 8192, 15.4),
    ],
)
def test_decode(card: str, rows: int, context: int, ms: float) -> None:
    assert roofline(card).decode(rows, context) * 1e3 == pytest.approx(ms, rel=0.01)


@pytest.mark.parametrize(
    ("rows", "is_chained", "ms"), [(1, False, 6.32), (1, True, 6.45), (32, False, 22.2)]
)
def test_verifying_and_making_three_drafts(rows: int, is_chained: bool, ms: float) -> None:
    seconds = roofline(drafts=3, is_chained=is_chained).decode(rows, 1024)
    assert seconds * 1e3 == pytest.approx(ms, rel=0.01)


def test_drafts_beside_a_prompt_cost_what_they_add() -> None:
    """The prompt reads all experts in any case, so drafts add passes of one layer and the head."""
    plain, drafting = roofline(), roofline(drafts=3)
    assert 0.001 < drafting.mixed(8, 1024, 4096) - plain.mixed(8, 1024, 4096) < 0.004
    assert 0.001 < drafting.prefill(4096) - plain.prefill(4096) < 0.003


@pytest.mark.parametrize(("tokens", "ms"), [(1024, 22.5), (8192, 108.8), (32768, 925)])
def test_prefill(tokens: int, ms: float) -> None:
    assert roofline().prefill(tokens) * 1e3 == pytest.approx(ms, rel=0.01)


def test_prompts_in_one_pass_share_the_weights() -> None:
    assert roofline().prefill(256, prompts=4) < 2 * roofline().prefill(256)


def test_a_prompt_beside_decode_rows_shares_their_weights() -> None:
    apart = roofline().decode(32, 1024) + roofline().prefill(1024)
    assert roofline().mixed(32, 1024, 1024) < 0.7 * apart


def test_unknown_cards_have_no_roofline() -> None:
    assert gpu_of("CPU") is None
