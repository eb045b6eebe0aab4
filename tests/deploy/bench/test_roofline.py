"""The cost model against figures worked out by hand for GLM-4.7-Flash."""

import pytest
from glimmer.deploy.bench.roofline import (
    decode_seconds,
    distinct_experts,
    gpu_of,
    mixed_seconds,
    prefill_seconds,
)
from glimmer.shared.model_spec import ModelSpec

FLASH = ModelSpec(
    vocab_size=154880,
    num_token_ids=154856,
    hidden_size=2048,
    num_layers=47,
    num_nextn_layers=1,
    num_heads=20,
    q_lora_rank=768,
    kv_lora_rank=512,
    qk_nope_head_dim=192,
    qk_rope_head_dim=64,
    v_head_dim=256,
    intermediate_size=10240,
    moe_intermediate_size=1536,
    num_experts=64,
    num_experts_per_token=4,
    num_shared_experts=1,
    num_expert_groups=1,
    num_groups_per_token=1,
    first_dense_layers=1,
    routed_scaling_factor=1.8,
    norm_topk_prob=True,
    rope_theta=1e6,
    rope_interleave=True,
    rms_norm_eps=1e-5,
    max_position_embeddings=202752,
    eos_token_ids=(154820,),
    dtype="bfloat16",
)


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
    gpu = gpu_of(card)
    assert gpu is not None
    assert decode_seconds(FLASH, gpu, rows, context) * 1e3 == pytest.approx(ms, rel=0.01)


@pytest.mark.parametrize(("tokens", "ms"), [(1024, 22.5), (8192, 108.8), (32768, 925)])
def test_prefill(tokens: int, ms: float) -> None:
    gpu = gpu_of("H100")
    assert gpu is not None
    assert prefill_seconds(FLASH, gpu, tokens) * 1e3 == pytest.approx(ms, rel=0.01)


def test_prompts_in_one_pass_share_the_weights() -> None:
    gpu = gpu_of("H100")
    assert gpu is not None
    assert prefill_seconds(FLASH, gpu, 256, 4) < 2 * prefill_seconds(FLASH, gpu, 256)


def test_a_prompt_beside_decode_rows_shares_their_weights() -> None:
    gpu = gpu_of("H100")
    assert gpu is not None
    both = decode_seconds(FLASH, gpu, 32, 1024) + prefill_seconds(FLASH, gpu, 1024)
    assert mixed_seconds(FLASH, gpu, 32, 1024, 1024) < 0.7 * both


def test_unknown_cards_have_no_roofline() -> None:
    assert gpu_of("CPU") is None
