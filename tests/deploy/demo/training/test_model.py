"""The training model is the served one: its export gives transformers' logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from glimmer.deploy.demo.checkpoint import make_tokenizer, tiny_config, write_checkpoint
from glimmer.deploy.demo.training.model import (
    Batch,
    Weights,
    compute_losses,
    init_weights,
    logits,
    make_parts,
    rms_norm,
    to_checkpoint,
    trunk,
)
from transformers import AutoModelForCausalLM

LENGTHS = (9, 1, 22)


@pytest.fixture
def config() -> dict[str, Any]:
    rows = make_tokenizer().get_vocab_size() + 4
    return tiny_config(vocab_size=rows, eos_token_id=[0], pad_token_id=0, num_hidden_layers=3)


@pytest.fixture
def weights(config: dict[str, Any]) -> Weights:
    generator = torch.Generator().manual_seed(1)
    weights = init_weights(config, 0)
    return {  # nothing at zero or one, where mistakes hide; as bf16 holds it
        k: (v + torch.randn(v.shape, generator=generator) * 0.05).bfloat16().float()
        for k, v in weights.items()
    }


def packed(vocab: int) -> Batch:
    starts = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    ids = torch.randint(vocab, (sum(LENGTHS),), generator=torch.Generator().manual_seed(2))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    return Batch(ids, positions, starts, torch.ones(len(ids)))


def test_export_gives_the_logits_of_transformers(
    config: dict[str, Any], weights: Weights, tmp_path: Path
) -> None:
    bias = torch.randn(3, config["n_routed_experts"]) * 0.1
    batch = packed(config["vocab_size"])
    hidden, loads = trunk(weights, bias, batch, config)
    ours = logits(weights, rms_norm(hidden, weights["norm"], config["rms_norm_eps"]))
    tensors = to_checkpoint(weights, bias, config)
    write_checkpoint(tmp_path, make_tokenizer(), config, tensors)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for begin, end in zip(batch.starts[:-1].tolist(), batch.starts[1:].tolist(), strict=True):
        theirs = model(batch.ids[None, begin:end]).logits[0].detach()
        error = (ours[begin:end] - theirs).norm() / theirs.norm()
        assert error < 1e-4
    assert loads.sum(-1).tolist() == [len(batch.ids) * config["num_experts_per_tok"]] * 2


def test_losses_reach_every_weight(config: dict[str, Any], weights: Weights) -> None:
    for tensor in weights.values():
        tensor.requires_grad_(True)
    bias = torch.zeros(3, config["n_routed_experts"])
    batch = packed(config["vocab_size"])
    losses = compute_losses(weights, bias, batch, torch.tensor(True), config, make_parts(False))
    (losses.next_token + losses.drafts).backward()
    assert {k for k, v in weights.items() if v.grad is None or not v.grad.any()} == set()
    assert losses.loads.shape == bias.shape


def test_sequences_do_not_see_each_other(config: dict[str, Any], weights: Weights) -> None:
    bias = torch.zeros(3, config["n_routed_experts"])
    batch = packed(config["vocab_size"])
    before, _ = trunk(weights, bias, batch, config)
    changed = batch.ids.clone()
    changed[:9] = 3
    after, _ = trunk(weights, bias, batch._replace(ids=changed), config)
    assert torch.equal(before[9:], after[9:])
    assert not torch.equal(before[:9], after[:9])
