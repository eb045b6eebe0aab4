"""The rows of one attention call: where their cached latents are, and which tokens are new.

The KV cache of a layer is `kv` [num_pages, page_size, latent_dim], one latent per token. The token
at `position` of a row is in page `page_table[row, position // page_size]` at offset
`position % page_size`. Its slot, page * page_size + offset, is its index in `kv.flatten(0, 1)`.
Example: page_size 4, a row of 6 tokens whose page table begins with 7, 2.

    position   0   1   2   3   4   5
    page       7   7   7   7   2   2
    offset     0   1   2   3   0   1
    slot      28  29  30  31   8   9
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PagedRows:
    """A batch of rows. The last tokens of each row are new: attention computes one query for each.

    Queries of all rows are packed in one tensor, row after row. A query sees the cached tokens of
    its own row up to its own position. Example: row 0 has 6 tokens, 2 of them new; row 1 has 3, all
    new.

        query_lens = (2, 3)    prefix_lens = (4, 0)    lengths = [6, 3]    query_starts = [0, 2, 5]
        query      0  1 | 2  3  4
        row        0  0 | 1  1  1
        position   4  5 | 0  1  2

    The three tensors are on the device of the queries. One instance serves all layers of a step.
    """

    page_table: Tensor  # [num_rows, pages] int32; pages >= ceil(max_length / page_size)
    query_starts: Tensor  # [num_rows + 1] int64, contiguous: first query of each row, then the end
    lengths: Tensor  # [num_rows] int64, contiguous: tokens of each row, the new ones included
    max_query_len: int  # at least the largest number of queries of a row
    max_length: int  # at least the largest of lengths
    # The same on the host, for `mla_prefill`. Empty where only the device knows the lengths.
    query_lens: tuple[int, ...] = ()  # new tokens of each row
    prefix_lens: tuple[int, ...] = ()  # cached tokens of each row before its new ones
