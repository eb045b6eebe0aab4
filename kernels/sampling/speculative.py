"""Which drafts are right, on the device. No function waits for it; all can be captured in graphs.

A row with k drafts has k + 1 verify places: its last token's and each draft's. At every place the
target samples a token exactly as it would without drafts: the same rules, counting the drafts
before the place, and the noise of the same seed and output position. A draft is right when it is
the token sampled at the place before it. So a draft d is accepted with probability p_target(d),
which no rule can better for a draft that is not random itself, and the tokens are not only
distributed as without drafts: they are the same tokens. `docs/decisions.md` says more.
"""

import torch
from torch import Tensor


def accept(sampled: Tensor, drafts: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    """sampled int64 [num_rows, k + 1], at each verify place; drafts int64 [num_rows, k];
    room int64 [num_rows]: tokens whose KV the row's pages still hold, the last token's included.

    -> (num_tokens [num_rows], the row's new tokens are sampled[:, :num_tokens]; new last token
    [num_rows]), both int64. There are 1 to k + 1 new tokens, and no more than `room`, or 1.
    """
    right = (sampled[:, :-1] == drafts).cumprod(1).sum(1)
    num_tokens = torch.minimum(right + 1, room).clamp(min=1)
    return num_tokens, sampled.gather(1, num_tokens[:, None] - 1).squeeze(1)


def drafts_before(drafts: Tensor) -> Tensor:
    """drafts [num_rows, k] -> [num_rows * (k + 1), k]: for each verify place the drafts before it,
    -1 for the others. Penalties count them as outputs (`penalise(drafts=...)`): wherever that
    matters they have turned out to be right."""
    num_drafts = drafts.shape[1]
    places = torch.arange(num_drafts + 1, device=drafts.device)[:, None]
    is_before = places > torch.arange(num_drafts, device=drafts.device)
    return torch.where(is_before, drafts[:, None], -1).flatten(0, 1)


def kept(sampled: Tensor, num_tokens: Tensor) -> Tensor:
    """sampled [num_rows, k + 1] with -1 behind each row's first `num_tokens` [num_rows]."""
    places = torch.arange(sampled.shape[1], device=sampled.device)
    return torch.where(places < num_tokens[:, None], sampled, -1)
