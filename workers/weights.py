"""Fills a rank's weights, from a checked checkpoint or with noise.

`_placements` says where each tensor of a checkpoint lands and which part of it; loading and
random filling both follow it. Whether the checkpoint is sound is `checkpoint.py`'s business.
"""

import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..shared.errors import ModelError
from ..shared.model_spec import ModelSpec
from .checkpoint import CheckpointIndex
from .model.glm4_moe_lite import LayerWeights, ModelWeights
from .model.mla import AttentionWeights
from .model.moe import DenseWeights, MoeWeights
from .parallel import Ranks

_BATCH_BYTES = 256 << 20  # one reader task, also the grain of progress reports
_WHOLE = slice(None)

Report = Callable[[int, int], None]  # (bytes done, bytes in total)


class _Placement(NamedTuple):
    """`target` takes rows `rows` and columns `columns` of the checkpoint's tensor."""

    target: Tensor
    rows: slice = _WHOLE
    columns: slice = _WHOLE


def load_weights(
    index: CheckpointIndex,
    spec: ModelSpec,
    ranks: Ranks,
    dtype: torch.dtype,
    device: str,
    num_threads: int,
    report: Report,
) -> ModelWeights:
    """Allocate this rank's weights and read them with `num_threads` threads. `report` is called
    in the calling thread. Raises ModelError naming the file that cannot be read."""
    model = _allocate(spec, ranks, dtype, device)
    placements = dict(_placements(model, spec, ranks))
    batches = list(_batches(index))
    done = 0
    with ThreadPoolExecutor(max(1, num_threads)) as pool:
        reads = [pool.submit(_read, file, names, placements) for file, names, _ in batches]
        sizes = dict(zip(reads, (size for _, _, size in batches), strict=True))
        try:
            for read in as_completed(reads):
                read.result()
                done += sizes[read]
                report(done, index.num_bytes)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return model


def random_weights(
    spec: ModelSpec, ranks: Ranks, dtype: torch.dtype, device: str, seed: int = 0
) -> ModelWeights:
    """Noise of sensible scale, made on the device: norms near 1, matrices by fan-in. Replicated
    tensors are equal on all ranks."""
    model = _allocate(spec, ranks, dtype, device)
    generator = torch.Generator(device)
    for name, place in _placements(model, spec, ranks):
        split = place.rows != _WHOLE or place.columns != _WHOLE
        generator.manual_seed(zlib.crc32(f"{seed} {name} {split * ranks.rank}".encode()))
        if name.endswith("e_score_correction_bias"):
            place.target.normal_(0, 0.05, generator=generator)
        elif place.target.dim() == 1:
            place.target.fill_(1)
        else:
            fan_in = place.target.shape[1] * (ranks.size if place.columns != _WHOLE else 1)
            scale = 1.0 if name == "model.embed_tokens.weight" else fan_in**-0.5
            place.target.normal_(0, scale, generator=generator)
    return model


def _batches(index: CheckpointIndex) -> Iterator[tuple[Path, list[str], int]]:
    """(file, tensor names, bytes): runs of tensors of one file, large enough for one task."""
    by_file: dict[Path, list[str]] = {}
    for name, entry in index.tensors.items():
        by_file.setdefault(entry.file, []).append(name)
    for file, names in by_file.items():
        batch: list[str] = []
        size = 0
        for name in names:
            batch.append(name)
            size += index.tensors[name].num_bytes
            if size >= _BATCH_BYTES:
                yield file, batch, size
                batch, size = [], 0
        if batch:
            yield file, batch, size


def _read(file: Path, names: list[str], placements: dict[str, _Placement]) -> None:
    try:
        with safe_open(file, framework="pt") as source:
            for name in names:
                place = placements[name]
                part = source.get_slice(name)
                if place.target.dim() == 1:
                    place.target.copy_(part[:])
                else:
                    place.target.copy_(part[place.rows, place.columns])
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file}: {error}") from error


def _allocate(spec: ModelSpec, ranks: Ranks, dtype: torch.dtype, device: str) -> ModelWeights:
    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def dense(width: int) -> DenseWeights:
        share = width // ranks.size
        return DenseWeights(empty(2 * share, hidden), empty(hidden, share))

    hidden, heads = spec.hidden_size, spec.num_heads // ranks.size
    up_dim = spec.qk_nope_head_dim + spec.v_head_dim
    expert = spec.moe_intermediate_size // ranks.size
    layers = []
    for layer in range(spec.num_layers):
        attention = AttentionWeights(
            qkv_a=empty(spec.q_lora_rank + spec.latent_dim, hidden),
            q_norm=empty(spec.q_lora_rank),
            q_b=empty(heads * spec.qk_head_dim, spec.q_lora_rank),
            kv_norm=empty(spec.kv_lora_rank),
            kv_b=empty(heads, up_dim, spec.kv_lora_rank),
            o=empty(hidden, heads * spec.v_head_dim),
        )
        mlp: DenseWeights | MoeWeights
        if layer < spec.first_dense_layers:
            mlp = dense(spec.intermediate_size)
        else:
            shared_width = spec.num_shared_experts * spec.moe_intermediate_size
            mlp = MoeWeights(
                router=empty(spec.num_experts, hidden, dtype=torch.float32),
                correction_bias=empty(spec.num_experts, dtype=torch.float32),
                gate_up=empty(spec.num_experts, 2 * expert, hidden),
                down=empty(spec.num_experts, hidden, expert),
                shared=dense(shared_width) if shared_width else None,
            )
        layers.append(LayerWeights(empty(hidden), attention, empty(hidden), mlp))
    head = torch.zeros(-(-spec.vocab_size // ranks.size), hidden, dtype=dtype, device=device)
    return ModelWeights(empty(spec.vocab_size, hidden), layers, empty(hidden), head)


def _placements(
    model: ModelWeights, spec: ModelSpec, ranks: Ranks
) -> Iterator[tuple[str, _Placement]]:
    """(checkpoint name, where it goes) for every tensor of the main model."""
    yield "model.embed_tokens.weight", _Placement(model.embedding)
    for number, layer in enumerate(model.layers):
        prefix = f"model.layers.{number}"
        yield f"{prefix}.input_layernorm.weight", _Placement(layer.input_norm)
        yield f"{prefix}.post_attention_layernorm.weight", _Placement(layer.mlp_norm)
        yield from _attention_placements(f"{prefix}.self_attn", layer.attention, spec, ranks)
        if isinstance(layer.mlp, DenseWeights):
            yield from _mlp_placements(f"{prefix}.mlp", layer.mlp.gate_up, layer.mlp.down, ranks)
        else:
            yield from _moe_placements(f"{prefix}.mlp", layer.mlp, ranks)
    yield "model.norm.weight", _Placement(model.norm)
    rows = _share(spec.vocab_size, ranks)
    head = model.head[: len(range(*rows.indices(spec.vocab_size)))]
    yield "lm_head.weight", _Placement(head, rows)


def _attention_placements(
    prefix: str, weights: AttentionWeights, spec: ModelSpec, ranks: Ranks
) -> Iterator[tuple[str, _Placement]]:
    q_a, kv_a = weights.qkv_a[: spec.q_lora_rank], weights.qkv_a[spec.q_lora_rank :]
    up_rows = spec.num_heads * (spec.qk_nope_head_dim + spec.v_head_dim)
    q_rows = _share(spec.num_heads * spec.qk_head_dim, ranks)
    o_columns = _share(spec.num_heads * spec.v_head_dim, ranks)
    yield f"{prefix}.q_a_proj.weight", _Placement(q_a)
    yield f"{prefix}.kv_a_proj_with_mqa.weight", _Placement(kv_a)
    yield f"{prefix}.q_a_layernorm.weight", _Placement(weights.q_norm)
    yield f"{prefix}.kv_a_layernorm.weight", _Placement(weights.kv_norm)
    yield f"{prefix}.q_b_proj.weight", _Placement(weights.q_b, q_rows)
    kv_b = _Placement(weights.kv_b.flatten(0, 1), _share(up_rows, ranks))
    yield f"{prefix}.kv_b_proj.weight", kv_b
    yield f"{prefix}.o_proj.weight", _Placement(weights.o, columns=o_columns)


def _moe_placements(
    prefix: str, weights: MoeWeights, ranks: Ranks
) -> Iterator[tuple[str, _Placement]]:
    yield f"{prefix}.gate.weight", _Placement(weights.router)
    yield f"{prefix}.gate.e_score_correction_bias", _Placement(weights.correction_bias)
    for expert, (gate_up, down) in enumerate(zip(weights.gate_up, weights.down, strict=True)):
        yield from _mlp_placements(f"{prefix}.experts.{expert}", gate_up, down, ranks)
    if weights.shared is not None:
        shared = weights.shared
        yield from _mlp_placements(f"{prefix}.shared_experts", shared.gate_up, shared.down, ranks)


def _mlp_placements(
    prefix: str, gate_up: Tensor, down: Tensor, ranks: Ranks
) -> Iterator[tuple[str, _Placement]]:
    gate, up = gate_up.chunk(2)
    width = _share(len(gate) * ranks.size, ranks)
    yield f"{prefix}.gate_proj.weight", _Placement(gate, width)
    yield f"{prefix}.up_proj.weight", _Placement(up, width)
    yield f"{prefix}.down_proj.weight", _Placement(down, columns=width)


def _share(size: int, ranks: Ranks) -> slice:
    return _WHOLE if ranks.size == 1 else ranks.split(size)
