"""Dimensions of the model, read from a checkpoint's `config.json`.

Only this file knows the Hugging Face key names of `glm4_moe_lite`. They are defined in
`configuration_glm4_moe_lite.py` of transformers.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import ServeConfig
from .errors import ModelError

_MAX_FILE_BYTES = 16 << 20  # of config.json
# The largest numbers of config.json. Larger ones would only make a start take very long.
_MAX_WIDTH = 1 << 20
_MAX_EXPERTS = 1 << 17  # in all layers together
_MOST = {
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 30,
    "num_hidden_layers": 1024,
    "num_nextn_predict_layers": 16,
    "num_attention_heads": 4096,
    "n_routed_experts": 4096,
    "n_shared_experts": 64,
}


@dataclass(frozen=True)
class ModelSpec:
    """Dimensions of one `Glm4MoeLiteForCausalLM`. In brackets: the values of GLM-4.7-Flash."""

    vocab_size: int  # rows of embedding and head [154880]
    num_token_ids: int  # ids the tokenizer knows; rows above are padding, never sampled [154856]
    hidden_size: int  # [2048]
    num_layers: int  # without NextN layers [47]
    num_nextn_layers: int  # MTP layers after the main ones [1]
    num_heads: int  # [20]
    q_lora_rank: int  # [768]
    kv_lora_rank: int  # [512]
    qk_nope_head_dim: int  # [192]
    qk_rope_head_dim: int  # [64]
    v_head_dim: int  # [256]
    intermediate_size: int  # of the dense first layers [10240]
    moe_intermediate_size: int  # of one expert [1536]
    num_experts: int  # [64]
    num_experts_per_token: int  # [4]
    num_shared_experts: int  # [1]
    num_expert_groups: int  # n_group [1]
    num_groups_per_token: int  # topk_group [1]
    first_dense_layers: int  # first_k_dense_replace [1]
    routed_scaling_factor: float  # [1.8]
    norm_topk_prob: bool  # [True]
    rope_theta: float  # [1e6]
    rope_interleave: bool  # [True]
    rms_norm_eps: float  # [1e-5]; the two MLA norms use 1e-6 as transformers does
    max_position_embeddings: int  # [202752]
    eos_token_ids: tuple[int, ...]  # [154820, 154827, 154829]
    dtype: str  # of the checkpoint [bfloat16]

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head [256]."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Width of one cached token in one layer: compressed KV and rope key [576]."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """1/sqrt(qk_head_dim); the family uses no yarn factor."""
        return 1 / math.sqrt(self.qk_head_dim)


def num_kv_layers(spec: ModelSpec, config: ServeConfig) -> int:
    """Layers whose latents a page holds: the main ones, and one for the draft layer. With
    vanilla_with_att there is one for each draft."""
    if config.mtp_mode is None:
        return spec.num_layers
    return spec.num_layers + (config.mtp_step if config.mtp_mode == "vanilla_with_att" else 1)


def load_model_spec(model_dir: Path) -> ModelSpec:
    """Read and check `config.json`. Raises ModelError naming the key that is missing or wrong."""
    path = model_dir / "config.json"
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ModelError(f"{path} has more than {_MAX_FILE_BYTES} bytes")
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelError(f"{model_dir} has no config.json: not a model directory") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: {error}") from error
    if not isinstance(raw, dict) or raw.get("model_type") != "glm4_moe_lite":
        model_type = raw.get("model_type") if isinstance(raw, dict) else type(raw).__name__
        raise ModelError(
            f"{path}: model_type is {model_type!r}; this server runs 'glm4_moe_lite' only"
        )
    return _spec_from_config(raw, path)


def _spec_from_config(raw: dict[str, Any], path: Path) -> ModelSpec:
    def integer(key: str, default: int | None = None, least: int = 1) -> int:
        value, most = raw.get(key, default), _MOST.get(key, _MAX_WIDTH)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ModelError(f"{path}: {key} is {value!r:.80}, needs a whole number >= {least}")
        if value > most:
            raise ModelError(f"{path}: {key} is {value!r:.80}, at most {most} is supported")
        return value

    def number(key: str, default: float) -> float:
        value = raw.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise ModelError(f"{path}: {key} is {value!r:.80}, needs a number > 0 and < 1e30")
        return float(value)

    rope = raw.get("rope_parameters") or {}  # transformers 5 moved rope_theta there
    for value in (rope, raw.get("rope_scaling") or {}):
        if not isinstance(value, dict) or value.get("rope_type", "default") != "default":
            raise ModelError(f"{path}: rope scaling {value} is not supported")
    if number("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ModelError(f"{path}: partial_rotary_factor must be 1.0")
    fixed = {"hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False}
    for key, expected in fixed.items():
        if raw.get(key, expected) != expected:
            raise ModelError(f"{path}: {key} is {raw[key]!r}, only {expected!r} is supported")
    eos = raw.get("eos_token_id", [])
    eos_ids = tuple(eos if isinstance(eos, list) else [eos] if eos is not None else [])
    spec = ModelSpec(
        vocab_size=integer("vocab_size"),
        num_token_ids=min(_count_token_ids(path.parent), integer("vocab_size")),
        hidden_size=integer("hidden_size"),
        num_layers=integer("num_hidden_layers"),
        num_nextn_layers=integer("num_nextn_predict_layers", 0, least=0),
        num_heads=integer("num_attention_heads"),
        q_lora_rank=integer("q_lora_rank"),
        kv_lora_rank=integer("kv_lora_rank"),
        qk_nope_head_dim=integer("qk_nope_head_dim"),
        qk_rope_head_dim=integer("qk_rope_head_dim"),
        v_head_dim=integer("v_head_dim"),
        intermediate_size=integer("intermediate_size"),
        moe_intermediate_size=integer("moe_intermediate_size"),
        num_experts=integer("n_routed_experts"),
        num_experts_per_token=integer("num_experts_per_tok"),
        num_shared_experts=integer("n_shared_experts", 1, least=0),
        num_expert_groups=integer("n_group", 1),
        num_groups_per_token=integer("topk_group", 1),
        first_dense_layers=_count_dense_layers(raw, path),
        routed_scaling_factor=number("routed_scaling_factor", 1.8),
        norm_topk_prob=bool(raw.get("norm_topk_prob", True)),
        rope_theta=number("rope_theta", rope.get("rope_theta", 1e6)),
        rope_interleave=bool(raw.get("rope_interleave", True)),
        rms_norm_eps=number("rms_norm_eps", 1e-5),
        max_position_embeddings=integer("max_position_embeddings"),
        eos_token_ids=eos_ids,
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"),
    )
    _check(spec, path)
    return spec


def _check(spec: ModelSpec, path: Path) -> None:
    """Raise ModelError for dimensions that contradict each other."""
    if spec.num_experts * (spec.num_layers + spec.num_nextn_layers) > _MAX_EXPERTS:
        raise ModelError(f"{path}: num_hidden_layers x n_routed_experts exceeds {_MAX_EXPERTS}")
    if spec.num_experts % spec.num_expert_groups:
        raise ModelError(f"{path}: n_group does not divide n_routed_experts")
    if spec.num_groups_per_token > spec.num_expert_groups:
        raise ModelError(f"{path}: topk_group exceeds n_group")
    group = spec.num_experts // spec.num_expert_groups
    if spec.num_experts_per_token > spec.num_groups_per_token * group:
        raise ModelError(f"{path}: num_experts_per_tok exceeds n_routed_experts of topk_group")
    for eos in spec.eos_token_ids:
        if not isinstance(eos, int) or not 0 <= eos < spec.vocab_size:
            raise ModelError(f"{path}: eos_token_id {eos!r}, vocab_size is {spec.vocab_size}")


def _count_dense_layers(raw: dict[str, Any], path: Path) -> int:
    """From `mlp_layer_types`, which transformers writes, or from `first_k_dense_replace`, which the
    published checkpoint has."""
    kinds = raw.get("mlp_layer_types")
    if kinds is None:
        count = raw.get("first_k_dense_replace", 1)
    else:
        count = kinds.count("dense") if isinstance(kinds, list) else -1
        if kinds != ["dense"] * count + ["sparse"] * (raw["num_hidden_layers"] - count):
            raise ModelError(f"{path}: mlp_layer_types must be dense layers, then sparse ones")
    most = _MOST["num_hidden_layers"]
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= most:
        problem = f"needs a whole number from 0 to {most}"
        raise ModelError(f"{path}: first_k_dense_replace is {count!r:.80}, {problem}")
    return count


def _count_token_ids(model_dir: Path) -> int:
    """Largest id in `tokenizer.json` + 1. Without that file no row is padding: a huge number."""
    path = model_dir / "tokenizer.json"
    if not path.exists():
        return 1 << 62
    try:
        raw = json.loads(path.read_text())
        ids = [*raw["model"]["vocab"].values(), *(token["id"] for token in raw["added_tokens"])]
        return int(max(ids)) + 1
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{path}: not a tokenizer file ({error!r})") from error
