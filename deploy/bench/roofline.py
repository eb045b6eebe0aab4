"""A lower bound for the time of a step. For each block of the model it is bytes / bandwidth or
operations / rate, whichever is longer. Weights and cached values have two bytes.

The rates are those of simple kernels, not of datasheets. On an H100 80GB a copy moves 3.02 TB/s and
an 8192^3 bf16 product runs at 804 TFLOP/s. On an H200, 4.3 TB/s and 790 TFLOP/s were measured.
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
    """The rates of a GPU by its full name, such as "NVIDIA H100 80GB HBM3"; None if unknown."""
    return next((gpu for key, gpu in _GPUS.items() if key in name), None)


def distinct_experts(spec: ModelSpec, tokens: int) -> float:
    """Expected distinct experts of one layer if routing is uniform and independent."""
    share = spec.num_experts_per_token / spec.num_experts
    return spec.num_experts * (1 - (1 - share) ** tokens)


def decode_seconds(
    spec: ModelSpec, gpu: Gpu, rows: int, context: int, drafts: int = 0, is_chained: bool = False
) -> float:
    """One decode step of `rows` rows with `context` cached tokens each. Each row verifies `drafts`
    drafts and then makes as many. A draft takes one pass of the draft layer and the head. The first
    pass has all tokens of the step, later ones have one token per row, or all if `is_chained`."""
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
    """One pass of `prompts` new prompts of `tokens` tokens. It samples one token for each prompt
    and makes `drafts` drafts."""
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
    """A decode step of `rows` rows together with a new prompt of `tokens` tokens."""
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
    """Passes of the draft layer that make `drafts` drafts for each of `rows` rows. `first` and
    `later` are the number of tokens and the seconds of attention's core in the first pass and in
    later ones."""
    join = 2 * spec.hidden_size * spec.hidden_size
    seconds = 0.0
    for index in range(drafts):
        tokens, core = first if index == 0 or is_chained else later
        seconds += _block(gpu, join, join, tokens) + _attention_seconds(spec, gpu, tokens) + core
        seconds += _moe_seconds(spec, gpu, tokens) + _head_seconds(spec, gpu, rows)
    return seconds


def _cached_seconds(spec: ModelSpec, gpu: Gpu, rows: int, context: int, queries: int) -> float:
    """Attention's core in one layer: `queries` tokens of each row over `context` cached tokens."""
    per_token = 2 * spec.num_heads * (spec.latent_dim + spec.kv_lora_rank)
    cache = rows * context * spec.latent_dim * _BYTES
    return max(cache / gpu.bandwidth, rows * queries * context * per_token / gpu.flops)


def _fresh_seconds(spec: ModelSpec, gpu: Gpu, tokens: int, prompts: int) -> float:
    """Attention's core in one layer for new prompts."""
    pairs = prompts * tokens * (tokens + 1) / 2
    return 2 * pairs * spec.num_heads * (spec.qk_head_dim + spec.v_head_dim) / gpu.flops


def _blocks_seconds(spec: ModelSpec, gpu: Gpu, tokens: int, sampled: int) -> float:
    """One pass of `tokens` tokens without attention's core."""
    dense = 3 * spec.hidden_size * spec.intermediate_size
    moe_layers = spec.num_layers - spec.first_dense_layers
    return (
        spec.num_layers * _attention_seconds(spec, gpu, tokens)
        + spec.first_dense_layers * _block(gpu, dense, dense, tokens)
        + moe_layers * _moe_seconds(spec, gpu, tokens)
        + _head_seconds(spec, gpu, sampled)
    )


def _attention_seconds(spec: ModelSpec, gpu: Gpu, tokens: int) -> float:
    """The projections of attention in one layer."""
    hidden, heads = spec.hidden_size, spec.num_heads
    weights = hidden * (spec.q_lora_rank + spec.latent_dim)
    weights += spec.q_lora_rank * heads * spec.qk_head_dim
    weights += spec.kv_lora_rank * heads * (spec.qk_nope_head_dim + spec.v_head_dim)
    weights += heads * spec.v_head_dim * hidden
    return _block(gpu, weights, weights, tokens)


def _moe_seconds(spec: ModelSpec, gpu: Gpu, tokens: int) -> float:
    """Router and experts of one layer."""
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
