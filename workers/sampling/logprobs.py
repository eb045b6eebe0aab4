"""Log-probabilities for clients: of sampled tokens, and of a prompt's own tokens."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...kernels.sampling import sampling
from ...shared.messages import PrefillChunk, TokenLogprob
from ..rows import RowTable

_LEAST_LOGPROB = -9999.0  # stands for -inf, which JSON cannot say
_SEGMENT = 256  # tokens whose logits exist at one time

Logprobs = tuple[Tensor, Tensor, Tensor, Tensor]  # see `sampling.logprobs`


def token_logprobs(logits: Tensor, ids: Tensor, num_top: Sequence[int]) -> list[TokenLogprob]:
    """What a client sees about ids [n] under softmax(logits [n, vocab]), with the `num_top[i]`
    likeliest tokens. Waits for the device."""
    ones = torch.ones_like(ids, dtype=torch.float32)
    found = sampling.logprobs(logits, ids, ones, max(num_top, default=0))
    return read_logprobs(ids, found, num_top)


def read_logprobs(ids: Tensor, found: Logprobs, num_top: Sequence[int]) -> list[TokenLogprob]:
    """The same from what `sampling.logprobs` found about ids [n]."""
    own, ranks, top_ids, top = found
    own, top = own.clamp(min=_LEAST_LOGPROB), top.clamp(min=_LEAST_LOGPROB)
    columns = (ids.tolist(), own.tolist(), ranks.tolist(), top_ids.tolist(), top.tolist(), num_top)
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
    """About each token of the chunk, given all before it; [] where not asked for. A chunk that
    follows a cached prefix lacks the state before it: its first entry says rank 0.

    hidden [num_tokens, hidden] are the chunk's states, `logits_of` gives the logits of some (None
    on ranks that do not sample). Waits for the device.
    """
    num_top = table.rules.prompt_logprobs.get(chunk.row)
    if num_top is None:
        return []
    before, targets = hidden[:-1], chunk.token_ids[1:]
    found: list[TokenLogprob] = []
    carried = table.last_hidden.pop(chunk.row, None)
    if carried is not None:
        before, targets = torch.cat((carried, before)), chunk.token_ids
    elif chunk.start > 0:
        found.append(TokenLogprob(chunk.token_ids[0], -9999.0, 0, []))
    if not chunk.sample:
        table.last_hidden[chunk.row] = hidden[-1:].clone()
    for begin in range(0, len(targets), _SEGMENT):
        part = slice(begin, begin + _SEGMENT)
        logits = logits_of(before[part])
        if logits is not None:
            ids = torch.tensor(targets[part], device=logits.device)
            found += token_logprobs(logits, ids, [num_top] * len(ids))
    return found
