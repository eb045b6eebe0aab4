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


def decode_seconds(
    spec: ModelSpec, gpu: Gpu, rows: int, context: int, drafts: int = 0, is_chained: bool = False
) -> float:
    """One decode step of `rows` rows with `context` cached tokens each. With `drafts` each row
    verifies so many and then makes as many: passes of one layer and the head, of which the first
    sees all the step's tokens, the others (unless chained) one per row."""
    tokens = rows * (drafts + 1)
    core = _cached_seconds(spec, gpu, rows, context, drafts + 1)
    main = _blocks_seconds(spec, gpu, tokens, tokens) + spec.num_layers * core
    later = rows, _cached_seconds(spec, gpu, rows, context, 1)
    return main + _draft_seconds(spec, gpu, (tokens, core), later, rows, drafts, is_chained)


def prefill_seconds(
    spec: ModelSpec,
    gpu: Gpu,
    tokens: int,
    prompts: int = 1,
    drafts: int = 0,
    is_chained: bool = False,
) -> float:
    """`prompts` fresh prompts of `tokens` tokens in one pass, one token sampled of each, and
    `drafts` made for it."""
    every, core = prompts * tokens, _fresh_seconds(spec, gpu, tokens, prompts)
    main = _blocks_seconds(spec, gpu, every, prompts) + spec.num_layers * core
    later = prompts, _cached_seconds(spec, gpu, prompts, tokens, 1)
    return main + _draft_seconds(spec, gpu, (every, core), later, prompts, drafts, is_chained)


def mixed_seconds(
    spec: ModelSpec,
    gpu: Gpu,
    rows: int,
    context: int,
    tokens: int,
    drafts: int = 0,
    is_chained: bool = False,
) -> float:
    """A decode step of `rows` rows that also runs a whole prompt of `tokens` tokens."""
    verified = rows * (drafts + 1)
    core = _cached_seconds(spec, gpu, rows, context, drafts + 1)
    core += _fresh_seconds(spec, gpu, tokens, 1)
    main = _blocks_seconds(spec, gpu, verified + tokens, verified + 1) + spec.num_layers * core
    alone = _cached_seconds(spec, gpu, rows, context, 1) + _cached_seconds(spec, gpu, 1, tokens, 1)
    first, later = (verified + tokens, core), (rows + 1, alone)
    return main + _draft_seconds(spec, gpu, first, later, rows + 1, drafts, is_chained)


def _draft_seconds(
    spec: ModelSpec,
    gpu: Gpu,
    first: tuple[int, float],
    later: tuple[int, float],
    rows: int,
    drafts: int,
    is_chained: bool,
) -> float:
    """Passes of the draft layer that make `drafts` drafts for each of `rows` rows; `first` and
    `later` are their tokens and what attention's core takes."""
    join = 2 * spec.hidden_size * spec.hidden_size
    seconds = 0.0
    for place in range(drafts):
        tokens, core = first if place == 0 or is_chained else later
        seconds += _block(gpu, join, join, tokens) + _attention_seconds(spec, gpu, tokens) + core
        seconds += _moe_seconds(spec, gpu, tokens) + _head_seconds(spec, gpu, rows)
    return seconds


def _cached_seconds(spec: ModelSpec, gpu: Gpu, rows: int, context: int, queries: int) -> float:
    """Attention's core in one layer: `queries` tokens of each row over its cached ones."""
    per_token = 2 * spec.num_heads * (spec.latent_dim + spec.kv_lora_rank)
    cache = rows * context * spec.latent_dim * _BYTES
    return max(cache / gpu.bandwidth, rows * queries * context * per_token / gpu.flops)


def _fresh_seconds(spec: ModelSpec, gpu: Gpu, tokens: int, prompts: int) -> float:
    """Attention's core in one layer, of whole prompts."""
    pairs = prompts * tokens * (tokens + 1) / 2
    return 2 * pairs * spec.num_heads * (spec.qk_head_dim + spec.v_head_dim) / gpu.flops


def _blocks_seconds(spec: ModelSpec, gpu: Gpu, tokens: int, sampled: int) -> float:
    """Everything but attention's core, for `tokens` tokens in one pass."""
    dense = 3 * spec.hidden_size * spec.intermediate_size
    moe_layers = spec.num_layers - spec.first_dense_layers
    return (
        spec.num_layers * _attention_seconds(spec, gpu, tokens)
        + spec.first_dense_layers * _block(gpu, dense, dense, tokens)
        + moe_layers * _moe_seconds(spec, gpu, tokens)
        + _head_seconds(spec, gpu, sampled)
    )


def _attention_seconds(spec: ModelSpec, gpu: Gpu, tokens: int) -> float:
    """One layer's projections."""
    hidden, heads = spec.hidden_size, spec.num_heads
    weights = hidden * (spec.q_lora_rank + spec.latent_dim)
    weights += spec.q_lora_rank * heads * spec.qk_head_dim
    weights += spec.kv_lora_rank * heads * (spec.qk_nope_head_dim + spec.v_head_dim)
    weights += heads * spec.v_head_dim * hidden
    return _block(gpu, weights, weights, tokens)


def _moe_seconds(spec: ModelSpec, gpu: Gpu, tokens: int) -> float:
    """One layer's router and experts."""
    expert = 3 * spec.hidden_size * spec.moe_intermediate_size
    shared, router = spec.num_shared_experts, spec.hidden_size * spec.num_experts
    read = (distinct_experts(spec, tokens) + shared) * expert + 2 * router
    return _block(gpu, read, (spec.num_experts_per_token + shared) * expert + router, tokens)


def _head_seconds(spec: ModelSpec, gpu: Gpu, sampled: int) -> float:
    head = spec.hidden_size * spec.vocab_size
    return _block(gpu, head, head, sampled)


def _block(gpu: Gpu, read: float, used: float, tokens: int) -> float:
    """A block that reads `read` weights once and uses `used` of them for each token."""
    return max(_BYTES * read / gpu.bandwidth, 2 * used * tokens / gpu.flops)
