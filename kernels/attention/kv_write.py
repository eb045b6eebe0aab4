"""Writes the latents of new tokens into their pages."""

from torch import Tensor


def kv_write(kv: Tensor, slots: Tensor, latents: Tensor) -> None:
    """kv[page, offset] = latents[i] where slots[i] = page * page_size + offset; in place.

    kv [num_pages, page_size, latent_dim] (one layer, may be strided over pages),
    slots [num_tokens] int64, all different, latents [num_tokens, latent_dim] of kv's type.
    """
    page_size = kv.shape[1]
    kv[slots // page_size, slots % page_size] = latents
