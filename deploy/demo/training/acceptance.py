"""How many draft tokens of the NextN layer the model would accept, on held-out dialogues.

    python -m glimmer.deploy.demo.training.acceptance DIR

Greedy and recurrent: draft j + 1 gets the layer's own state of draft j. Both hidden states that
engines feed are measured, before and after the norm that the head reads.
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
    """[len(positions), DEPTH] bool: whether the drafts after each position are what follows there,
    and all before them, too. `ids` [T] is one dialogue; positions + DEPTH + 1 must lie in it."""
    count, eps = len(ids), config["rms_norm_eps"]
    starts = torch.tensor([0, count], dtype=torch.int32)
    batch = Batch(ids, torch.arange(count), starts, torch.ones(count))
    hidden, _ = trunk(w, bias, batch, config)
    state = hidden if before_norm else rms_norm(hidden, w["norm"], eps)
    layer = layers(w)[-1]
    drafts = ids.roll(-1)  # what came after each position stands for draft 0
    x = join(w, drafts, state, config)
    q, keys, values = project(layer, x, batch.positions, config)
    # What a draft sees: the layer's keys up to its start, made from the model's own states, then
    # one key for every draft before it.
    x, q = x[positions], q[positions]
    seen = torch.arange(count)[None] <= positions[:, None]
    own_keys, own_values = [], []
    right = torch.ones(len(positions), dtype=torch.bool)
    results = []
    for depth in range(DEPTH):
        if depth:
            x = join(w, drafts, state, config)
            q, key, value = project(layer, x, positions + depth, config)
            own_keys.append(key)
            own_values.append(value)
        attended = linear(_attend(q, keys, values, seen, own_keys, own_values), layer["o"])
        out, _ = finish(layer, bias[-1], x, attended, config)
        normed = rms_norm(out, w["shared_head_norm"], eps)
        drafts = logits(w, normed).argmax(-1)
        state = out if before_norm else normed
        right = right & (drafts == ids[positions + depth + 2])
        results.append(right)
    return torch.stack(results, 1)


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, seen: Tensor, own_keys: list[Tensor], own: list[Tensor]
) -> Tensor:
    """[S, heads * width]: q [S, heads, width] over shared keys [T, heads, width] where `seen`
    [S, T], and over each query's own keys, a list of [S, heads, width]."""
    scores = torch.einsum("shd,thd->sht", q, keys).masked_fill(~seen[:, None], -torch.inf)
    extra = [(q * key).sum(-1, keepdim=True) for key in own_keys]
    weights = (torch.cat([scores, *extra], -1) * q.shape[-1] ** -0.5).softmax(-1)
    y = torch.einsum("sht,thd->shd", weights[..., : len(keys)], values)
    for n, value in enumerate(own):
        y = y + weights[..., len(keys) + n, None] * value
    return y.flatten(1)


def measure(path: Path, count: int, longest: int = 2000) -> dict[str, list[float]]:
    """Acceptance by draft position for "before norm" and "after norm", over the replies of
    `count` held-out dialogues of each kind (those of up to `longest` tokens), where the model
    itself would write them."""
    config = json.loads((path / "config.json").read_text())
    tensors: Weights = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
    w, bias = from_checkpoint(tensors, config)
    renderer = Renderer(Tokenizer.from_file(str(path / "tokenizer.json")))
    made = [dialogue(f"acceptance-{n}", True, kind) for kind in KINDS for n in range(count)]
    found: dict[str, list[Tensor]] = {"before norm": [], "after norm": []}
    for sequence, trained in renderer.encode([renderer.text(one) for one in made]):
        if len(sequence) > longest:
            continue
        ids = torch.from_numpy(sequence).long()
        positions = _starts(w, bias, ids, torch.from_numpy(trained).bool(), config)
        for name, results in found.items():
            before = name == "before norm"
            results.append(accepted(w, bias, ids, positions, before, config))
    return {k: torch.cat(v).float().mean(0).tolist() for k, v in found.items()}


@torch.no_grad()
def _starts(
    w: Weights, bias: Tensor, ids: Tensor, trained: Tensor, config: dict[str, Any]
) -> Tensor:
    """Positions from which the next DEPTH + 1 tokens are the reply's and the model's own."""
    count = len(ids)
    ends = torch.tensor([0, count], dtype=torch.int32)
    batch = Batch(ids, torch.arange(count), ends, torch.ones(count))
    hidden, _ = trunk(w, bias, batch, config)
    best = logits(w, rms_norm(hidden, w["norm"], config["rms_norm_eps"])).argmax(-1)
    good = trained & (best.roll(1) == ids)
    windows = good.unfold(0, DEPTH + 1, 1).all(-1)
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
