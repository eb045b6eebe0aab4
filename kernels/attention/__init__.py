"""Attention over the paged latent KV cache, and what prepares its inputs."""
