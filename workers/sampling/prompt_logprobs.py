"""Log-probabilities of a prompt's own tokens, for requests that ask for them."""

from collections.abc import Callable

import torch
from torch import Tensor

from ...shared.messages import PrefillChunk, TokenLogprob
from ..rows import RowTable
from .sampler import token_logprobs

_SEGMENT = 256  # tokens whose logits exist at one time


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
    num_top = table.params[chunk.row].num_prompt_logprobs
    if num_top < 0:
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
