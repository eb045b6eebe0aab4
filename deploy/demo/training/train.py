"""Trains the demo model on generated dialogues and writes it as a Hugging Face checkpoint.

    python -m glimmer.deploy.demo.training.train --out DIR

takes a few minutes on one GPU (docs/demo-model.md has the figures). With small --steps and
--batch_tokens it runs on any machine, as a test.
"""

import argparse
import functools
import os
import random
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import byte_level_tokenizer, trained_config, write_checkpoint
from .data import Renderer, batches, unpack
from .dialogues import dialogue
from .model import (
    Batch,
    Losses,
    Weights,
    compile_exactly,
    compute_losses,
    init_weights,
    make_parts,
    to_checkpoint,
)
from .optimizer import make_optimizers, skip_if_not_finite
from .validation import SIDES, report

_VOCABULARY = 1024  # byte-pair tokens; GLM's special tokens follow
_WARM_UP_STEPS = 200
_DECAY_FROM = 0.4  # of the run: from there the learning rate falls to 0
_PROMPT_WEIGHT = 0.1  # of a prompt's token at the beginning; falls to 0 with the run
_DRAFT_WEIGHT = 0.3
_DRAFTS_EVERY = 3  # steps; they cost a third of one
_BIAS_STEP = 1e-3  # of the routing biases, against the load of their experts
_BIAS_UNTIL = 0.8
LossFunction = Callable[..., Losses]  # compute_losses with its `parts` argument set


def train(
    args: argparse.Namespace, make_config: Callable[[Any], dict[str, Any]] = trained_config
) -> None:
    """The whole run: tokenizer, training, checkpoint, accuracy on held-out dialogues. `make_config`
    gets the tokenizer and returns config.json."""
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
    source = batches(tokenizer.to_str(), args.batch_tokens, args.seed, args.loaders)
    renderer = Renderer(tokenizer)
    _print_machine(device, weights, args.steps)
    first = unpack(next(source), _PROMPT_WEIGHT, device)
    losses = first_that_works(
        loss_functions(compiled=device == "cuda"),
        lambda function: _try_step(function, weights, bias, first, config),
    )
    print(f"first step after {time.monotonic() - began:.0f} s", flush=True)
    rng = random.Random(args.seed)
    started = time.monotonic()
    for step in range(args.steps):
        progress = max(step / args.steps, (time.monotonic() - began) / (60 * args.minutes))
        if progress >= 1:
            print(f"stopped by --minutes {args.minutes} at step {step}")
            break
        batch = unpack(next(source), _PROMPT_WEIGHT * (1 - progress), device)
        before_norm = torch.full((), rng.random() < 0.5, device=device)
        with_drafts = step % _DRAFTS_EVERY == 0
        result = losses(weights, bias, batch, before_norm, config, with_drafts=with_drafts)
        _update(optimizers, weights, result, learning_rate(step, progress))
        if progress < _BIAS_UNTIL:
            bias += _BIAS_STEP * torch.sign(result.loads.mean(-1, keepdim=True) - result.loads)
        if step % args.log_every == 0:
            rate = (step + 1) * args.batch_tokens / (time.monotonic() - started)
            loss = f"loss {result.next_token.item():.4f} drafts {result.drafts.item():.4f}"
            spent = f"{time.monotonic() - began:.0f} s {rate:,.0f} tokens/s"
            print(f"step {step} {loss} {spent}", flush=True)
        if step and step % args.validate_every == 0:
            for line in report(weights, bias, renderer, config, args.validation // 4):
                print(f"step {step} {line}", flush=True)
    print(f"trained {step + 1} steps, {time.monotonic() - began:.0f} s", flush=True)
    write_checkpoint(args.out, tokenizer, config, to_checkpoint(weights, bias, config))
    print(f"wrote {args.out} after {(time.monotonic() - began) / 60:.1f} minutes", flush=True)
    _print_shares(
        lambda side, examples: report(
            weights, bias, renderer, config, args.validation, side, examples
        ),
        args.examples,
    )


def _print_shares(shares: Callable[[str, int], Iterable[str]], examples: int) -> None:
    """Print a summary for each side, with `examples` mistakes for the held-out one. The summaries
    are repeated at the end, so that they are in the last lines of a log."""
    summaries = []
    for side in SIDES:
        summary, *mistakes = shares(side, examples if side == "held out" else 0)
        summaries.append(f"final {summary}")
        print("\n".join((f"final {summary}", *mistakes)), flush=True)
    print("\n".join(summaries), flush=True)


def loss_functions(compiled: bool) -> dict[str, LossFunction]:
    """Ways to run `compute_losses`. The preferred one comes first."""
    plain = functools.partial(compute_losses, parts=make_parts(compiled=False))
    if not compiled:
        return {"plain": plain}
    in_parts = functools.partial(compute_losses, parts=make_parts(compiled=True))
    return {"compiled in parts": in_parts, "compiled": compile_exactly(plain), "plain": plain}


def first_that_works(
    functions: dict[str, LossFunction], attempt: Callable[[LossFunction], None]
) -> LossFunction:
    """The first function with which `attempt` does not fail. Compiled steps may fail on the only
    machine that is available for training. Raises RuntimeError if all fail."""
    for name, function in functions.items():
        try:
            attempt(function)
        except Exception as error:
            print(f"losses {name}: {type(error).__name__}: {error}"[:2000], flush=True)
        else:
            print(f"losses {name}", flush=True)
            return function
    raise RuntimeError("no way to compute the losses works")


def _try_step(
    losses: LossFunction, weights: Weights, bias: Tensor, batch: Batch, config: dict[str, Any]
) -> None:
    """Compute losses and gradients with drafts and without, and drop them."""
    try:
        for with_drafts in (True, False):
            before_norm = torch.full((), True, device=bias.device)
            _backward(losses(weights, bias, batch, before_norm, config, with_drafts=with_drafts))
    finally:
        for tensor in weights.values():
            tensor.grad = None


def _backward(losses: Losses) -> None:
    torch.autograd.backward(losses.next_token + _DRAFT_WEIGHT * losses.drafts)


def _print_machine(device: str, weights: Weights, steps: int) -> None:
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    total = sum(t.numel() for t in weights.values())
    print(f"{name}, torch {torch.__version__}, {total:,} parameters, {steps} steps", flush=True)


def _update(
    optimizers: list[torch.optim.Optimizer], weights: Weights, losses: Losses, share: float
) -> None:
    """One step of all optimizers at `share` of their highest learning rate."""
    for group in [g for o in optimizers for g in o.param_groups]:
        group["lr"] = group.setdefault("highest", group["lr"]) * share
    _backward(losses)
    skip_if_not_finite(weights)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def train_tokenizer(seed: int, count: int) -> Any:
    """Byte-level BPE over `count` training dialogues."""
    texts = []
    for number in range(count):
        item = dialogue(f"{seed}-tokenizer-{number}")
        texts += [m["content"] for m in item.messages] + [str(tool) for tool in item.tools]
        texts += [m.get("reasoning_content", "") for m in item.messages]
    return byte_level_tokenizer(texts, _VOCABULARY)


def learning_rate(step: int, progress: float) -> float:
    """Share of the highest learning rate: it rises, stays level, and falls to zero."""
    return min((step + 1) / _WARM_UP_STEPS, (1 - progress) / (1 - _DECAY_FROM), 1.0)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the flags."""
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--minutes", type=float, default=8.4, help="of training, whatever --steps")
    parser.add_argument("--batch_tokens", type=int, default=32768)
    parser.add_argument("--tokenizer_dialogues", type=int, default=4000)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--loaders", type=int, default=min(14, os.cpu_count() or 1))
    parser.add_argument("--log_every", type=int, default=300)
    parser.add_argument("--validate_every", type=int, default=4000)
    parser.add_argument("--validation", type=int, default=200, help="dialogues of each kind")
    parser.add_argument("--examples", type=int, default=1, help="mistakes to print of each kind")
    return parser.parse_args(argv)


if __name__ == "__main__":
    train(parse())
