"""`glimmer bench kernels`: times each op of decode and prefill alone, beside its limit.

A CUDA graph captures the op several times with different weights, so that the L2 cache does not
help. The limit is memory bandwidth or the tensor cores' rate, whichever takes longer. The column
"us/step" counts an op as often as a forward pass runs it, so its sum is the time of a step.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.table import Table

from ...shared.errors import ConfigError, UsageError
from ...shared.model_spec import ModelSpec, load_model_spec
from .report import environment, report, write_report
from .roofline import Gpu, distinct_experts, gpu_of

_ROTATED_BYTES = 256 << 20  # read before a weight is read again: several times the L2 cache
_MOST_COPIES = 24
_REPLAYS = 20
_BYTES = 2


@dataclass(frozen=True)
class Case:
    """An op with its operands: `calls` do the same with different weights. Bytes and operations
    are those of one call; a forward pass has `layers` calls."""

    op: str
    shape: str
    calls: list[Callable[[], object]]
    num_bytes: float
    operations: float
    layers: int


@dataclass(frozen=True)
class Result:
    """One row of the table."""

    step: str
    op: str
    shape: str
    us: float
    tb_per_s: float
    tflop_per_s: float
    share: float  # of the limit; 0 for an unknown GPU
    us_per_step: float


def time_calls(calls: Sequence[Callable[[], object]]) -> float:
    """Microseconds per call in one CUDA graph of all calls: the lower quartile of some replays."""
    import torch

    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times: list[float] = []
    for _ in range(_REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 4] * 1e3 / len(calls)


class Operands:
    """Random bfloat16 tensors on the GPU."""

    def __init__(self, spec: ModelSpec) -> None:
        import torch

        self.torch = torch
        self.spec = spec
        self.eps = spec.rms_norm_eps

    def random(self, *shape: int, dtype: Any = None) -> Any:
        """Values of unit scale."""
        values = self.torch.empty(shape, device="cuda", dtype=dtype or self.torch.bfloat16)
        return values.normal_()

    def weight(self, rows: int, columns: int) -> Any:
        """A projection [rows, columns] that keeps the scale."""
        return self.random(rows, columns).mul_(columns**-0.5)


def _copies(num_bytes: float) -> int:
    return max(2, min(_MOST_COPIES, math.ceil(_ROTATED_BYTES / max(num_bytes, 1))))


def projections(o: Operands, tokens: int) -> Iterator[Case]:
    """Norms and dense products of a layer. For few tokens a norm is part of the next product."""
    from ...kernels.dense.linear import NORM_TOKENS, linear, norm_linear, rms_norm
    from ...kernels.moe import router

    s = o.spec
    layers, hidden = s.num_layers, s.hidden_size
    stream, latent = o.random(tokens, hidden), o.random(tokens, s.q_lora_rank)
    norms = {x.shape[1]: o.random(x.shape[1]) for x in (stream, latent)}
    # Norms that are launches of their own, before attention and before the experts.
    attention_norm, mlp_norm = tokens > NORM_TOKENS, tokens > router.NORM_TOKENS
    for x, per_layer in ((stream, attention_norm + mlp_norm), (latent, int(attention_norm))):
        norm = norms[x.shape[1]]
        if per_layer:
            calls = [partial(rms_norm, x, norm, o.eps)] * 8
            yield Case("rms_norm", f"{tokens}x{x.shape[1]}", list(calls),
                       2 * _BYTES * x.numel(), 0, layers * per_layer)  # fmt: skip
    values = o.random(tokens, s.num_heads * s.v_head_dim)
    for name, x, rows in (
        ("qkv_a", stream, s.q_lora_rank + s.latent_dim),
        ("q_b", latent, s.num_heads * s.qk_head_dim),
        ("o", values, hidden),
    ):
        columns = x.shape[1]
        count = rows * columns
        weights = [o.weight(rows, columns) for _ in range(_copies(_BYTES * count))]
        moved = _BYTES * (count + tokens * (rows + columns))
        calls = [partial(linear, x, w) for w in weights]
        if name == "o":
            calls = [partial(linear, x, w, add_to=stream) for w in weights]
        elif tokens <= NORM_TOKENS:
            name = f"norm, {name}"
            calls = [partial(norm_linear, x, norms[columns], o.eps, w) for w in weights]
        yield Case(name, f"{tokens}x{columns}->{rows}", list(calls), moved,
                   2 * count * tokens, layers)  # fmt: skip


def mixtures(o: Operands, tokens: int) -> Iterator[Case]:
    """Router, experts, the dense first layer, the head."""
    from ...kernels.moe.experts import gated_mlp, moe
    from ...kernels.moe.router import NORM_TOKENS, RouterSettings, norm_route, route

    s, torch = o.spec, o.torch
    hidden, width = s.hidden_size, s.moe_intermediate_size
    moe_layers = s.num_layers - s.first_dense_layers
    experts = s.num_experts + s.num_shared_experts
    chosen = s.num_experts_per_token + s.num_shared_experts
    x, stream = o.random(tokens, hidden), o.random(tokens, hidden)
    router = o.weight(s.num_experts, hidden).float()
    bias = torch.zeros(s.num_experts, device="cuda")

    settings = RouterSettings(
        s.num_experts_per_token, 1, 1, s.norm_topk_prob, s.routed_scaling_factor
    )
    rest = (router, bias, settings, s.num_shared_experts)
    name, choose = "route", cast(Callable[[], object], partial(route, x, *rest))
    if tokens <= NORM_TOKENS:
        name, choose = "norm, route", partial(norm_route, x, o.random(hidden), o.eps, *rest)
    yield Case(name, f"{tokens}x{hidden}->{s.num_experts}", [choose] * 8,
               4 * router.numel() + _BYTES * x.numel(), 2 * router.numel() * tokens,
               moe_layers)  # fmt: skip
    one = 3 * hidden * width
    stacks = [(o.random(experts, 2 * width, hidden).mul_(hidden**-0.5),
               o.random(experts, hidden, width).mul_(width**-0.5)) for _ in range(4)]  # fmt: skip
    routes = [route(o.random(tokens, hidden), *rest) for _ in stacks]
    calls = [
        partial(moe, x, ids, scores, up, down, stream)
        for (up, down), (ids, scores) in zip(stacks, routes, strict=True)
    ]
    read = distinct_experts(s, tokens) + s.num_shared_experts
    yield Case("moe", f"{tokens}x{chosen} of {experts}", list(calls), _BYTES * read * one,
               2 * one * chosen * tokens, moe_layers)  # fmt: skip
    del stacks, calls
    if s.first_dense_layers:
        up, down = o.weight(2 * s.intermediate_size, hidden), o.weight(hidden, s.intermediate_size)
        count = up.numel() + down.numel()
        yield Case("dense mlp", f"{tokens}x{s.intermediate_size}",
                   [partial(gated_mlp, x, up, down, stream)] * 3, _BYTES * count,
                   2 * count * tokens, s.first_dense_layers)  # fmt: skip


def heads(o: Operands, rows: int) -> Iterator[Case]:
    """The head and greedy sampling."""
    from ...kernels.sampling.sampling import greedy

    s, torch = o.spec, o.torch
    x, head = o.random(rows, s.hidden_size), o.weight(s.vocab_size, s.hidden_size)
    out = torch.empty(rows, s.vocab_size, device="cuda")
    yield Case("lm_head", f"{rows}x{s.hidden_size}->{s.vocab_size}",
               [lambda: torch.mm(x, head.T, out_dtype=torch.float32, out=out)] * 2,
               _BYTES * head.numel() + 4 * out.numel(), 2 * head.numel() * rows, 1)  # fmt: skip
    logits = [o.random(rows, s.vocab_size, dtype=torch.float32) for _ in range(2)]
    yield Case("greedy", f"{rows}x{s.vocab_size}", [partial(greedy, part) for part in logits],
               4 * out.numel(), 0, 1)  # fmt: skip


def run_case(step: str, case: Case, gpu: Gpu | None) -> Result:
    """Time a case."""
    us = time_calls(case.calls)
    limit = 0.0
    if gpu is not None:
        limit = max(case.num_bytes / gpu.bandwidth, case.operations / gpu.flops) * 1e6
    return Result(
        step,
        case.op,
        case.shape,
        us,
        case.num_bytes / us / 1e6,
        case.operations / us / 1e6,
        limit / us,
        us * case.layers,
    )


def attention(o: Operands, rows: int, context: int) -> Iterator[Case]:
    """The ops of a decode step between the projections."""
    from ...kernels.attention.mla_decode import mla_decode
    from ...kernels.attention.mla_decode_split import FUSED_TOKENS
    from ...kernels.attention.mla_projections import expand_values
    from ...kernels.attention.paged_rows import PagedRows
    from ...kernels.attention.rope import rope_absorb, rope_angles

    s, torch = o.spec, o.torch
    layers, page = s.num_layers, 64
    pages = -(-context // page)
    copies = max(1, min(8, _copies(_BYTES * rows * context * s.latent_dim)))
    kv = o.random(rows * pages, copies, page, s.latent_dim)
    table = torch.randperm(rows * pages, device="cuda").view(rows, pages).int()
    lengths = torch.full((rows,), context, device="cuda")
    starts = torch.arange(rows + 1, device="cuda")
    queries = o.random(rows, s.num_heads, s.qk_head_dim)
    kv_a, norm = o.random(rows, s.latent_dim), o.random(s.kv_lora_rank)
    angles = rope_angles(lengths - 1, s.qk_rope_head_dim, s.rope_theta, s.rope_interleave)
    slots = table[:, -1].long() * page + (context - 1) % page
    ups = [o.weight(s.num_heads * s.qk_nope_head_dim, s.kv_lora_rank) for _ in range(_MOST_COPIES)]
    ups = [up.view(s.num_heads, s.qk_nope_head_dim, s.kv_lora_rank) for up in ups]
    count = ups[0].numel()
    yield Case("rope_absorb", f"{rows} tokens",
               [partial(rope_absorb, queries, kv_a, norm, 1e-6, angles, kv[:, i % copies], slots,
                        w) for i, w in enumerate(ups)],
               _BYTES * count, 2 * count * rows, layers)  # fmt: skip
    absorbed = o.random(rows, s.num_heads, s.latent_dim)
    seen, read = rows * context, _BYTES * rows * context * s.latent_dim
    operations = 2 * seen * s.num_heads * (s.latent_dim + s.kv_lora_rank)
    paged = PagedRows(table, starts, lengths, max_query_len=1, max_length=1 << 17)
    scale = s.softmax_scale
    decode = [
        partial(mla_decode, absorbed, kv[:, i], paged, s.kv_lora_rank, scale, "triton")
        for i in range(copies)
    ]
    downs = [o.random(s.num_heads, s.v_head_dim, s.kv_lora_rank) for _ in range(_MOST_COPIES)]
    count = downs[0].numel()
    if rows <= FUSED_TOKENS:  # the up-projection is part of it
        calls = [partial(decode[i % copies], w_uv=w) for i, w in enumerate(downs)]
        yield Case("mla_decode, expanded", f"{rows}x{context}", list(calls),
                   read + _BYTES * count, operations + 2 * count * rows, layers)  # fmt: skip
        return
    yield Case("mla_decode", f"{rows}x{context}", list(decode), read, operations, layers)
    latent_out = o.random(rows, s.num_heads, s.kv_lora_rank)
    yield Case("expand_values", f"{rows} tokens",
               [partial(expand_values, latent_out, w) for w in downs],
               _BYTES * count, 2 * count * rows, layers)  # fmt: skip


def prefill_attention(o: Operands, tokens: int, backend: str) -> Iterator[Case]:
    """Attention of a new prompt, including the up-projection."""
    from ...kernels.attention.mla_prefill import mla_prefill
    from ...kernels.attention.paged_rows import PagedRows

    s, torch = o.spec, o.torch
    queries = o.random(tokens, s.num_heads, s.qk_head_dim)
    latents = o.random(tokens, s.latent_dim)
    up = o.weight(s.num_heads * (s.qk_nope_head_dim + s.v_head_dim), s.kv_lora_rank)
    up = up.view(s.num_heads, -1, s.kv_lora_rank)
    kv = o.random(2, 64, s.latent_dim)
    table = torch.zeros(1, 1, dtype=torch.int32, device="cuda")
    bounds = torch.tensor([0, tokens], device="cuda")
    rows = PagedRows(table, bounds, bounds[1:], tokens, tokens, (tokens,), (0,))
    pairs = tokens * (tokens + 1) / 2
    operations = 2 * pairs * s.num_heads * (s.qk_head_dim + s.v_head_dim)
    operations += 2 * up.numel() * tokens
    yield Case(f"mla_prefill ({backend})", f"{tokens} tokens",
               [lambda: mla_prefill(queries, latents, kv, rows, up, s.softmax_scale, backend)] * 2,
               _BYTES * (2 * queries.numel() + latents.numel()), operations,
               s.num_layers)  # fmt: skip


def cases(o: Operands, step: str, size: int, context: int, backend: str) -> Iterator[Case]:
    """All ops of a decode step of `size` rows, or of a prefill of `size` tokens."""
    yield from projections(o, size)
    if step == "decode":
        yield from attention(o, size, context)
        yield from mixtures(o, size)
        yield from heads(o, size)
    else:
        yield from prefill_attention(o, size, backend)
        yield from mixtures(o, size)


def _show(console: Console, results: Sequence[Result], device: str) -> None:
    table = Table(title=f"ops on {device}")
    for name in ("step", "op", "shape", "us", "TB/s", "TFLOP/s", "of limit", "us/step"):
        table.add_column(name, justify="left" if name in ("op", "shape") else "right")
    for step in dict.fromkeys(r.step for r in results):
        ops = [r for r in results if r.step == step]
        for r in ops:
            table.add_row(r.step, r.op, r.shape, f"{r.us:.2f}", f"{r.tb_per_s:.2f}",
                          f"{r.tflop_per_s:.0f}", f"{r.share:.0%}" if r.share else "-",
                          f"{r.us_per_step:.0f}")  # fmt: skip
        total = sum(r.us_per_step for r in ops)
        table.add_row(step, "sum", "", "", "", "", "", f"{total:.0f}", end_section=True)
    console.print(table)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="glimmer bench kernels", description=__doc__)
    parser.add_argument("--model_dir", type=Path, required=True, help="only config.json is read")
    parser.add_argument("--decode", type=int, nargs="*", default=[1, 32, 256], metavar="ROWS")
    parser.add_argument("--context", type=int, default=1024, help="cached tokens of each row")
    parser.add_argument("--prefill", type=int, nargs="*", default=[8192], metavar="TOKENS")
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args(list(argv))
    if min([1, args.context, *args.decode, *args.prefill]) < 1:
        raise UsageError("--decode, --context and --prefill need to be at least 1")
    return args


def main(argv: Sequence[str]) -> int:
    """Entry point of `glimmer bench kernels`."""
    args = _parse(argv)
    spec = load_model_spec(args.model_dir)
    where = environment()
    if not where["gpus"]:
        raise ConfigError("glimmer bench kernels needs a GPU; none was found here")
    import torch

    from ...kernels.attention.backends import prefill_backend

    torch.manual_seed(0)
    operands, gpu = Operands(spec), gpu_of(where["device"])
    backend = prefill_backend("auto", operands.random(1, 1, spec.qk_head_dim), spec.v_head_dim)
    steps = [("decode", n) for n in args.decode] + [("prefill", n) for n in args.prefill]
    results = [
        run_case(f"{step} {size}", case, gpu)
        for step, size in steps
        for case in cases(operands, step, size, args.context, backend)
    ]
    _show(Console(width=120), results, where["device"])
    if args.json:
        settings = {
            k: v if k != "json" and k != "model_dir" else str(v) for k, v in vars(args).items()
        }
        write_report(args.json, report("kernels", argv, settings, [asdict(r) for r in results]))
    return 0
