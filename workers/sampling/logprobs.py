"""Log-probabilities for clients: of sampled tokens, and of a prompt's own tokens."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...kernels.sampling import sampling
from ...shared.messages import PrefillChunk, TokenLogprob
from ..rows import RowTable

_LEAST_LOGPROB = -9999.0  # stands for -inf, which JSON cannot say
_SEGMENT = 256  # tokens whose logits exist at one time


def token_logprobs(logits: Tensor, ids: Tensor, num_top: Sequence[int]) -> list[TokenLogprob]:
    """Log-probabilities of ids [n] under softmax(logits [n, vocab]), each with the `num_top[i]`
    likeliest tokens. Waits for the device."""
    ones = torch.ones_like(ids, dtype=torch.float32)
    computed = sampling.logprobs(logits, ids, ones, max(num_top, default=0))
    return read_logprobs(ids, computed, num_top)


def read_logprobs(
    ids: Tensor, computed: Sequence[Tensor], num_top: Sequence[int]
) -> list[TokenLogprob]:
    """The same from the four tensors of `sampling.logprobs` for ids [n]."""
    logprobs, ranks, top_ids, top = computed
    logprobs, top = logprobs.clamp(min=_LEAST_LOGPROB), top.clamp(min=_LEAST_LOGPROB)
    tensors = ids, logprobs, ranks, top_ids, top
    columns = (*(tensor.tolist() for tensor in tensors), num_top)
    return [
        TokenLogprob(token_id, logprob, rank, list(zip(likely[:k], values[:k], strict=True)))
        for token_id, logprob, rank, likely, values, k in zip(*columns, strict=True)
    ]


def prompt_logprobs(
    table: RowTable,
    chunk: PrefillChunk,
    hidden: Tensor,
    logits_of: Callable[[Tensor], Tensor | None],
) -> list[TokenLogprob]:
    """For each token of the chunk, given all before it; [] if the row does not ask for them. A
    chunk after a cached prefix lacks the state before it: its first entry has rank 0.

    hidden [num_tokens, hidden]: the chunk's states. `logits_of`: states -> logits (None on ranks
    that do not sample). Waits for the device.
    """
    num_top = table.rules.prompt_logprobs.get(chunk.row)
    if num_top is None:
        return []
    before, targets = hidden[:-1], chunk.token_ids[1:]
    entries: list[TokenLogprob] = []
    carried = table.last_hidden.pop(chunk.row, None)
    if carried is not None:
        before, targets = torch.cat((carried, before)), chunk.token_ids
    elif chunk.start > 0:
        entries.append(TokenLogprob(chunk.token_ids[0], _LEAST_LOGPROB, 0, []))
    if not chunk.sample:
        table.last_hidden[chunk.row] = hidden[-1:].clone()
    for begin in range(0, len(targets), _SEGMENT):
        part = slice(begin, begin + _SEGMENT)
        logits = logits_of(before[part])
        if logits is not None:
            ids = torch.tensor(targets[part], device=logits.device)
            entries += token_logprobs(logits, ids, [num_top] * len(ids))
    return entries
