"""The demo model during training: the architecture of `Glm4MoeLiteForCausalLM` with its NextN
layer, over packed sequences. Every expert is computed and multiplied by its gate, which is 0 for
most tokens.

Weights of equal layers are stacked, [layers, ...], because the optimizer handles stacks.
`to_checkpoint` gives them their Hugging Face names. The NextN layer is the last in each stack.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn

Weights = dict[str, Tensor]
_LORA_NORM_EPS = 1e-6  # of the norms inside MLA, as in transformers' Glm4MoeLite
LONGEST = 5120  # tokens of a sequence in most batches; the attention kernel is told the limit
_CAUSAL: dict[str, Any] = (  # torch renamed the option after 2.11
    {"is_causal": True}
    if "is_causal" in inspect.signature(varlen_attn).parameters
    else {"window_size": (-1, 0)}
)


class Batch(NamedTuple):
    """Concatenated sequences: `ids` [T] int64, `positions` [T], `starts` [N + 1] int32 (padded
    with T), `weights` [T] float32 (the weight of each token in the loss). No sequence has more
    than `longest` tokens."""

    ids: Tensor
    positions: Tensor
    starts: Tensor
    weights: Tensor
    longest: int = LONGEST


class Losses(NamedTuple):
    """Two scalars, the loss of the next token and the loss of the NextN layer's two drafts, and the
    number of tokens that each expert got, [moe layers, experts]."""

    next_token: Tensor
    drafts: Tensor
    loads: Tensor


def init_weights(config: dict[str, Any], seed: int) -> Weights:
    """Random float32 weights on the CPU; projections into the residual stream start at zero."""
    hidden, vocab, heads = (
        config["hidden_size"],
        config["vocab_size"],
        config["num_attention_heads"],
    )
    q_rank, kv_rank = config["q_lora_rank"], config["kv_lora_rank"]
    nope, rope, value = (config[f"{k}_head_dim"] for k in ("qk_nope", "qk_rope", "v"))
    expert, experts = config["moe_intermediate_size"], config["n_routed_experts"]
    layers = config["num_hidden_layers"] + 1
    moe, dense = layers - 1, config["intermediate_size"]
    generator = torch.Generator().manual_seed(seed)

    def matrix(*shape: int) -> Tensor:
        noise: Tensor = torch.randn(shape, generator=generator)
        return noise / math.sqrt(shape[-1])

    return {
        "embed": torch.randn((vocab, hidden), generator=generator) * 0.5,
        "head": torch.zeros((vocab, hidden)),
        "norm": torch.ones(hidden),
        "q_a": matrix(layers, q_rank, hidden),
        "q_a_norm": torch.ones(layers, q_rank),
        "q_b": matrix(layers, heads * (nope + rope), q_rank),
        "kv_a": matrix(layers, kv_rank + rope, hidden),
        "kv_a_norm": torch.ones(layers, kv_rank),
        "kv_b": matrix(layers, heads * (nope + value), kv_rank),
        "o": torch.zeros(layers, hidden, heads * value),
        "input_norm": torch.ones(layers, hidden),
        "post_norm": torch.ones(layers, hidden),
        "dense_gate": matrix(1, dense, hidden),
        "dense_up": matrix(1, dense, hidden),
        "dense_down": torch.zeros(1, hidden, dense),
        "router": matrix(moe, experts, hidden),
        "gate": matrix(moe, experts, expert, hidden),
        "up": matrix(moe, experts, expert, hidden),
        "down": torch.zeros(moe, experts, hidden, expert),
        "shared_gate": matrix(moe, expert, hidden),
        "shared_up": matrix(moe, expert, hidden),
        "shared_down": torch.zeros(moe, hidden, expert),
        "eh_proj": matrix(1, hidden, 2 * hidden),
        "enorm": torch.ones(hidden),
        "hnorm": torch.ones(hidden),
        "shared_head_norm": torch.ones(hidden),
    }


class Parts(NamedTuple):
    """Functions that a step calls many times, plain or compiled: `layer_forward`, the NextN layer's
    input, a loss. Compiling them takes a third of the time of compiling a whole step."""

    layer: Callable[..., tuple[Tensor, Tensor | None]]
    draft_input: Callable[..., Tensor]
    loss: Callable[..., Tensor]


def make_parts(compiled: bool) -> Parts:
    """The parts of `compute_losses`."""
    parts = Parts(layer_forward, _draft_input, _loss)
    return Parts(*map(compile_exactly, parts)) if compiled else parts


def compile_exactly(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled for tensors of one shape. Fused reductions of rows and columns are off:
    in torch 2.11 they give a weight [1, n] a gradient [n], and leave parts of others unset."""
    options: dict[str, Any] = {"triton.mix_order_reduction": False}
    return torch.compile(function, dynamic=False, options=options)


def compute_losses(
    w: Weights,
    bias: Tensor,
    batch: Batch,
    before_norm: Tensor,
    config: dict[str, Any],
    parts: Parts,
    with_drafts: bool = True,
) -> Losses:
    """Mean losses over the weighted tokens. `bias` [moe layers, experts] selects experts.

    `before_norm` (bool scalar) selects the hidden state that the NextN layer gets, before or after
    the final norm. Engines differ in this, so the layer is trained on both. Without drafts their
    loss is 0.
    """
    hidden, loads = trunk(w, bias, batch, config, parts.layer)
    next_token = parts.loss(w, hidden, w["norm"], *_targets(batch, batch.weights, 1), config)
    drafts = torch.zeros((), device=hidden.device)
    load: Tensor | None = torch.zeros_like(loads[0])
    if with_drafts:
        # Draft 1 at position t has seen tokens up to t + 1 and predicts token t + 2. Draft 2 there
        # has the NextN layer's own state of position t - 1 in place of the model's of position t.
        answers = batch.weights * (batch.weights >= 1)
        targets = _targets(batch, answers, 2)
        nextn = layers(w)[-1]
        state, norm = hidden, w["norm"]
        for share in (1.0, 0.5):
            x = parts.draft_input(w, batch.ids, state, norm, before_norm, config)
            out, load = parts.layer(x, nextn, bias[-1], batch, config)
            norm = w["shared_head_norm"]
            drafts = drafts + share * parts.loss(w, out, norm, *targets, config)
            state = out.roll(1, 0)
    assert load is not None, "the NextN layer has experts"
    return Losses(next_token, drafts, torch.cat((loads, load[None])))


def layers(w: Weights) -> list[Weights]:
    """The weights of each layer by themselves; the NextN layer's are the last."""
    each: list[Weights] = [{} for _ in w["q_a"]]
    for name, stack in w.items():
        if stack.dim() == 1 or name in ("embed", "head"):
            continue
        first = 0 if name.startswith("dense") else len(each) - len(stack)
        for layer, weight in zip(each[first:], stack.unbind(), strict=False):
            layer[name] = weight
    return each


def layer_forward(
    x: Tensor, w: Weights, bias: Tensor, batch: Batch, config: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """x [T, hidden] after a layer of weights `w` (one of `layers`), and its expert load (None: it
    has none). `bias` [experts] is the layer's."""
    q, k, v = project(w, x, batch.positions, config)
    attended = linear(_packed_attention(q, k, v, batch.starts, batch.longest).flatten(1), w["o"])
    if "dense_gate" not in w:
        return finish(w, bias, x, attended, config)
    x = x + attended
    h = rms_norm(x, w["post_norm"], config["rms_norm_eps"])
    return x + _mlp(h, w["dense_gate"], w["dense_up"], w["dense_down"]), None


def trunk(
    w: Weights,
    bias: Tensor,
    batch: Batch,
    config: dict[str, Any],
    layer: Callable[..., tuple[Tensor, Tensor | None]] = layer_forward,
) -> tuple[Tensor, Tensor]:
    """Hidden states [T, hidden] before the final norm; expert loads [moe layers - 1, experts]."""
    x = functional.embedding(batch.ids, w["embed"]).to(_dtype(batch.ids))
    loads = []
    for number, weights in enumerate(layers(w)[:-1]):
        x, load = layer(x, weights, bias[max(number - 1, 0)], batch, config)
        if load is not None:
            loads.append(load)
    return x, torch.stack(loads)


def _draft_input(
    w: Weights, ids: Tensor, state: Tensor, norm: Tensor, before_norm: Tensor, config: Any
) -> Tensor:
    """The NextN layer's input at every position t, from `state` [T, hidden] before or after `norm`
    and the token at t + 1."""
    normed = rms_norm(state, norm, config["rms_norm_eps"])
    return join(w, ids.roll(-1), torch.where(before_norm, state, normed), config)


def join(w: Weights, ids: Tensor, state: Tensor, config: dict[str, Any]) -> Tensor:
    """The NextN layer's input [T, hidden]: the next token's embedding and a hidden state."""
    eps = config["rms_norm_eps"]
    embedded = functional.embedding(ids, w["embed"]).to(state.dtype)
    both = (rms_norm(embedded, w["enorm"], eps), rms_norm(state, w["hnorm"], eps))
    return linear(torch.cat(both, -1), w["eh_proj"][0])


def finish(
    w: Weights, bias: Tensor, x: Tensor, attended: Tensor, config: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """A layer with experts after its attention (projected, [T, hidden]), and its expert load."""
    x = x + attended
    y, load = _moe(w, bias, rms_norm(x, w["post_norm"], config["rms_norm_eps"]), config)
    return x + y, load


def logits(w: Weights, normed: Tensor) -> Tensor:
    """[T, vocabulary] float32 of normed hidden states."""
    return linear(normed, w["head"]).float()


def _targets(batch: Batch, weights: Tensor, distance: int) -> tuple[Tensor, Tensor]:
    """The token `distance` ahead of each and its weight; the last positions predict nothing."""
    counted = weights.roll(-distance)
    counted[-distance:] = 0
    return batch.ids.roll(-distance), counted


def _loss(
    w: Weights, x: Tensor, norm: Tensor, targets: Tensor, counted: Tensor, config: Any
) -> Tensor:
    """Mean loss of hidden states x [T, hidden] before `norm`."""
    scores = logits(w, rms_norm(x, norm, config["rms_norm_eps"]))
    losses = functional.cross_entropy(scores, targets, reduction="none")
    return (losses * counted).sum() / counted.sum().clamp(min=1)


def project(
    w: Weights, x: Tensor, positions: Tensor, config: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [T, heads, width] of a layer's input x [T, hidden]."""
    nope, rope, value = (config[f"{k}_head_dim"] for k in ("qk_nope", "qk_rope", "v"))
    heads, rank, tokens = config["num_attention_heads"], config["kv_lora_rank"], x.shape[0]
    h = rms_norm(x, w["input_norm"], config["rms_norm_eps"])
    q = rms_norm(linear(h, w["q_a"]), w["q_a_norm"], _LORA_NORM_EPS)
    q = linear(q, w["q_b"]).view(tokens, heads, nope + rope)
    latent, k_rope = linear(h, w["kv_a"]).tensor_split((rank,), -1)
    latent = rms_norm(latent, w["kv_a_norm"], _LORA_NORM_EPS)
    kv = linear(latent, w["kv_b"]).view(tokens, heads, nope + value)
    theta = config["rope_theta"]
    q_rope = _rotate(q[..., nope:], positions, theta)
    k_rope = _rotate(k_rope[:, None], positions, theta).expand(-1, heads, -1)
    q = torch.cat((q[..., :nope], q_rope), -1)
    k = torch.cat((kv[..., :nope], k_rope), -1)
    return q, k, kv[..., nope:].contiguous()


def _packed_attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int) -> Tensor:
    """Causal attention inside each sequence; q, k, v are [T, heads, width]."""
    if q.is_cuda:
        y = varlen_attn(q, k, v, starts, starts, longest, longest, **_CAUSAL)
        assert isinstance(y, Tensor), "a pair only comes on request"
        return y
    lengths = [length for length in starts.diff().tolist() if length]
    # [1, heads, length, width] for each sequence: the fast kernel needs four dimensions.
    split = (t.transpose(0, 1)[None].split(lengths, 2) for t in (q, k, v))
    attended = [
        functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        for q, k, v in zip(*split, strict=True)
    ]
    return torch.cat(attended, 2)[0].transpose(0, 1)


def _moe(w: Weights, bias: Tensor, h: Tensor, config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    experts, chosen = config["n_routed_experts"], config["num_experts_per_tok"]
    scores = torch.sigmoid(h.float() @ w["router"].T)
    top = (scores.detach() + bias).topk(chosen, -1).indices
    picked = torch.zeros_like(scores).scatter(1, top, 1.0)
    gates = scores * picked
    gates = gates / (gates.sum(-1, keepdim=True) + 1e-20) * config["routed_scaling_factor"]
    width = w["gate"].shape[1]
    a = linear(h, w["gate"].flatten(0, 1))
    b = linear(h, w["up"].flatten(0, 1))
    mid = (functional.silu(a) * b).view(-1, experts, width) * gates.to(h.dtype)[..., None]
    down = w["down"].transpose(0, 1).flatten(1)  # [hidden, experts * width]
    y = linear(mid.flatten(1), down)
    shared = (w[f"shared_{k}"] for k in ("gate", "up", "down"))
    return y + _mlp(h, *shared), picked.sum(0)


def _mlp(h: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return linear(functional.silu(linear(h, gate)) * linear(h, up), down)


def _dtype(tensor: Tensor) -> torch.dtype:
    """The type of activations: bf16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if tensor.is_cuda else torch.float32


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] times weight [out, in], in x's type."""
    return x @ weight.to(x.dtype).T


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis, computed in float32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def _rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary embedding of neighbouring pairs; x is [T, heads, width]."""
    width = x.shape[-1]
    frequencies = theta ** (-torch.arange(0, width, 2, device=x.device).float() / width)
    angles = positions.float()[:, None, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    pairs = x.float().view(*x.shape[:-1], width // 2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


_ATTENTION_NAMES = {
    "self_attn.q_a_proj": "q_a",
    "self_attn.q_a_layernorm": "q_a_norm",
    "self_attn.q_b_proj": "q_b",
    "self_attn.kv_a_proj_with_mqa": "kv_a",
    "self_attn.kv_a_layernorm": "kv_a_norm",
    "self_attn.kv_b_proj": "kv_b",
    "self_attn.o_proj": "o",
    "input_layernorm": "input_norm",
    "post_attention_layernorm": "post_norm",
}


def from_checkpoint(tensors: Weights, config: dict[str, Any]) -> tuple[Weights, Tensor]:
    """The inverse of `to_checkpoint`: float32 weights and routing biases."""
    layers = range(config["num_hidden_layers"] + 1)
    wide = {name.removesuffix(".weight"): t.float() for name, t in tensors.items()}

    def stack(suffix: str, numbers: range) -> Tensor:
        return torch.stack([wide[f"model.layers.{n}.{suffix}"] for n in numbers])

    w = {ours: stack(k, layers) for k, ours in _ATTENTION_NAMES.items()}
    w |= {"embed": wide["model.embed_tokens"], "norm": wide["model.norm"], "head": wide["lm_head"]}
    moe = layers[1:]
    for k in ("gate", "up", "down"):
        w[f"dense_{k}"] = stack(f"mlp.{k}_proj", layers[:1])
        w[f"shared_{k}"] = stack(f"mlp.shared_experts.{k}_proj", moe)
        experts = range(config["n_routed_experts"])
        w[k] = torch.stack([stack(f"mlp.experts.{e}.{k}_proj", moe) for e in experts], 1)
    w["router"] = stack("mlp.gate", moe)
    last = layers[-1:]
    w["eh_proj"] = stack("eh_proj", last)
    w |= {k: stack(k, last)[0] for k in ("enorm", "hnorm")}
    w["shared_head_norm"] = stack("shared_head.norm", last)[0]
    return w, stack("mlp.gate.e_score_correction_bias", moe)


def to_checkpoint(w: Weights, bias: Tensor, config: dict[str, Any]) -> Weights:
    """Hugging Face names -> CPU tensors: bf16, routing biases float32."""
    layers = config["num_hidden_layers"]
    named = {"model.embed_tokens": w["embed"], "model.norm": w["norm"], "lm_head": w["head"]}
    for layer in range(layers + 1):
        prefix = f"model.layers.{layer}"
        named |= {f"{prefix}.{k}": w[ours][layer] for k, ours in _ATTENTION_NAMES.items()}
        if layer == 0:
            named |= {f"{prefix}.mlp.{k}_proj": w[f"dense_{k}"][0] for k in ("gate", "up", "down")}
            continue
        named[f"{prefix}.mlp.gate"] = w["router"][layer - 1]
        for k in ("gate", "up", "down"):
            named[f"{prefix}.mlp.shared_experts.{k}_proj"] = w[f"shared_{k}"][layer - 1]
            for expert, weight in enumerate(w[k][layer - 1]):
                named[f"{prefix}.mlp.experts.{expert}.{k}_proj"] = weight
    prefix = f"model.layers.{layers}"
    named[f"{prefix}.eh_proj"] = w["eh_proj"][0]
    named |= {f"{prefix}.{k}": w[k] for k in ("enorm", "hnorm")}
    named[f"{prefix}.shared_head.norm"] = w["shared_head_norm"]
    named[f"{prefix}.embed_tokens"] = w["embed"]
    named[f"{prefix}.shared_head.head"] = w["head"]
    tensors = {f"{k}.weight": v.detach().bfloat16().cpu().clone() for k, v in named.items()}
    for index, layer_bias in enumerate(bias):
        name = f"model.layers.{index + 1}.mlp.gate.e_score_correction_bias"
        tensors[name] = layer_bias.float().cpu().clone()
    return tensors
