"""Decides on the device which drafts are accepted. No function waits; CUDA graphs can capture all.

A row with k drafts is verified at k + 1 positions: that of its last token and those of the drafts.
At each, the model samples a token exactly as it would without drafts: by the same rules, which
count the drafts before the position as outputs, and with the noise of the same seed and output
position. Draft i (from 1) is accepted if it and all drafts before it equal the token sampled at the
position before. Example with k = 2: the last token is 4, the drafts are 5 and 8.

    input at the position      4   5   8
    token sampled there        5   7   9
    draft that it verifies     5   8   -
    accepted                   5   no  -      new tokens: 5, 7 (9 is dropped)

So a draft d is accepted with probability p_target(d), the best possible for a draft that is not
random itself, and the tokens are the same as without drafts. `docs/decisions.md` says more.
"""

import torch
from torch import Tensor


def accept(sampled: Tensor, drafts: Tensor, capacity: Tensor) -> tuple[Tensor, Tensor]:
    """Count the new tokens of each row.

    sampled int64 [num_rows, k + 1]: the token sampled at each position; drafts int64 [num_rows, k]
    capacity int64 [num_rows]: positions from the last token on for which the row's pages have space
    -> (num_tokens [num_rows] int64: the new tokens of a row are its first num_tokens of `sampled`;
    new last token [num_rows] int64). There are 1 to k + 1 new tokens, and at most `capacity`,
    though always 1.
    """
    num_accepted = (sampled[:, :-1] == drafts).cumprod(1).sum(1)
    num_tokens = torch.minimum(num_accepted + 1, capacity).clamp(min=1)
    return num_tokens, sampled.gather(1, num_tokens[:, None] - 1).squeeze(1)


def drafts_before(drafts: Tensor) -> Tensor:
    """The drafts before each verified position, for `penalise`, which counts them as outputs.

    drafts [num_rows, k] -> [num_rows * (k + 1), k], -1 in place of the other drafts. Counting them
    is right wherever the sampled token is used, because then the drafts before it were accepted.
    """
    num_drafts = drafts.shape[1]
    positions = torch.arange(num_drafts + 1, device=drafts.device)[:, None]
    is_before = positions > torch.arange(num_drafts, device=drafts.device)
    return torch.where(is_before, drafts[:, None], -1).flatten(0, 1)


def kept(sampled: Tensor, num_tokens: Tensor) -> Tensor:
    """sampled [num_rows, k + 1], with -1 after the first num_tokens [num_rows] of each row."""
    positions = torch.arange(sampled.shape[1], device=sampled.device)
    return torch.where(positions < num_tokens[:, None], sampled, -1)
