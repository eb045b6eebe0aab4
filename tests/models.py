"""Models for tests beside the tiny one: a checkpoint whose drafts are often right, and prompts of
the demo model."""

import itertools
from pathlib import Path

import torch
from glimmer.deploy.demo.checkpoint import make_checkpoint
from glimmer.deploy.demo.run import MODEL_DIR
from glimmer.deploy.demo.training.dialogues import KINDS, dialogue
from safetensors.torch import load_file, save_file

CONTEXT = 0.25  # how much the layers add to what the last token alone says


def make_guessable(path: Path, seed: int = 0) -> None:
    """Random weights, but all layers weak, and a draft layer that sees the next token's embedding
    as the main model does. So the next token depends mostly on the last one, for both alike."""
    make_checkpoint(path, seed, num_hidden_layers=2)
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


def held_out_prompts(count: int, longest: int = 1500) -> list[list[int]]:
    """Dialogues of every kind up to their last reply, with thinking and without, of at most
    `longest` tokens: others take long on a CPU."""
    from transformers import AutoTokenizer  # here: a machine with a card may lack it

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    prompts: list[list[int]] = []
    for number in itertools.count():
        if len(prompts) == count:
            break
        one = dialogue(f"parity-{number}", True, list(KINDS)[number % len(KINDS)])
        last = max(i for i, m in enumerate(one.messages) if m["role"] == "assistant")
        text = tokenizer.apply_chat_template(
            one.messages[:last],
            tools=one.tools or None,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=number % 2 == 0,
        )
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if len(ids) <= longest:
            prompts.append(ids)
    return prompts
