"""Keys and values of every head, rebuilt from the latents: what up-projected attention reads."""

import torch
from torch import Tensor


def up_project(
    latents: Tensor, kv_b: Tensor, nope: int, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """latents [num_tokens, kv_lora_rank + rope], kv_b [heads, nope + v_dim, kv_lora_rank]: key part
    first -> keys [num_tokens, heads, nope + rope], the rotary part being every head's own, and
    values [num_tokens, heads, v_dim], contiguous, of the latents' type: `out` if given. Each is
    written once, where attention reads it.
    """
    heads, both, rank = kv_b.shape
    rope = latents.shape[1] - rank
    if out is None:
        keys = latents.new_empty(len(latents), heads, nope + rope)
        out = keys, latents.new_empty(len(latents), heads, both - nope)
    keys, values = out
    shared = latents[:, :rank].expand(heads, -1, -1)
    weights = kv_b.transpose(1, 2)
    torch.bmm(shared, weights[..., :nope], out=keys.transpose(0, 1)[..., :nope])
    torch.bmm(shared, weights[..., nope:], out=values.transpose(0, 1))
    if latents.is_cuda:
        from .prefill_attention_triton import launch_spread_rope

        launch_spread_rope(keys, latents, rope)
    else:
        keys[..., nope:] = latents[:, None, rank:]
    return out
