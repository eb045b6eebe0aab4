"""Trains the demo model on generated dialogues and writes it as a Hugging Face checkpoint.

    python -m glimmer.deploy.demo.train --out DIR

takes one GPU for a few minutes (docs/log.md has the figures). Small --steps and --batch_tokens
run anywhere, to see that it works.
"""

import argparse
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import byte_level_tokenizer, trained_config, write_checkpoint
from .dialogues import KINDS, dialogue
from .optimizer import make_optimizers, skip_if_not_finite
from .training_data import Renderer, batches, pack, unpack
from .training_model import (
    Batch,
    Weights,
    compute_losses,
    init_weights,
    logits,
    rms_norm,
    to_checkpoint,
    trunk,
)

_VOCABULARY = 1024  # byte-pair tokens; GLM's special tokens follow
_WARM_UP_STEPS = 200
_DECAY_FROM = 0.4  # of the run: from there the learning rate falls to 0
_PROMPT_WEIGHT = 0.1  # of a prompt's token at the beginning; falls to 0 with the run
_DRAFT_WEIGHT = 0.3
_BIAS_STEP = 1e-3  # of the routing biases, against the load of their experts
_BIAS_UNTIL = 0.8


def train(
    args: argparse.Namespace, make_config: Callable[[Any], dict[str, Any]] = trained_config
) -> None:
    """The whole run: tokenizer, training, held-out accuracy, checkpoint. `make_config` gets the
    tokenizer."""
    began = time.monotonic()
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = train_tokenizer(args.seed, args.tokenizer_dialogues)
    config = make_config(tokenizer)
    weights = {k: v.to(device) for k, v in init_weights(config, args.seed).items()}
    for tensor in weights.values():
        tensor.requires_grad_(True)
    bias = torch.zeros(config["num_hidden_layers"], config["n_routed_experts"], device=device)
    optimizers = make_optimizers(weights, args.lr)
    losses = torch.compile(compute_losses) if device == "cuda" else compute_losses
    source = batches(tokenizer.to_str(), args.batch_tokens, args.seed, args.loaders)
    renderer = Renderer(tokenizer)
    held_out = list(validation(renderer, args.validation))
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    total = sum(t.numel() for t in weights.values())
    print(
        f"{name}, torch {torch.__version__}, {total:,} parameters, {args.steps} steps", flush=True
    )
    picks = torch.Generator().manual_seed(args.seed)
    started = time.monotonic()
    for step in range(args.steps):
        progress = max(step / args.steps, (time.monotonic() - began) / (60 * args.minutes))
        if progress >= 1:
            print(f"stopped by --minutes {args.minutes} at step {step}")
            break
        for group in [g for o in optimizers for g in o.param_groups]:
            group["lr"] = group.setdefault("highest", group["lr"]) * learning_rate(step, progress)
        batch = unpack(next(source), _PROMPT_WEIGHT * (1 - progress), device)
        before_norm = (torch.rand((), generator=picks) < 0.5).to(device)
        found = losses(weights, bias, batch, before_norm, config)
        torch.autograd.backward(found.next_token + _DRAFT_WEIGHT * found.drafts)
        skip_if_not_finite(weights)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if progress < _BIAS_UNTIL:
            bias += _BIAS_STEP * torch.sign(found.loads.mean(-1, keepdim=True) - found.loads)
        if step % args.log_every == 0:
            rate = (step + 1) * args.batch_tokens / (time.monotonic() - started)
            line = (
                f"step {step} loss {found.next_token.item():.4f} drafts {found.drafts.item():.4f}"
            )
            print(f"{line} {time.monotonic() - began:.0f} s {rate:,.0f} tokens/s", flush=True)
        if step and step % args.validate_every == 0:
            print(f"step {step} {score(weights, bias, held_out, config, device)}", flush=True)
    print(f"final {score(weights, bias, held_out, config, device)}", flush=True)
    write_checkpoint(args.out, tokenizer, config, to_checkpoint(weights, bias, config))
    print(f"wrote {args.out} after {(time.monotonic() - began) / 60:.1f} minutes", flush=True)


def train_tokenizer(seed: int, count: int) -> Any:
    """Byte-level BPE over `count` training dialogues."""
    texts = []
    for number in range(count):
        one = dialogue(f"{seed}-tokenizer-{number}")
        texts += [m["content"] for m in one.messages] + [str(tool) for tool in one.tools]
        texts += [m.get("reasoning_content", "") for m in one.messages]
    return byte_level_tokenizer(texts, _VOCABULARY)


def learning_rate(step: int, progress: float) -> float:
    """Share of the highest: up, level, down to zero."""
    return min((step + 1) / _WARM_UP_STEPS, (1 - progress) / (1 - _DECAY_FROM), 1.0)


def validation(renderer: Renderer, count: int) -> Iterator[tuple[str, Any]]:
    """(kind, packed batch) with `count` held-out dialogues of each kind."""
    for kind in KINDS:
        made = [dialogue(f"validation-{n}", held_out=True, kind=kind) for n in range(count)]
        encoded = renderer.encode([renderer.text(d) for d in made])
        for first in range(0, count, 64):
            part = encoded[first : first + 64]
            stream = itertools.chain(part, itertools.repeat(part[-1]))
            yield kind, pack(stream, sum(len(ids) for ids, _ in part))


@torch.no_grad()
def score(
    weights: Weights, bias: Tensor, held_out: list[tuple[str, Any]], config: Any, device: str
) -> str:
    """Share of held-out dialogues, by kind, of which every trained token is the likeliest one."""
    right: dict[str, list[bool]] = {}
    for kind, packed in held_out:
        batch = unpack(packed, 0.0, device)
        right.setdefault(kind, []).extend(_all_right(weights, bias, batch, config))
    shares = (f"{kind} {sum(r) / len(r):.3f}" for kind, r in right.items())
    return "held out: " + ", ".join(shares)


def _all_right(weights: Weights, bias: Tensor, batch: Batch, config: Any) -> list[bool]:
    hidden, _ = trunk(weights, bias, batch, config)
    normed = rms_norm(hidden, weights["norm"], config["rms_norm_eps"])
    best = torch.cat([logits(weights, part).argmax(-1) for part in torch.split(normed, 8192)])
    wrong = (best.roll(1) != batch.ids) & (batch.weights > 0)
    counts = torch.cat((wrong.new_zeros(1), wrong)).cumsum(0)[batch.starts.long()].diff()
    used = batch.starts.diff() > 0
    return (counts[used] == 0).tolist()


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=16500)
    parser.add_argument("--minutes", type=float, default=13, help="end in time, whatever --steps")
    parser.add_argument("--batch_tokens", type=int, default=32768)
    parser.add_argument("--tokenizer_dialogues", type=int, default=6000)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--loaders", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--log_every", type=int, default=200)
    parser.add_argument("--validate_every", type=int, default=2000)
    parser.add_argument("--validation", type=int, default=256, help="dialogues of each kind")
    return parser.parse_args(argv)


if __name__ == "__main__":
    train(parse())
