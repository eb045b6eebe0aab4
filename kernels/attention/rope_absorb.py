"""What lies between the projections and absorbed attention: `rope_write`, and then
`absorb_queries`, which rotated queries need as much as plain ones. One launch for few tokens.
"""

from torch import Tensor

from .mla_absorb import MAX_QUERIES, absorb_queries, suits
from .rope_write import rope_write


def rope_absorb(
    queries: Tensor,
    kv_a: Tensor,
    kv_norm: Tensor,
    eps: float,
    angles: tuple[Tensor, Tensor],
    kv: Tensor,
    slots: Tensor,
    interleave: bool,
    w_uk: Tensor,
) -> Tensor:
    """Writes the tokens' latents into kv. All as in `rope_write` and `absorb_queries`
    -> [num_tokens, heads, kv_lora_rank + rope]. What is in `queries` afterwards is nobody's."""
    given = (queries, kv_a, kv_norm, eps, angles, kv, slots)
    if suits(queries, MAX_QUERIES):
        from .rope_absorb_triton import launch_rope_absorb

        return launch_rope_absorb(*given, interleave, w_uk)
    rope_write(*given, interleave)
    return absorb_queries(queries, w_uk)
