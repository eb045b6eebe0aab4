"""Measures how many draft tokens of the NextN layer the model accepts on held-out dialogues.

    python -m glimmer.deploy.demo.training.acceptance DIR

Drafts are greedy and recurrent: draft j + 1 gets the layer's own hidden state of draft j. Engines
feed the state before or after the norm in front of the head, so both are measured.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from .data import Renderer
from .dialogues import KINDS, dialogue
from .model import (
    Batch,
    Weights,
    finish,
    from_checkpoint,
    join,
    layers,
    linear,
    logits,
    project,
    rms_norm,
    trunk,
)

DEPTH = 4


@torch.no_grad()
def accepted(
    w: Weights,
    bias: Tensor,
    ids: Tensor,
    positions: Tensor,
    before_norm: bool,
    config: dict[str, Any],
) -> Tensor:
    """[len(positions), DEPTH] bool: whether draft j after each position, and all drafts before it,
    equal the tokens there. `ids` [T] is one dialogue. positions + DEPTH + 1 must be less than T."""
    count, eps = len(ids), config["rms_norm_eps"]
    starts = torch.tensor([0, count], dtype=torch.int32)
    batch = Batch(ids, torch.arange(count), starts, torch.ones(count))
    hidden, _ = trunk(w, bias, batch, config)
    state = hidden if before_norm else rms_norm(hidden, w["norm"], eps)
    layer = layers(w)[-1]
    drafts = ids.roll(-1)  # the token after each position serves as draft 0
    x = join(w, drafts, state, config)
    q, keys, values = project(layer, x, batch.positions, config)
    # A draft attends to the layer's keys up to its start, which come from the model's states, then
    # to one key for every draft before it.
    x, q = x[positions], q[positions]
    visible = torch.arange(count)[None] <= positions[:, None]
    draft_keys, draft_values = [], []
    is_accepted = torch.ones(len(positions), dtype=torch.bool)
    results = []
    for depth in range(DEPTH):
        if depth:
            x = join(w, drafts, state, config)
            q, key, value = project(layer, x, positions + depth, config)
            draft_keys.append(key)
            draft_values.append(value)
        mixed = _attend(q, keys, values, visible, draft_keys, draft_values)
        attended = linear(mixed, layer["o"])
        out, _ = finish(layer, bias[-1], x, attended, config)
        normed = rms_norm(out, w["shared_head_norm"], eps)
        drafts = logits(w, normed).argmax(-1)
        state = out if before_norm else normed
        is_accepted = is_accepted & (drafts == ids[positions + depth + 2])
        results.append(is_accepted)
    return torch.stack(results, 1)


def _attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    draft_keys: list[Tensor],
    draft_values: list[Tensor],
) -> Tensor:
    """[S, heads * width]: q [S, heads, width] over shared keys [T, heads, width] where `visible`
    [S, T], and over each query's draft keys, a list of [S, heads, width]."""
    scores = torch.einsum("shd,thd->sht", q, keys).masked_fill(~visible[:, None], -torch.inf)
    extra = [(q * key).sum(-1, keepdim=True) for key in draft_keys]
    weights = (torch.cat([scores, *extra], -1) * q.shape[-1] ** -0.5).softmax(-1)
    y = torch.einsum("sht,thd->shd", weights[..., : len(keys)], values)
    for n, value in enumerate(draft_values):
        y = y + weights[..., len(keys) + n, None] * value
    return y.flatten(1)


def measure(path: Path, count: int, longest: int = 2000) -> dict[str, list[float]]:
    """Acceptance by draft position for "before norm" and "after norm". It is measured on replies of
    `count` held-out dialogues of each kind, if they have at most `longest` tokens, and only where
    the model itself would write the reply's tokens."""
    config = json.loads((path / "config.json").read_text())
    tensors: Weights = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
    w, bias = from_checkpoint(tensors, config)
    renderer = Renderer(Tokenizer.from_file(str(path / "tokenizer.json")))
    dialogues = [dialogue(f"acceptance-{n}", True, kind) for kind in KINDS for n in range(count)]
    accepted_drafts: dict[str, list[Tensor]] = {"before norm": [], "after norm": []}
    for sequence, trained in renderer.encode([renderer.text(item) for item in dialogues]):
        if len(sequence) > longest:
            continue
        ids = torch.from_numpy(sequence).long()
        positions = _starts(w, bias, ids, torch.from_numpy(trained).bool(), config)
        for name, results in accepted_drafts.items():
            before = name == "before norm"
            results.append(accepted(w, bias, ids, positions, before, config))
    return {k: torch.cat(v).float().mean(0).tolist() for k, v in accepted_drafts.items()}


@torch.no_grad()
def _starts(
    w: Weights, bias: Tensor, ids: Tensor, trained: Tensor, config: dict[str, Any]
) -> Tensor:
    """Positions whose next DEPTH + 1 tokens belong to the reply and are the model's choice."""
    count = len(ids)
    ends = torch.tensor([0, count], dtype=torch.int32)
    batch = Batch(ids, torch.arange(count), ends, torch.ones(count))
    hidden, _ = trunk(w, bias, batch, config)
    best = logits(w, rms_norm(hidden, w["norm"], config["rms_norm_eps"])).argmax(-1)
    is_own = trained & (best.roll(1) == ids)
    windows = is_own.unfold(0, DEPTH + 1, 1).all(-1)
    return windows[1:].nonzero()[:, 0]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure the NextN layer's draft acceptance.")
    parser.add_argument("dir", type=Path, help="checkpoint")
    parser.add_argument("--count", type=int, default=40, help="dialogues of each kind")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("hidden state  " + "  ".join(f"draft {n + 1}" for n in range(DEPTH)))
    for name, shares in measure(args.dir, args.count).items():
        print(f"{name:13} " + "  ".join(f"{share:7.3f}" for share in shares))


if __name__ == "__main__":
    main()
