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


@dataclass(frozen=True)
class Roofline:
    """Bounds in seconds for the steps of a model on a GPU. In each step a row verifies `drafts`
    drafts and makes as many. A draft takes one pass of the draft layer and the head: the first pass
    has all tokens of the step, later ones have one token per row, or all if `is_chained`."""

    spec: ModelSpec
    gpu: Gpu
    drafts: int = 0
    is_chained: bool = False

    def decode(self, rows: int, context: int) -> float:
        """A decode step of `rows` rows with `context` cached tokens each."""
        tokens = rows * (self.drafts + 1)
        core = self._cached_core(rows, context, self.drafts + 1)
        later_core = self._cached_core(rows, context, 1)
        main = self._main_pass(tokens, rows, core)
        return main + self._draft_passes(rows, (tokens, core), (rows, later_core))

    def prefill(self, tokens: int, prompts: int = 1) -> float:
        """A pass of `prompts` new prompts of `tokens` tokens, which samples one token for each."""
        core = self._fresh_core(tokens, prompts)
        later_core = self._cached_core(prompts, tokens, 1)
        main = self._main_pass(prompts * tokens, prompts, core)
        return main + self._draft_passes(prompts, (prompts * tokens, core), (prompts, later_core))

    def mixed(self, rows: int, context: int, tokens: int) -> float:
        """A decode step of `rows` rows together with a new prompt of `tokens` tokens."""
        verified = rows * (self.drafts + 1)
        core = self._cached_core(rows, context, self.drafts + 1) + self._fresh_core(tokens, 1)
        later_core = self._cached_core(rows, context, 1) + self._cached_core(1, tokens, 1)
        main = self._main_pass(verified + tokens, verified + 1, core)
        first, later = (verified + tokens, core), (rows + 1, later_core)
        return main + self._draft_passes(rows + 1, first, later)

    def _main_pass(self, tokens: int, sampled: int, core: float) -> float:
        """A pass of `tokens` tokens; attention's core takes `core` seconds in each layer."""
        spec = self.spec
        dense = 3 * spec.hidden_size * spec.intermediate_size
        moe_layers = spec.num_layers - spec.first_dense_layers
        seconds = spec.num_layers * (self._attention(tokens) + core)
        seconds += spec.first_dense_layers * self._block(dense, dense, tokens)
        return seconds + moe_layers * self._moe(tokens) + self._head(sampled)

    def _draft_passes(self, rows: int, first: tuple[int, float], later: tuple[int, float]) -> float:
        """The passes of the draft layer for `rows` rows. `first` and `later` are the tokens, and
        the seconds of attention's core, of the first pass and of each later one."""
        join = 2 * self.spec.hidden_size**2
        seconds = 0.0
        for index in range(self.drafts):
            tokens, core = first if index == 0 or self.is_chained else later
            seconds += self._block(join, join, tokens) + self._attention(tokens) + core
            seconds += self._moe(tokens) + self._head(rows)
        return seconds

    def _cached_core(self, rows: int, context: int, queries: int) -> float:
        """Attention's core in one layer: `queries` tokens of each row over `context` others."""
        spec = self.spec
        per_token = 2 * spec.num_heads * (spec.latent_dim + spec.kv_lora_rank)
        cache = rows * context * spec.latent_dim * _BYTES
        operations = rows * queries * context * per_token
        return max(cache / self.gpu.bandwidth, operations / self.gpu.flops)

    def _fresh_core(self, tokens: int, prompts: int) -> float:
        """Attention's core in one layer for new prompts."""
        spec = self.spec
        pairs = prompts * tokens * (tokens + 1) / 2
        return 2 * pairs * spec.num_heads * (spec.qk_head_dim + spec.v_head_dim) / self.gpu.flops

    def _attention(self, tokens: int) -> float:
        """The projections of attention in one layer."""
        spec = self.spec
        hidden, heads = spec.hidden_size, spec.num_heads
        weights = hidden * (spec.q_lora_rank + spec.latent_dim)
        weights += spec.q_lora_rank * heads * spec.qk_head_dim
        weights += spec.kv_lora_rank * heads * (spec.qk_nope_head_dim + spec.v_head_dim)
        weights += heads * spec.v_head_dim * hidden
        return self._block(weights, weights, tokens)

    def _moe(self, tokens: int) -> float:
        """Router and experts of one layer."""
        spec = self.spec
        expert = 3 * spec.hidden_size * spec.moe_intermediate_size
        router = spec.hidden_size * spec.num_experts
        read = distinct_experts(spec, tokens) + spec.num_shared_experts
        used = spec.num_experts_per_token + spec.num_shared_experts
        # The router's weights have four bytes.
        return self._block(read * expert + 2 * router, used * expert + router, tokens)

    def _head(self, sampled: int) -> float:
        head = self.spec.hidden_size * self.spec.vocab_size
        return self._block(head, head, sampled)

    def _block(self, read: float, used: float, tokens: int) -> float:
        """A block that reads `read` weights once and uses `used` of them for each token."""
        return max(_BYTES * read / self.gpu.bandwidth, 2 * used * tokens / self.gpu.flops)
