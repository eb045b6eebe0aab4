"""Sampling parameters of one request.

The frontend makes them from a validated body, the scheduler passes them on, the worker's sampler
reads them. All values are final: defaults are applied, the seed is drawn, ids are checked against
the model's vocabulary, lists have a limited length. The formulas are in
`kernels/sampling/sampling.py`.
"""

import msgspec


class SamplingParams(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Sampling parameters of one sequence. A request with n > 1 is n submits.

    With `temperature` 0 decoding is greedy: top_k, top_p and min_p are ignored, penalties are not.
    `seed` is always set: the frontend draws one if needed. The random number for output position i
    depends only on (seed, i), so a replayed request repeats its tokens.
    """

    max_new_tokens: int
    min_new_tokens: int = 0  # stop ids are masked until this many tokens were sampled
    temperature: float = 0.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    input_penalty: bool = False  # prompt tokens count for the penalties too
    decay_start: int = 1  # exponential_decay_length_penalty = [decay_start, decay_factor]
    decay_factor: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()  # end the request; the model's EOS ids unless ignore_eos
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, bias); <= -100 bans the id
    allowed_token_ids: tuple[int, ...] = ()  # empty: all
    num_logprobs: int = -1  # -1: none; 0: of the chosen token; k: also of the k likeliest
    num_prompt_logprobs: int = -1  # the same for prompt tokens; turns the prefix cache off
    thinking_budget: int = -1  # reasoning ends after at most so many outputs; -1: no limit
    thinking_end_id: int = -1  # the token that ends it, the only choice where the budget is used up

    @property
    def uses_penalties(self) -> bool:
        """Whether the sampler needs token counts for this row."""
        return (
            self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.repetition_penalty != 1
        )
