"""What a step costs at least: bytes over memory bandwidth, or floating-point operations over the
tensor cores' rate, whichever is longer, block after block. Two bytes per weight and cached value.

Rates are what simple kernels reach, not datasheets: on an H100 80GB a copy moves 3.02 TB/s and an
8192^3 bf16 product runs at 804 TFLOP/s; on an H200 4.3 TB/s and 790 TFLOP/s were measured.
"""

from dataclasses import dataclass

from ...shared.model_spec import ModelSpec

_BYTES = 2


@dataclass(frozen=True)
class Gpu:
    """Achievable bytes/s and bf16 FLOP/s."""

    bandwidth: float
    flops: float


_GPUS = {"H100": Gpu(3.0e12, 790e12), "H200": Gpu(4.3e12, 790e12)}


def gpu_of(name: str) -> Gpu | None:
    """The rates of a card by its driver's name, e.g. "NVIDIA H100 80GB HBM3"; None: unknown."""
    return next((gpu for key, gpu in _GPUS.items() if key in name), None)


def distinct_experts(spec: ModelSpec, tokens: int) -> float:
    """Expected distinct experts of one layer if routing is uniform and independent."""
    share = spec.num_experts_per_token / spec.num_experts
    return spec.num_experts * (1 - (1 - share) ** tokens)


def decode_seconds(spec: ModelSpec, gpu: Gpu, rows: int, context: int) -> float:
    """One decode step of `rows` rows with `context` cached tokens each."""
    per_token = 2 * spec.num_heads * (spec.latent_dim + spec.kv_lora_rank)
    cache = rows * context * spec.latent_dim * _BYTES
    core = max(cache / gpu.bandwidth, rows * context * per_token / gpu.flops)
    return _blocks_seconds(spec, gpu, rows, rows) + spec.num_layers * core


def prefill_seconds(spec: ModelSpec, gpu: Gpu, tokens: int, prompts: int = 1) -> float:
    """`prompts` fresh prompts of `tokens` tokens in one pass, one token sampled of each."""
    pairs = prompts * tokens * (tokens + 1) / 2
    core = 2 * pairs * spec.num_heads * (spec.qk_head_dim + spec.v_head_dim) / gpu.flops
    return _blocks_seconds(spec, gpu, prompts * tokens, prompts) + spec.num_layers * core


def mixed_seconds(spec: ModelSpec, gpu: Gpu, rows: int, context: int, tokens: int) -> float:
    """A decode step of `rows` rows that also runs a whole prompt of `tokens` tokens."""
    alone = _blocks_seconds(spec, gpu, rows, rows), _blocks_seconds(spec, gpu, tokens, 1)
    attention = decode_seconds(spec, gpu, rows, context) + prefill_seconds(spec, gpu, tokens)
    return attention - sum(alone) + _blocks_seconds(spec, gpu, rows + tokens, rows + 1)


def _blocks_seconds(spec: ModelSpec, gpu: Gpu, tokens: int, sampled: int) -> float:
    """Everything but attention's core, for `tokens` tokens in one pass."""
    hidden, heads = spec.hidden_size, spec.num_heads
    attention = hidden * (spec.q_lora_rank + spec.latent_dim)
    attention += spec.q_lora_rank * heads * spec.qk_head_dim
    attention += spec.kv_lora_rank * heads * (spec.qk_nope_head_dim + spec.v_head_dim)
    attention += heads * spec.v_head_dim * hidden
    dense = 3 * hidden * spec.intermediate_size
    expert = 3 * hidden * spec.moe_intermediate_size
    shared = spec.num_shared_experts
    head = hidden * spec.vocab_size
    router = hidden * spec.num_experts

    def block(read: float, used: float, count: int) -> float:
        return max(_BYTES * read / gpu.bandwidth, 2 * used * count / gpu.flops)

    read = (distinct_experts(spec, tokens) + shared) * expert + 2 * router
    moe = block(read, (spec.num_experts_per_token + shared) * expert + router, tokens)
    moe_layers = spec.num_layers - spec.first_dense_layers
    return (
        spec.num_layers * block(attention, attention, tokens)
        + spec.first_dense_layers * block(dense, dense, tokens)
        + moe_layers * moe
        + block(head, head, sampled)
    )
