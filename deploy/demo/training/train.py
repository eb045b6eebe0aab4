"""Trains the demo model on generated dialogues and writes it as a Hugging Face checkpoint.

    python -m glimmer.deploy.demo.training.train --out DIR --state DIR --call_minutes 9

README.md beside this file has the plan for a GPU. A call stops after --call_minutes, and the same
command goes on where it stopped. With small --steps, --batch_tokens and --size small it runs on any
machine, as a test.
"""

import argparse
import functools
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..checkpoint import byte_level_tokenizer, small_config, trained_config, write_checkpoint
from . import state
from .data import Packed, Renderer, batches, unpack
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
from .state import Progress
from .typed.mix import training_dialogue
from .validation import SIDES, report

VOCABULARY = 2048  # byte-pair tokens; GLM's special tokens follow
_WARM_UP_STEPS = 200
_DECAY_FROM = 0.4  # of the run: from there the learning rate falls to 0
_PROMPT_WEIGHT = 0.1  # of a prompt's token at the beginning; falls to 0 with the run
_DRAFT_WEIGHT = 0.3
_DRAFTS_EVERY = 3  # steps; they cost a third of one
_BIAS_STEP = 1e-3  # of the routing biases, against the load of their experts
_BIAS_UNTIL = 0.8
LossFunction = Callable[..., Losses]  # compute_losses with its `parts` argument set
MakeConfig = Callable[[Any], dict[str, Any]]  # tokenizer -> config.json
SIZES: dict[str, MakeConfig] = {"demo": trained_config, "small": small_config}


def train(args: argparse.Namespace) -> None:
    """One call of a run: tokenizer, training up to the call's end or the run's, checkpoint. A run
    that is complete is measured on held-out dialogues."""
    began = time.monotonic()
    torch.set_float32_matmul_precision("high")
    run = _start(args)
    source = _Source(run, args)
    losses = _working_losses(run, source)
    print(f"first step after {time.monotonic() - began:.0f} s", flush=True)
    ends_at = began + 60 * args.call_minutes
    progress, is_complete = _train_steps(run, args, source, losses, ends_at)
    seconds = f"{progress.seconds:.0f} s in all calls, {time.monotonic() - began:.0f} s in this one"
    print(f"trained {progress.steps} steps, {seconds}", flush=True)
    if args.state:
        state.save(args.state, progress, run.weights, run.bias, run.optimizers)
    tensors = to_checkpoint(run.weights, run.bias, run.config)
    write_checkpoint(args.out, run.tokenizer, run.config, tensors)
    print(f"wrote {args.out}", flush=True)
    if is_complete:
        _print_shares(functools.partial(_report, run, args.validation), args.examples)
    else:
        print("the run is not complete: call the same command again", flush=True)


@dataclass
class _Run:
    """The model in training. `progress` is that at the beginning of this call."""

    config: dict[str, Any]
    tokenizer: Any
    weights: Weights
    bias: Tensor  # [moe layers, experts]
    optimizers: list[torch.optim.Optimizer]
    progress: Progress
    device: str


def _start(args: argparse.Namespace) -> _Run:
    """A new run, or the one in `args.state`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = _tokenizer(args)
    config = SIZES[args.size](tokenizer)
    weights = {k: v.to(device) for k, v in init_weights(config, args.seed).items()}
    for tensor in weights.values():
        tensor.requires_grad_(True)
    bias = torch.zeros(config["num_hidden_layers"], config["n_routed_experts"], device=device)
    optimizers = make_optimizers(weights, args.lr)
    progress = state.load(args.state, weights, bias, optimizers) if args.state else Progress()
    _print_machine(device, weights, args.steps)
    if progress.steps:
        print(f"going on after step {progress.steps}, {progress.seconds:.0f} s", flush=True)
    return _Run(config, tokenizer, weights, bias, optimizers, progress, device)


def _tokenizer(args: argparse.Namespace) -> Any:
    """The tokenizer of the run, which its first call trains."""
    path = args.state / "tokenizer.json" if args.state else None
    if path and path.exists():
        return Tokenizer.from_file(str(path))
    tokenizer = train_tokenizer(args.seed, args.tokenizer_dialogues)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(path))
    return tokenizer


class _Source:
    """Batches of the two stages of a run: short dialogues, then also long ones. Each call of a run
    has dialogues of its own, since their seeds depend on the step that it begins with."""

    def __init__(self, run: _Run, args: argparse.Namespace) -> None:
        self._run, self._args = run, args
        self._share: float | None = None
        self._batches: Iterator[Packed] = iter(())

    def next(self, progress: float) -> Packed:
        """The next batch of a run that has come as far as `progress`, from 0 to 1."""
        args = self._args
        share = args.long_share if progress >= args.long_from else 0.0
        if share != self._share:
            seed = f"{args.seed}-{self._run.progress.steps}-{share}"
            text = self._run.tokenizer.to_str()
            self._batches = batches(text, args.batch_tokens, seed, args.loaders, share)
            self._share = share
        return next(self._batches)


def _working_losses(run: _Run, source: _Source) -> LossFunction:
    """A way to compute the losses that works for short batches and for long ones."""
    first = unpack(source.next(0.0), _PROMPT_WEIGHT, run.device)
    tried = [first] if run.device == "cpu" else [first, first._replace(longest=len(first.ids))]

    def attempt(function: LossFunction) -> None:
        for batch in tried:
            _try_step(function, run.weights, run.bias, batch, run.config)

    return first_that_works(loss_functions(compiled=run.device == "cuda"), attempt)


def _train_steps(
    run: _Run, args: argparse.Namespace, source: _Source, losses: LossFunction, ends_at: float
) -> tuple[Progress, bool]:
    """Train until the run is complete or `ends_at`, and return how far it is and whether it is
    complete."""
    rng = random.Random(f"{args.seed}-{run.progress.steps}")
    started = time.monotonic()
    for step in range(run.progress.steps, args.steps):
        seconds = run.progress.seconds + time.monotonic() - started
        part = max(step / args.steps, seconds / (60 * args.minutes))
        if part >= 1:
            print(f"stopped by --minutes {args.minutes} at step {step}")
            return Progress(step, seconds), True
        if time.monotonic() >= ends_at:
            return Progress(step, seconds), False
        batch = unpack(source.next(part), _PROMPT_WEIGHT * (1 - part), run.device)
        before_norm = torch.full((), rng.random() < 0.5, device=run.device)
        with_drafts = step % _DRAFTS_EVERY == 0
        result = losses(
            run.weights, run.bias, batch, before_norm, run.config, with_drafts=with_drafts
        )
        _update(run.optimizers, run.weights, result, learning_rate(step, part))
        if part < _BIAS_UNTIL:
            load = result.loads
            run.bias += _BIAS_STEP * torch.sign(load.mean(-1, keepdim=True) - load)
        if step % args.log_every == 0:
            done = (step + 1 - run.progress.steps) * args.batch_tokens
            rate = f"{done / (time.monotonic() - started):,.0f} tokens/s"
            loss = f"loss {result.next_token.item():.4f} drafts {result.drafts.item():.4f}"
            print(f"step {step} {loss} {seconds:.0f} s {rate}", flush=True)
        if step > run.progress.steps and step % args.validate_every == 0:
            for line in _report(run, args.validation // 4):
                print(f"step {step} {line}", flush=True)
    return Progress(args.steps, run.progress.seconds + time.monotonic() - started), True


def _report(run: _Run, count: int, side: str = "held out", examples: int = 0) -> Iterator[str]:
    renderer = Renderer(run.tokenizer)
    return report(run.weights, run.bias, renderer, run.config, count, side, examples)


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
        item = training_dialogue(f"{seed}-tokenizer-{number}")
        texts += [m["content"] for m in item.messages] + [str(tool) for tool in item.tools]
        texts += [m.get("reasoning_content", "") for m in item.messages]
    return byte_level_tokenizer(texts, VOCABULARY)


def learning_rate(step: int, progress: float) -> float:
    """Share of the highest learning rate: it rises, stays level, and falls to zero."""
    return min((step + 1) / _WARM_UP_STEPS, (1 - progress) / (1 - _DECAY_FROM), 1.0)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the flags."""
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--state", type=Path, help="directory of the run, to go on with later")
    parser.add_argument("--size", choices=SIZES, default="demo", help="shape of the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=100_000, help="of all calls")
    parser.add_argument("--minutes", type=float, default=23.5, help="of training in all calls")
    parser.add_argument("--call_minutes", type=float, default=1e9, help="of this call")
    parser.add_argument("--batch_tokens", type=int, default=65536)
    parser.add_argument("--long_from", type=float, default=0.7, help="part of the run")
    parser.add_argument("--long_share", type=float, default=0.5, help="of the batches from then on")
    parser.add_argument("--tokenizer_dialogues", type=int, default=4000)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--loaders", type=int, default=min(14, os.cpu_count() or 1))
    parser.add_argument("--log_every", type=int, default=200)
    parser.add_argument("--validate_every", type=int, default=4000)
    parser.add_argument("--validation", type=int, default=60, help="dialogues of each kind")
    parser.add_argument("--examples", type=int, default=1, help="mistakes to print of each kind")
    return parser.parse_args(argv)


if __name__ == "__main__":
    train(parse())
