"""Fills a rank's weights, from a checked checkpoint or with noise.

`_placements` says which part of each checkpoint tensor goes into which tensor of the model;
loading and random filling both follow it. `checkpoint.py` checks the checkpoint,
`shard_reader.py` reads its bytes.
"""

import dataclasses
import zlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ...kernels.moe.router import RouterSettings
from ...shared.model_spec import ModelSpec
from ..model.glm4_moe_lite import DecoderLayer, DenseWeights, ModelWeights, MoeWeights
from ..model.mla import AttentionWeights
from ..model.nextn import NextnWeights
from ..parallel import Ranks
from .checkpoint import CheckpointIndex, TensorEntry
from .shard_reader import WHOLE, Placement, Report, read_tensors, same_bytes

_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"


def load_weights(
    index: CheckpointIndex,
    spec: ModelSpec,
    ranks: Ranks,
    dtype: torch.dtype,
    device: str,
    num_threads: int,
    report: Report,
    draft: dict[str, TensorEntry] | None = None,
) -> ModelWeights:
    """Allocate this rank's weights and read them with `num_threads` threads. `draft`: the NextN
    layer to load as well, from `check_draft`. `report` is called in the calling thread. Raises
    ModelError naming the file that cannot be read."""
    entries = dict(index.tensors)
    model = _allocate(spec, ranks, dtype, device)
    if draft is not None:
        entries |= draft
        prefix = f"model.layers.{spec.num_layers}"
        copies = f"{prefix}.embed_tokens.weight", f"{prefix}.shared_head.head.weight"
        own = [
            copy in draft and not same_bytes(draft[copy], index.tensors[main])
            for copy, main in zip(copies, (_EMBEDDING, _HEAD), strict=True)
        ]
        model = dataclasses.replace(model, nextn=_allocate_nextn(model, spec, ranks, *own))
    jobs = [(name, entries[name], place) for name, place in _placements(model, spec, ranks)]
    read_tensors(jobs, model.embedding.device, num_threads, report)
    return model


def random_weights(
    spec: ModelSpec,
    ranks: Ranks,
    dtype: torch.dtype,
    device: str,
    seed: int = 0,
    with_nextn: bool = False,
) -> ModelWeights:
    """Noise made on the device, slices of the same whole tensors for any number of ranks (of one
    type and kind of device).

    Each tensor has a seed of its own, the embedding unit scale, matrices 1/sqrt(fan-in), norms are
    1 and routing biases 0: every layer then adds something of its own to every token, so that
    tokens stay apart and routing spreads at any depth, as it does in a trained model.
    """
    model = _allocate(spec, ranks, dtype, device)
    if with_nextn:
        model = dataclasses.replace(model, nextn=_allocate_nextn(model, spec, ranks))
    generator = torch.Generator(device)
    for name, place in _placements(model, spec, ranks):
        target = place.target
        if target.dim() == 1:
            target.fill_(not name.endswith("e_score_correction_bias"))
            continue
        whole = target
        if ranks.size > 1 and place.rows != WHOLE:
            rows = spec.vocab_size if name == _HEAD else len(target) * ranks.size
            whole = target.new_empty(rows, target.shape[1])
        elif ranks.size > 1 and place.columns != WHOLE:
            whole = target.new_empty(len(target), target.shape[1] * ranks.size)
        generator.manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        scale = 1.0 if name == _EMBEDDING else whole.shape[1] ** -0.5
        whole.normal_(0, scale, generator=generator)
        if whole is not target:
            target.copy_(whole[place.rows, place.columns])
    return model


def observe_routing(model: ModelWeights, on_route: Callable[[Tensor], None]) -> ModelWeights:
    """The same weights, not copied; every MoE layer, the draft layer's too, calls `on_route` with
    the expert ids of its passes."""

    def observed(layer: DecoderLayer) -> DecoderLayer:
        if isinstance(layer.mlp, DenseWeights):
            return layer
        return dataclasses.replace(layer, mlp=dataclasses.replace(layer.mlp, on_route=on_route))

    nextn = model.nextn
    if nextn is not None:
        nextn = dataclasses.replace(nextn, layer=observed(nextn.layer))
    return dataclasses.replace(model, layers=[observed(x) for x in model.layers], nextn=nextn)


def _allocate(spec: ModelSpec, ranks: Ranks, dtype: torch.dtype, device: str) -> ModelWeights:
    hidden = spec.hidden_size
    return ModelWeights(
        embedding=torch.empty(spec.vocab_size, hidden, dtype=dtype, device=device),
        layers=[_empty_layer(n, spec, ranks, dtype, device) for n in range(spec.num_layers)],
        norm=torch.empty(hidden, dtype=dtype, device=device),
        head=_empty_head(spec, ranks, dtype, device),
        spec=spec,
        ranks=ranks,
    )


def _allocate_nextn(
    model: ModelWeights,
    spec: ModelSpec,
    ranks: Ranks,
    own_embedding: bool = False,
    own_head: bool = False,
) -> NextnWeights:
    main, hidden = model.embedding, spec.hidden_size
    dtype, device = main.dtype, str(main.device)
    return NextnWeights(
        enorm=main.new_empty(hidden),
        hnorm=main.new_empty(hidden),
        eh_proj=main.new_empty(hidden, 2 * hidden),
        layer=_empty_layer(spec.num_layers, spec, ranks, dtype, device),
        norm=main.new_empty(hidden),
        embedding=torch.empty_like(main) if own_embedding else main,
        head=_empty_head(spec, ranks, dtype, device) if own_head else model.head,
        spec=spec,
        ranks=ranks,
    )


def _empty_head(spec: ModelSpec, ranks: Ranks, dtype: torch.dtype, device: str) -> Tensor:
    rows = -(-spec.vocab_size // ranks.size)
    return torch.zeros(rows, spec.hidden_size, dtype=dtype, device=device)


def _empty_layer(
    number: int, spec: ModelSpec, ranks: Ranks, dtype: torch.dtype, device: str
) -> DecoderLayer:
    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def dense(width: int) -> DenseWeights:
        share = width // ranks.size
        return DenseWeights(empty(2 * share, hidden), empty(hidden, share))

    hidden, heads = spec.hidden_size, spec.num_heads // ranks.size
    up_dim = spec.qk_nope_head_dim + spec.v_head_dim
    expert = spec.moe_intermediate_size // ranks.size
    attention = AttentionWeights(
        qkv_a=empty(spec.q_lora_rank + spec.latent_dim, hidden),
        q_norm=empty(spec.q_lora_rank),
        q_b=empty(heads * spec.qk_head_dim, spec.q_lora_rank),
        kv_norm=empty(spec.kv_lora_rank),
        kv_b=empty(heads, up_dim, spec.kv_lora_rank),
        o=empty(hidden, heads * spec.v_head_dim),
        scale=spec.softmax_scale,
        spec=spec,
    )
    mlp: DenseWeights | MoeWeights
    if number < spec.first_dense_layers:
        mlp = dense(spec.intermediate_size)
    else:
        count, shared_width = spec.num_experts, spec.num_shared_experts * spec.moe_intermediate_size
        stacks = spec.num_shared_experts == 1  # of a routed one's width, it goes behind them
        gate_up = empty(count + stacks, 2 * expert, hidden)
        down = empty(count + stacks, hidden, expert)
        shared = DenseWeights(gate_up[count], down[count]) if stacks else dense(shared_width)
        mlp = MoeWeights(
            router=empty(count, hidden, dtype=torch.float32),
            correction_bias=empty(count, dtype=torch.float32),
            settings=RouterSettings(
                spec.num_experts_per_token,
                spec.num_expert_groups,
                spec.num_groups_per_token,
                spec.norm_topk_prob,
                spec.routed_scaling_factor,
            ),
            gate_up=gate_up[:count],
            down=down[:count],
            shared=shared if shared_width else None,
            stacked=(gate_up, down) if stacks else None,
        )
    return DecoderLayer(empty(hidden), attention, empty(hidden), mlp, spec, ranks)


def _placements(
    model: ModelWeights, spec: ModelSpec, ranks: Ranks
) -> Iterator[tuple[str, Placement]]:
    """(checkpoint name, where it goes) for every tensor of the model."""
    yield _EMBEDDING, Placement(model.embedding)
    for number, layer in enumerate(model.layers):
        yield from _layer_placements(f"model.layers.{number}", layer, spec, ranks)
    yield "model.norm.weight", Placement(model.norm)
    yield _HEAD, _head_placement(model.head, spec, ranks)
    if model.nextn is not None:
        yield from _nextn_placements(model, model.nextn, spec, ranks)


def _nextn_placements(
    model: ModelWeights, nextn: NextnWeights, spec: ModelSpec, ranks: Ranks
) -> Iterator[tuple[str, Placement]]:
    prefix = f"model.layers.{spec.num_layers}"
    yield f"{prefix}.enorm.weight", Placement(nextn.enorm)
    yield f"{prefix}.hnorm.weight", Placement(nextn.hnorm)
    yield f"{prefix}.eh_proj.weight", Placement(nextn.eh_proj)
    yield from _layer_placements(prefix, nextn.layer, spec, ranks)
    yield f"{prefix}.shared_head.norm.weight", Placement(nextn.norm)
    if nextn.embedding is not model.embedding:
        yield f"{prefix}.embed_tokens.weight", Placement(nextn.embedding)
    if nextn.head is not model.head:
        yield f"{prefix}.shared_head.head.weight", _head_placement(nextn.head, spec, ranks)


def _head_placement(head: Tensor, spec: ModelSpec, ranks: Ranks) -> Placement:
    rows = _share(spec.vocab_size, ranks)
    return Placement(head[: len(range(*rows.indices(spec.vocab_size)))], rows)


def _layer_placements(
    prefix: str, layer: DecoderLayer, spec: ModelSpec, ranks: Ranks
) -> Iterator[tuple[str, Placement]]:
    yield f"{prefix}.input_layernorm.weight", Placement(layer.input_norm)
    yield f"{prefix}.post_attention_layernorm.weight", Placement(layer.mlp_norm)
    yield from _attention_placements(f"{prefix}.self_attn", layer.attention, spec, ranks)
    if isinstance(layer.mlp, DenseWeights):
        yield from _mlp_placements(f"{prefix}.mlp", layer.mlp.gate_up, layer.mlp.down, ranks)
    else:
        yield from _moe_placements(f"{prefix}.mlp", layer.mlp, ranks)


def _attention_placements(
    prefix: str, weights: AttentionWeights, spec: ModelSpec, ranks: Ranks
) -> Iterator[tuple[str, Placement]]:
    q_a, kv_a = weights.qkv_a[: spec.q_lora_rank], weights.qkv_a[spec.q_lora_rank :]
    up_rows = spec.num_heads * (spec.qk_nope_head_dim + spec.v_head_dim)
    q_rows = _share(spec.num_heads * spec.qk_head_dim, ranks)
    o_columns = _share(spec.num_heads * spec.v_head_dim, ranks)
    yield f"{prefix}.q_a_proj.weight", Placement(q_a)
    yield f"{prefix}.kv_a_proj_with_mqa.weight", Placement(kv_a)
    yield f"{prefix}.q_a_layernorm.weight", Placement(weights.q_norm)
    yield f"{prefix}.kv_a_layernorm.weight", Placement(weights.kv_norm)
    yield f"{prefix}.q_b_proj.weight", Placement(weights.q_b, q_rows)
    kv_b = Placement(weights.kv_b.flatten(0, 1), _share(up_rows, ranks))
    yield f"{prefix}.kv_b_proj.weight", kv_b
    yield f"{prefix}.o_proj.weight", Placement(weights.o, columns=o_columns)


def _moe_placements(
    prefix: str, weights: MoeWeights, ranks: Ranks
) -> Iterator[tuple[str, Placement]]:
    yield f"{prefix}.gate.weight", Placement(weights.router)
    yield f"{prefix}.gate.e_score_correction_bias", Placement(weights.correction_bias)
    for expert, (gate_up, down) in enumerate(zip(weights.gate_up, weights.down, strict=True)):
        yield from _mlp_placements(f"{prefix}.experts.{expert}", gate_up, down, ranks)
    if weights.shared is not None:
        shared = weights.shared
        yield from _mlp_placements(f"{prefix}.shared_experts", shared.gate_up, shared.down, ranks)


def _mlp_placements(
    prefix: str, gate_up: Tensor, down: Tensor, ranks: Ranks
) -> Iterator[tuple[str, Placement]]:
    gate, up = gate_up.chunk(2)
    width = _share(len(gate) * ranks.size, ranks)
    yield f"{prefix}.gate_proj.weight", Placement(gate, width)
    yield f"{prefix}.up_proj.weight", Placement(up, width)
    yield f"{prefix}.down_proj.weight", Placement(down, columns=width)


def _share(size: int, ranks: Ranks) -> slice:
    return WHOLE if ranks.size == 1 else ranks.split(size)
