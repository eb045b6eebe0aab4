"""Tensors land where the model looks for them, whatever the number of threads or ranks."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from glimmer.shared.errors import ModelError
from glimmer.shared.model_spec import load_model_spec
from glimmer.workers.checkpoint import check_weights
from glimmer.workers.parallel import Ranks
from glimmer.workers.weights import load_weights, random_weights
from safetensors import safe_open


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors of a tree of dataclasses, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from tensors(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors(getattr(value, field.name))


def load(path: Path, ranks: Ranks, threads: int = 1, reports: list[Any] | None = None) -> Any:
    spec = load_model_spec(path)
    index = check_weights(path, spec)
    told = [] if reports is None else reports
    return load_weights(
        index, spec, ranks, torch.float32, "cpu", threads, lambda *r: told.append(r)
    )


def stored(path: Path, name: str) -> torch.Tensor:
    file = check_weights(path, load_model_spec(path)).tensors[name].file
    with safe_open(file, "pt") as source:
        tensor: torch.Tensor = source.get_tensor(name).float()
    return tensor


def test_one_rank_holds_the_tensors_of_the_files(tiny_model: Path) -> None:
    model = load(tiny_model, Ranks())
    layer = model.layers[2]
    prefix = "model.layers.2"
    assert torch.equal(model.embedding, stored(tiny_model, "model.embed_tokens.weight"))
    assert torch.equal(model.head, stored(tiny_model, "lm_head.weight"))
    for name, part in (
        ("self_attn.q_a_proj.weight", layer.attention.qkv_a[:64]),
        ("self_attn.kv_a_proj_with_mqa.weight", layer.attention.qkv_a[64:]),
        ("self_attn.kv_b_proj.weight", layer.attention.kv_b.flatten(0, 1)),
        ("mlp.gate.e_score_correction_bias", layer.mlp.correction_bias),
        ("mlp.experts.5.gate_proj.weight", layer.mlp.gate_up[5, :64]),
        ("mlp.experts.5.up_proj.weight", layer.mlp.gate_up[5, 64:]),
        ("mlp.experts.5.down_proj.weight", layer.mlp.down[5]),
        ("mlp.shared_experts.up_proj.weight", layer.mlp.shared.gate_up[64:]),
        ("post_attention_layernorm.weight", layer.mlp_norm),
    ):
        assert torch.equal(part, stored(tiny_model, f"{prefix}.{name}"))


def test_shards_of_four_ranks_make_up_the_whole(tiny_model: Path) -> None:
    whole = load(tiny_model, Ranks())
    parts = [load(tiny_model, Ranks(rank, 4)) for rank in range(4)]
    attention = [part.layers[1].attention for part in parts]
    assert torch.equal(torch.cat([a.q_b for a in attention]), whole.layers[1].attention.q_b)
    assert torch.equal(torch.cat([a.kv_b for a in attention]), whole.layers[1].attention.kv_b)
    assert torch.equal(torch.cat([a.o for a in attention], 1), whole.layers[1].attention.o)
    down = torch.cat([part.layers[3].mlp.down for part in parts], 2)
    assert torch.equal(down, whole.layers[3].mlp.down)
    gates = [part.layers[3].mlp.gate_up.chunk(2, 1) for part in parts]
    gate_up = torch.cat([g for g, _ in gates] + [u for _, u in gates], 1)
    assert torch.equal(gate_up, whole.layers[3].mlp.gate_up)
    head = torch.cat([part.head for part in parts])
    vocab = len(whole.head)
    assert torch.equal(head[:vocab], whole.head)
    assert head[vocab:].abs().sum() == 0
    assert all(
        torch.equal(p.layers[0].attention.qkv_a, whole.layers[0].attention.qkv_a) for p in parts
    )


def test_threads_change_nothing_and_progress_counts_bytes(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = load(tiny_model, Ranks())
    monkeypatch.setattr("glimmer.workers.weights._BATCH_BYTES", 20_000)
    reports: list[Any] = []
    many = load(tiny_model, Ranks(), threads=5, reports=reports)
    assert all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(many), strict=True))
    assert len(reports) > 5
    done = [d for d, _ in reports]
    assert done == sorted(done)
    assert (
        reports[-1][0]
        == reports[-1][1]
        == check_weights(tiny_model, load_model_spec(tiny_model)).num_bytes
    )


def test_a_file_that_vanishes_after_the_check_is_named(tiny_model: Path, tmp_path: Path) -> None:
    spec = load_model_spec(tiny_model)
    index = check_weights(tiny_model, spec)
    gone = {
        n: dataclasses.replace(e, file=tmp_path / e.file.name) for n, e in index.tensors.items()
    }
    moved = dataclasses.replace(index, tensors=gone)
    with pytest.raises(ModelError, match=r"model-0000\d-of-00002.safetensors"):
        load_weights(moved, spec, Ranks(), torch.float32, "cpu", 2, lambda *_: None)


def test_random_weights_repeat_and_agree_where_ranks_share(tiny_model: Path) -> None:
    spec = load_model_spec(tiny_model)

    def make(rank: int, size: int) -> Any:
        return random_weights(spec, Ranks(rank, size), torch.float32, "cpu")

    assert all(
        torch.equal(a, b) for a, b in zip(tensors(make(0, 1)), tensors(make(0, 1)), strict=True)
    )
    first, second = make(0, 2), make(1, 2)
    assert torch.equal(first.layers[1].attention.qkv_a, second.layers[1].attention.qkv_a)
    assert torch.equal(first.layers[1].mlp.router, second.layers[1].mlp.router)
    assert not torch.equal(first.layers[1].mlp.down, second.layers[1].mlp.down)
    assert all(t.isfinite().all() for t in tensors(first))
