"""A tiny checkpoint whose draft layer is often right, for tests of whole servers with drafts."""

from pathlib import Path

import torch
from glimmer.deploy.demo.checkpoint import make_checkpoint
from safetensors.torch import load_file, save_file

CONTEXT = 0.25  # how much the layers add to what the last token alone says


def make_guessable(path: Path, seed: int = 0) -> None:
    """Random weights, but all layers weak, and a draft layer that sees the next token's embedding
    as the main model does. So the next token depends mostly on the last one, for both alike."""
    make_checkpoint(path, seed)
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                tensors[name] = tensor * CONTEXT
            elif name.endswith("eh_proj.weight"):
                hidden = len(tensor)
                tensors[name] = torch.eye(hidden, 2 * hidden, dtype=tensor.dtype)
            elif name.endswith(("enorm.weight", "shared_head.norm.weight", "model.norm.weight")):
                tensors[name] = torch.ones_like(tensor)
        save_file(tensors, file, metadata={"format": "pt"})
