"""Tensors land where the model looks for them, whatever the number of threads or ranks."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from glimmer.deploy.demo.checkpoint import make_checkpoint
from glimmer.shared.config import ServeConfig
from glimmer.shared.errors import ModelError
from glimmer.shared.messages import PrefillChunk, RowAdmit, StepPlan
from glimmer.shared.model_spec import load_model_spec
from glimmer.shared.sampling import SamplingParams
from glimmer.workers.inputs import build_batch
from glimmer.workers.memory.kv_cache import allocate_kv
from glimmer.workers.model.glm4_moe_lite import ModelWeights, hidden_states
from glimmer.workers.parallel import Ranks
from glimmer.workers.rows import RowTable
from glimmer.workers.weights.checkpoint import INDEX_FILE, check_draft, check_weights
from glimmer.workers.weights.weights import load_weights, observe_routing, random_weights
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


def load(
    path: Path,
    ranks: Ranks,
    threads: int = 1,
    reports: list[Any] | None = None,
    draft: Any = None,
    device: str = "cpu",
) -> Any:
    spec = load_model_spec(path)
    index = check_weights(path, spec)
    told = [] if reports is None else reports
    return load_weights(
        index, spec, ranks, torch.float32, device, threads, lambda *r: told.append(r), draft
    )


def draft_of(path: Path, draft_dir: Path | None = None) -> Any:
    dirs = (str(draft_dir),) if draft_dir else None
    config = ServeConfig(model_dir=str(path), mtp_mode="eagle_with_att", mtp_draft_model_dir=dirs)
    return check_draft(config, load_model_spec(path))


def stored(path: Path, name: str) -> torch.Tensor:
    weight_map = json.loads((path / INDEX_FILE).read_text())["weight_map"]
    file = path / weight_map[name]
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
    monkeypatch.setattr("glimmer.workers.weights.shard_reader._PIECE_BYTES", 20_000)
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


def test_without_a_draft_no_nextn_weights_are_made(tiny_model: Path) -> None:
    config = ServeConfig(model_dir=str(tiny_model))
    assert check_draft(config, load_model_spec(tiny_model)) is None
    assert load(tiny_model, Ranks()).nextn is None


@pytest.mark.parametrize("size", [1, 2])
def test_the_nextn_layer_shares_embedding_and_head(tiny_model: Path, size: int) -> None:
    model = load(tiny_model, Ranks(0, size), draft=draft_of(tiny_model))
    nextn = model.nextn
    assert nextn.embedding is model.embedding
    assert nextn.head is model.head
    prefix = "model.layers.4"
    for name, part in (
        ("enorm.weight", nextn.enorm),
        ("hnorm.weight", nextn.hnorm),
        ("eh_proj.weight", nextn.eh_proj),
        ("shared_head.norm.weight", nextn.norm),
        ("self_attn.q_a_proj.weight", nextn.layer.attention.qkv_a[:64]),
        ("mlp.gate.weight", nextn.layer.mlp.router),
    ):
        assert torch.equal(part, stored(tiny_model, f"{prefix}.{name}"))
    down = stored(tiny_model, f"{prefix}.mlp.experts.7.down_proj.weight")
    assert torch.equal(nextn.layer.mlp.down[7], down[:, : 64 // size])


@pytest.mark.parametrize("size", [1, 2])
def test_a_draft_checkpoint_with_another_embedding_keeps_its_own(
    tiny_model: Path, tmp_path: Path, size: int
) -> None:
    make_checkpoint(tmp_path / "draft", seed=1)
    model = load(tiny_model, Ranks(0, size), draft=draft_of(tiny_model, tmp_path / "draft"))
    name = "model.layers.4.embed_tokens.weight"
    assert torch.equal(model.nextn.embedding, stored(tmp_path / "draft", name))
    head = stored(tmp_path / "draft", "model.layers.4.shared_head.head.weight")
    assert torch.equal(model.nextn.head, head[: len(model.nextn.head)])
    assert not torch.equal(model.nextn.head, model.head)


def test_copies_left_out_of_the_draft_are_shared(tiny_model: Path) -> None:
    draft = {
        k: v for k, v in draft_of(tiny_model).items() if "embed" not in k and "head.h" not in k
    }
    model = load(tiny_model, Ranks(), draft=draft)
    assert model.nextn.embedding is model.embedding
    assert model.nextn.head is model.head


def test_a_draft_shard_cut_off_while_loading_is_named(tiny_model: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_model, tmp_path / "draft"))
    draft = draft_of(tiny_model, other)
    for shard in other.glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"draft/model-0000\d-of-00002.safetensors: ends at byte"):
        load(tiny_model, Ranks(), draft=draft)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1, 2])
def test_a_gpu_gets_the_same_weights(tiny_model: Path, size: int) -> None:
    ranks, draft = Ranks(size - 1, size), draft_of(tiny_model)
    expected = load(tiny_model, ranks, draft=draft)
    found = load(tiny_model, ranks, 4, draft=draft, device="cuda")
    pairs = zip(tensors(expected), tensors(found), strict=True)
    assert all(torch.equal(a, b.cpu()) for a, b in pairs)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_random_weights_are_slices_of_the_same_tensors(tiny_model: Path, device: str) -> None:
    spec = load_model_spec(tiny_model)

    def make(rank: int, size: int, seed: int = 0) -> Any:
        ranks = Ranks(rank, size)
        return random_weights(spec, ranks, torch.bfloat16, device, seed, with_nextn=True)

    whole, again, other = make(0, 1), make(0, 1), make(0, 1, seed=1)
    pairs = list(zip(tensors(whole), tensors(again), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(whole.embedding, other.embedding)
    assert whole.nextn.embedding is whole.embedding
    parts = [make(rank, 4) for rank in range(4)]
    for part in parts:
        assert torch.equal(part.nextn.eh_proj, whole.nextn.eh_proj)
        assert torch.equal(part.layers[1].attention.qkv_a, whole.layers[1].attention.qkv_a)
    o = torch.cat([part.layers[2].attention.o for part in parts], 1)
    assert torch.equal(o, whole.layers[2].attention.o)
    up = torch.cat([part.nextn.layer.mlp.gate_up.chunk(2, 1)[1] for part in parts], 1)
    assert torch.equal(up, whole.nextn.layer.mlp.gate_up.chunk(2, 1)[1])
    assert torch.equal(torch.cat([part.head for part in parts])[: len(whole.head)], whole.head)
    assert all(t.isfinite().all() for t in tensors(whole))


@pytest.mark.parametrize("device", DEVICES)
def test_random_routing_spreads_and_numbers_stay_finite_at_every_depth(
    tiny_model: Path, config_of: Any, device: str
) -> None:
    """As many layers and experts as the real model, narrower; uniform routing of 32 tokens would
    meet 55.9 experts of 64."""
    spec = dataclasses.replace(
        load_model_spec(tiny_model),
        num_layers=47,
        num_experts=64,
        num_experts_per_token=4,
        moe_intermediate_size=48,
        vocab_size=5000,
    )
    seen: list[torch.Tensor] = []
    weights = random_weights(spec, Ranks(), torch.bfloat16, device)
    model: ModelWeights = observe_routing(weights, seen.append)
    kv = allocate_kv(33, spec, config_of(tiny_model, device=device), torch.bfloat16)
    table = RowTable(32, 1, 64, spec.vocab_size, device)
    params = SamplingParams(max_new_tokens=1)
    admits = [RowAdmit(row, params, [row], 0, 0, []) for row in range(32)]
    ids = torch.randint(5000, (32, 20), generator=torch.Generator().manual_seed(0)).tolist()
    for begin, end in ((0, 19), (19, 20)):
        chunks = [PrefillChunk(row, begin, ids[row][begin:end], sample=True) for row in range(32)]
        plan = StepPlan(0, 0, [], [] if begin else admits, [], chunks, [])
        table.apply(plan)
        seen.clear()
        batch = build_batch(plan, table)
        hidden, _ = hidden_states(model, batch.inputs, kv)
        assert batch.packed is not None
        table.advance(batch.packed.rows, batch.packed.added)
        table.count(plan)
    assert hidden.isfinite().all()
    assert hidden.float().std() > 0.5
    distinct = [len(experts.unique()) for experts in seen]
    assert len(distinct) == 46
    assert min(distinct) >= 44, distinct
