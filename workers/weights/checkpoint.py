"""Checks a safetensors checkpoint against the model it should hold, reading file headers only.

Imports no torch, so the launcher can refuse a bad checkpoint in a second. `weights.py` reads the
tensors. Format: 8 bytes header length, JSON header, tensor bytes without gaps.
"""

import json
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

from ...shared.config import ServeConfig
from ...shared.errors import ModelError
from ...shared.fingerprint import INDEX_FILE, SINGLE_FILE
from ...shared.model_spec import ModelSpec

_MAX_HEADER_BYTES = 32 << 20  # also of the index; a tensor takes some 150
_MAX_DIMS = 8
_MAX_TENSORS = 200_000
_ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1}
_ITEM_BYTES |= {"U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
_DTYPE_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_BIAS = "e_score_correction_bias"
_ROUTER = (f".gate.{_BIAS}", ".gate.weight")  # float32 in some checkpoints, whatever the rest is

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `num_bytes` from byte `begin` of the file, row after row. `dtype` is
    safetensors' code, such as BF16."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    num_bytes: int


@dataclass(frozen=True)
class CheckpointIndex:
    """A checked checkpoint: every tensor of the main model, and whether NextN layers came along."""

    tensors: dict[str, TensorEntry]
    has_nextn: bool

    @property
    def num_bytes(self) -> int:
        """Bytes of the main model's tensors."""
        return sum(entry.num_bytes for entry in self.tensors.values())


def check_weights(model_dir: Path, spec: ModelSpec) -> CheckpointIndex:
    """Read all headers and check that index, files and model agree. Raises ModelError naming the
    file and tensor: missing, unknown, wrongly shaped or typed tensors, truncated or absent files.

    NextN layers may be absent as a whole (transformers drops them when saving): one warning.
    """
    found = _read_tensor_table(model_dir)
    expected = main_tensor_shapes(spec)
    layers = range(spec.num_layers, spec.num_layers + spec.num_nextn_layers)
    nextn, optional = _nextn_tensor_shapes(spec, layers)
    has_nextn = any(name in found for name in nextn | optional)
    if nextn and not has_nextn:
        logger.warning("%s has no NextN layer: fine, but no drafts from it", model_dir)
    required = expected | nextn if has_nextn else expected
    missing = sorted(required.keys() - found.keys())
    if missing:
        raise ModelError(f"{model_dir}: tensor {_first_of(missing)} is missing")
    unknown = sorted(found.keys() - required.keys() - optional.keys())
    if unknown:
        file = found[unknown[0]].file
        raise ModelError(f"{file}: tensor {_first_of(unknown)} is not part of this model")
    for name, shape in (required | optional).items():
        if name in found:
            _check_tensor(name, found[name], shape, spec)
    return CheckpointIndex({name: found[name] for name in expected}, has_nextn)


def check_draft(config: ServeConfig, spec: ModelSpec) -> dict[str, TensorEntry] | None:
    """The tensors of the first NextN layer, from `mtp_draft_model_dir` or else the model itself;
    copies of embedding and head may be missing. None without `mtp_mode`. Raises ModelError like
    `check_weights`; other tensors in the directory are ignored."""
    if config.mtp_mode is None:
        return None
    dirs = [Path(path) for path in config.mtp_draft_model_dir or (config.model_dir,)]
    if len({path.resolve() for path in dirs}) > 1:
        logger.warning("all drafts come from the layer in %s, the first directory", dirs[0])
    found = _read_tensor_table(dirs[0])
    required, optional = _nextn_tensor_shapes(spec, [spec.num_layers])
    missing = sorted(required.keys() - found.keys())
    if missing:
        raise ModelError(
            f"{dirs[0]}: tensor {_first_of(missing)} is missing: --mtp_mode needs the NextN layer; "
            "give a checkpoint that has it as --mtp_draft_model_dir or drop --mtp_mode"
        )
    shapes = {name: shape for name, shape in (required | optional).items() if name in found}
    for name, shape in shapes.items():
        _check_tensor(name, found[name], shape, spec)
    return {name: found[name] for name in shapes}


def main_tensor_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the main model, in the order of the forward pass."""
    shapes: dict[str, tuple[int, ...]] = {}
    shapes["model.embed_tokens.weight"] = (spec.vocab_size, spec.hidden_size)
    for layer in range(spec.num_layers):
        shapes |= _layer_shapes(spec, layer)
    shapes["model.norm.weight"] = (spec.hidden_size,)
    shapes["lm_head.weight"] = (spec.vocab_size, spec.hidden_size)
    return shapes


def nextn_tensor_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The same for the first NextN layer, without the copies of embedding and head."""
    return _nextn_tensor_shapes(spec, [spec.num_layers])[0]


def _nextn_tensor_shapes(
    spec: ModelSpec, layers: Iterable[int]
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """NextN layers: (needed when there is one, copies of shared tensors that may be left out)."""
    needed: dict[str, tuple[int, ...]] = {}
    copies: dict[str, tuple[int, ...]] = {}
    hidden = spec.hidden_size
    for layer in layers:
        prefix = f"model.layers.{layer}"
        needed |= _layer_shapes(spec, layer)
        needed[f"{prefix}.eh_proj.weight"] = (hidden, 2 * hidden)
        for norm in ("enorm", "hnorm", "shared_head.norm"):
            needed[f"{prefix}.{norm}.weight"] = (hidden,)
        for copy in ("embed_tokens", "shared_head.head"):
            copies[f"{prefix}.{copy}.weight"] = (spec.vocab_size, hidden)
    return needed, copies


def _layer_shapes(spec: ModelSpec, layer: int) -> dict[str, tuple[int, ...]]:
    name, hidden = f"model.layers.{layer}", spec.hidden_size
    up_dim = spec.qk_nope_head_dim + spec.v_head_dim
    attention: dict[str, tuple[int, ...]] = {
        "q_a_proj": (spec.q_lora_rank, hidden),
        "q_a_layernorm": (spec.q_lora_rank,),
        "q_b_proj": (spec.num_heads * spec.qk_head_dim, spec.q_lora_rank),
        "kv_a_proj_with_mqa": (spec.latent_dim, hidden),
        "kv_a_layernorm": (spec.kv_lora_rank,),
        "kv_b_proj": (spec.num_heads * up_dim, spec.kv_lora_rank),
        "o_proj": (hidden, spec.num_heads * spec.v_head_dim),
    }
    shapes = {f"{name}.self_attn.{key}.weight": shape for key, shape in attention.items()}
    shapes[f"{name}.input_layernorm.weight"] = (hidden,)
    shapes[f"{name}.post_attention_layernorm.weight"] = (hidden,)
    if layer < spec.first_dense_layers:
        return shapes | _mlp_shapes(f"{name}.mlp", hidden, spec.intermediate_size)
    shapes[f"{name}.mlp.gate.weight"] = (spec.num_experts, hidden)
    shapes[f"{name}.mlp.gate.{_BIAS}"] = (spec.num_experts,)
    for expert in range(spec.num_experts):
        shapes |= _mlp_shapes(f"{name}.mlp.experts.{expert}", hidden, spec.moe_intermediate_size)
    if spec.num_shared_experts:
        width = spec.num_shared_experts * spec.moe_intermediate_size
        shapes |= _mlp_shapes(f"{name}.mlp.shared_experts", hidden, width)
    return shapes


def _mlp_shapes(prefix: str, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gate_proj.weight": (width, hidden),
        f"{prefix}.up_proj.weight": (width, hidden),
        f"{prefix}.down_proj.weight": (hidden, width),
    }


def _check_tensor(name: str, entry: TensorEntry, shape: tuple[int, ...], spec: ModelSpec) -> None:
    if entry.shape != shape:
        raise ModelError(f"{entry.file}: tensor {name} has shape {entry.shape}, expected {shape}")
    code = _DTYPE_CODES.get(spec.dtype, spec.dtype)
    allowed = {code, "F32"} if name.endswith(_ROUTER) else {code}
    if entry.dtype not in allowed:
        raise ModelError(f"{entry.file}: tensor {name} is {entry.dtype}, expected {code}")


def _read_tensor_table(model_dir: Path) -> dict[str, TensorEntry]:
    """All tensors of all files of the checkpoint; the index must list exactly these."""
    index_path = model_dir / INDEX_FILE
    if not index_path.exists():
        if not (model_dir / SINGLE_FILE).exists():
            raise ModelError(f"{model_dir} has neither {INDEX_FILE} nor {SINGLE_FILE}")
        return _read_header(model_dir / SINGLE_FILE)
    weight_map = _read_weight_map(index_path)
    files = sorted(set(weight_map.values()))
    stray = {path.name for path in model_dir.glob("model*.safetensors")} - set(files)
    if stray:
        raise ModelError(f"{model_dir / min(stray)} is not in {INDEX_FILE}")
    table: dict[str, TensorEntry] = {}
    for file in files:
        for name, entry in _read_header(model_dir / file).items():
            if weight_map.get(name) != file:
                place = weight_map.get(name, "no file")
                raise ModelError(
                    f"{entry.file}: holds tensor {name}, which {INDEX_FILE} puts in {place}"
                )
            table[name] = entry
    missing = sorted(weight_map.keys() - table.keys())
    if missing:
        file = weight_map[missing[0]]
        raise ModelError(
            f"{model_dir / file}: tensor {_first_of(missing)} is missing, {INDEX_FILE} puts it here"
        )
    return table


def _read_weight_map(path: Path) -> dict[str, str]:
    try:
        if path.stat().st_size > _MAX_HEADER_BYTES:
            raise ModelError(f"{path} has more than {_MAX_HEADER_BYTES} bytes")
        weight_map = json.loads(path.read_bytes())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{path}: not an index ({error!r})") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{path}: weight_map is empty or not a table")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ModelError(f"{path}: tensor {name} is in {file!r}, not a file of this directory")
    return weight_map


def _read_header(path: Path) -> dict[str, TensorEntry]:
    """Tensors of one file, whose length must be the one in its header."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= header_bytes <= size - 8:
                raise ModelError(f"{path}: no safetensors header ({size} bytes): truncated?")
            if header_bytes > _MAX_HEADER_BYTES:
                problem = f"a header of {header_bytes} bytes, at most {_MAX_HEADER_BYTES}"
                raise ModelError(f"{path}: {problem}")
            header = json.loads(file.read(header_bytes))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing, {INDEX_FILE} names it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: unreadable safetensors header: {error}") from error
    if not isinstance(header, dict):
        raise ModelError(f"{path}: safetensors header is not a table")
    header.pop("__metadata__", None)
    if len(header) > _MAX_TENSORS:
        raise ModelError(f"{path}: {len(header)} tensors in one file, at most {_MAX_TENSORS}")
    entries: dict[str, TensorEntry] = {}
    spans: list[tuple[int, int, str]] = []
    data = 8 + header_bytes
    for name, raw in header.items():
        entry = entries[name] = _parse_entry(path, name, raw, data)
        spans.append((entry.begin - data, entry.begin - data + entry.num_bytes, name))
    _check_spans(path, sorted(spans), size - data)
    return entries


def _parse_entry(path: Path, name: str, raw: Any, data: int) -> TensorEntry:
    """`data`: where in the file the offsets count from."""
    try:
        dtype, shape = raw["dtype"], tuple(map(index, raw["shape"]))
        begin, end = map(index, raw["data_offsets"])
        if len(shape) > _MAX_DIMS or max((end, *shape)) >= 1 << 62:
            raise ValueError("numbers beyond all limits")
        length = math.prod(shape) * _ITEM_BYTES[dtype]
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: tensor {name}: bad header entry ({error!r})") from error
    if end - begin != length or begin < 0:
        raise ModelError(f"{path}: tensor {name}: {end - begin} bytes for {dtype} {shape}")
    return TensorEntry(path, dtype, shape, data + begin, length)


def _check_spans(path: Path, spans: list[tuple[int, int, str]], data_bytes: int) -> None:
    """Tensors must follow each other without gap or overlap up to the end of the file."""
    position = 0
    for begin, end, name in spans:
        if begin != position:
            raise ModelError(f"{path}: tensor {name} begins at {begin}, expected {position}")
        if end > data_bytes:
            raise ModelError(
                f"{path}: truncated: tensor {name} ends at {end} of {data_bytes} data bytes"
            )
        position = end
    if position != data_bytes:
        raise ModelError(f"{path}: {data_bytes - position} bytes after the last tensor")


def _first_of(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"
