"""Writes tiny `Glm4MoeLiteForCausalLM` checkpoints in the Hugging Face layout of GLM-4.7-Flash:
sharded bf16 safetensors with an index, all tensor names including the NextN layer, a byte-level BPE
tokenizer with GLM's special tokens, chat template, generation config.

`training/train.py` writes the demo model with it. `make_checkpoint` writes random weights for
tests.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")

# The 36 added tokens in the order of their ids in GLM-4.7-Flash (154820 onwards).
SPECIAL_TOKENS = (
    "<|endoftext|> [MASK] [gMASK] [sMASK] <sop> <eop> <|system|> <|user|> <|assistant|> "
    "<|observation|> <|begin_of_image|> <|end_of_image|> <|begin_of_video|> <|end_of_video|> "
    "<|begin_of_audio|> <|end_of_audio|> <|begin_of_transcription|> <|end_of_transcription|> "
    "<|code_prefix|> <|code_middle|> <|code_suffix|> <think> </think> <tool_call> </tool_call> "
    "<tool_response> </tool_response> <arg_key> </arg_key> <arg_value> </arg_value> /nothink "
    "<|begin_of_box|> <|end_of_box|> <|image|> <|video|>"
).split()
# Kept in decoded text even when special tokens are skipped, as in the real tokenizer.
_PLAIN_TOKENS = {t for t in SPECIAL_TOKENS if t[1] not in "|gsM" and t not in ("<sop>", "<eop>")}
_WORDS = (
    "the of and to in is that for it as was with be by on not he this are or his from at which "
    "but have an had they you were there one all we can has been when who will more no if out "
    "so said what up its about into than them could time these two may then do first any my now "
    "such like our over man me even most made after also did many before must through back "
    "years where much your way well down should because each just those people how too little "
    "state good very make world still own see men work long get here between both life being "
    "under never day same another know while last might us great old year off come since "
    "against go came right used take three model token answer question tool call name value "
    "function string number true false null What Hello AI"
).split()
_PIECES = r"[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"
_PAD_ROWS = 24  # rows of the embedding without a token, as in the real model


def tiny_config(**overrides: Any) -> dict[str, Any]:
    """`config.json` of the tiny model. GPU kernels accept its head widths."""
    return {
        "architectures": ["Glm4MoeLiteForCausalLM"],
        "model_type": "glm4_moe_lite",
        "dtype": "bfloat16",
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_nextn_predict_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.8,
        "rope_theta": 1000000,
        "rope_scaling": None,
        "partial_rotary_factor": 1.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        **overrides,
    }


def trained_config(tokenizer: Any) -> dict[str, Any]:
    """`config.json` of the demo model that `training/train.py` makes."""
    return tiny_config(
        **_token_ids(tokenizer),
        hidden_size=320,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        q_lora_rank=160,
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=64,
        intermediate_size=1280,
        moe_intermediate_size=128,
        n_routed_experts=16,
        max_position_embeddings=65536,
    )


def small_config(tokenizer: Any) -> dict[str, Any]:
    """The same in small, which a CPU trains in minutes."""
    return trained_config(tokenizer) | {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "v_head_dim": 32,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
    }


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the checkpoint by name, NextN layers included."""
    hidden, vocab, heads = (
        config["hidden_size"],
        config["vocab_size"],
        config["num_attention_heads"],
    )
    q_rank, kv_rank = config["q_lora_rank"], config["kv_lora_rank"]
    nope, rope, value = (config[f"{k}_head_dim"] for k in ("qk_nope", "qk_rope", "v"))
    expert, experts = config["moe_intermediate_size"], config["n_routed_experts"]
    layers, nextn = config["num_hidden_layers"], config["num_nextn_predict_layers"]
    shapes: dict[str, tuple[int, ...]] = {}

    def mlp(prefix: str, width: int) -> None:
        shapes[f"{prefix}.gate_proj.weight"] = (width, hidden)
        shapes[f"{prefix}.up_proj.weight"] = (width, hidden)
        shapes[f"{prefix}.down_proj.weight"] = (hidden, width)

    shapes["model.embed_tokens.weight"] = (vocab, hidden)
    for layer in range(layers + nextn):
        name = f"model.layers.{layer}"
        attention = {
            "q_a_proj": (q_rank, hidden),
            "q_a_layernorm": (q_rank,),
            "q_b_proj": (heads * (nope + rope), q_rank),
            "kv_a_proj_with_mqa": (kv_rank + rope, hidden),
            "kv_a_layernorm": (kv_rank,),
            "kv_b_proj": (heads * (nope + value), kv_rank),
            "o_proj": (hidden, heads * value),
        }
        shapes |= {f"{name}.self_attn.{k}.weight": v for k, v in attention.items()}
        shapes[f"{name}.input_layernorm.weight"] = (hidden,)
        shapes[f"{name}.post_attention_layernorm.weight"] = (hidden,)
        if layer < config["first_k_dense_replace"]:
            mlp(f"{name}.mlp", config["intermediate_size"])
        else:
            shapes[f"{name}.mlp.gate.weight"] = (experts, hidden)
            shapes[f"{name}.mlp.gate.e_score_correction_bias"] = (experts,)
            for e in range(experts):
                mlp(f"{name}.mlp.experts.{e}", expert)
            if config["n_shared_experts"]:
                mlp(f"{name}.mlp.shared_experts", expert * config["n_shared_experts"])
        if layer >= layers:
            shapes[f"{name}.eh_proj.weight"] = (hidden, 2 * hidden)
            for norm in ("enorm", "hnorm", "shared_head.norm"):
                shapes[f"{name}.{norm}.weight"] = (hidden,)
            shapes[f"{name}.embed_tokens.weight"] = (vocab, hidden)
            shapes[f"{name}.shared_head.head.weight"] = (vocab, hidden)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def make_tokenizer() -> Any:
    """A `tokenizers.Tokenizer` over common English words."""
    return byte_level_tokenizer([word for word in _WORDS for _ in range(2)], 600)


def byte_level_tokenizer(texts: Iterable[str], vocabulary: int) -> Any:
    """A `tokenizers.Tokenizer`: byte-level BPE of `vocabulary` pieces trained on the texts, with
    GLM's special tokens at the end."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(
        [
            AddedToken(token, special=token not in _PLAIN_TOKENS, normalized=False)
            for token in SPECIAL_TOKENS
        ]
    )
    return tokenizer


def make_checkpoint(path: Path, seed: int = 0, **config_overrides: Any) -> None:
    """Write a model directory of random weights to `path`.

    `config_overrides` replace keys of `tiny_config`. Tensors are bf16, routing biases float32.
    Scales are chosen so that logits differ clearly and tokens are routed to all experts.
    """
    tokenizer = make_tokenizer()
    config = tiny_config(**{**_token_ids(tokenizer), **config_overrides})
    write_checkpoint(path, tokenizer, config, _random_tensors(config, seed))


def _token_ids(tokenizer: Any) -> dict[str, Any]:
    """The keys of config.json that depend on the tokenizer."""
    eos = [tokenizer.token_to_id(t) for t in ("<|endoftext|>", "<|user|>", "<|observation|>")]
    rows = tokenizer.get_vocab_size() + _PAD_ROWS
    return {"vocab_size": rows, "eos_token_id": eos, "pad_token_id": eos[0]}


def write_checkpoint(
    path: Path, tokenizer: Any, config: dict[str, Any], tensors: "dict[str, Tensor]"
) -> None:
    """Write a model directory with the weights in two shards. Existing files are overwritten."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    end_tokens = {k: config[k] for k in ("eos_token_id", "pad_token_id")}
    _write_json(path / "config.json", config)
    _write_json(path / "generation_config.json", {**end_tokens, "temperature": 1.0})
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
    }
    _write_json(path / "tokenizer_config.json", tokenizer_config)
    shutil.copyfile(CHAT_TEMPLATE, path / "chat_template.jinja")
    _write_weights(path, tensors)


def _random_tensors(config: dict[str, Any], seed: int) -> "dict[str, Tensor]":
    import torch

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("e_score_correction_bias"):
            tensors[name] = noise * 0.05
        elif len(shape) == 1:
            tensors[name] = (1 + noise * 0.1).bfloat16()
        else:
            scale = 1.0 if "embed_tokens" in name else shape[1] ** -0.5
            tensors[name] = (noise * scale).bfloat16()
    for layer in range(config["num_nextn_predict_layers"]):  # as the real model does
        nextn = f"model.layers.{config['num_hidden_layers'] + layer}"
        tensors[f"{nextn}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[f"{nextn}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    return tensors


def _write_weights(path: Path, tensors: "dict[str, Tensor]") -> None:
    from safetensors.torch import save_file

    shards = [sorted(tensors)[0::2], sorted(tensors)[1::2]]
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({n: tensors[n] for n in names}, str(path / file), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    _write_json(path / "model.safetensors.index.json", index)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1))
