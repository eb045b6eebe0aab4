"""`glimmer bench latency`: how long steps take, by batch and context, beside the roofline.

Runs one rank in this process (`rank.py`), without HTTP and scheduler. All flags of `glimmer serve`
are taken; `--load_format dummy` needs no weights, only config.json. With `--mtp_mode`, `--drafts
0 3` measures every step without drafts and with 3 for each row; where weights are noise,
`--mtp_forced_acceptance` says how many of them are taken for right.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from ...shared.config import ServeConfig
from ...shared.errors import UsageError
from ...shared.model_spec import ModelSpec, load_model_spec
from ...shared.resolve import resolve
from .prompts import load_tokenizer, read_text
from .rank import Bench
from .report import environment, report, write_report
from .roofline import Gpu, decode_seconds, gpu_of, mixed_seconds, prefill_seconds
from .trace import Trace, traced

_MOST_KERNELS = 40  # lines of a profile
_WARM_UP_STEPS, _PROFILED_STEPS, _MIXED_STEPS, _MOST_STEPS = 4, 8, 8, 150


@dataclass(frozen=True)
class Result:
    """One row of the table. `roofline_ms` 0: the card is unknown."""

    kind: str  # "prefill", "decode" or "mixed", which is decode rows beside a prompt
    rows: int
    tokens: int  # of each prompt, or cached for each row
    drafts: int  # that each row verifies in a step, and makes
    ms: float  # median of a step
    tokens_per_row: float  # new ones of a decode row in a step: 1 and accepted drafts
    tokens_per_s: float
    roofline_ms: float
    experts: float  # distinct ones in a step, mean over the main model's MoE layers
    draft_experts: list[float] = field(default_factory=list)  # in each pass of the draft layer
    idle_share: float | None = None  # of the GPU while profiled


def measure(bench: Bench, spec: ModelSpec, gpu: Gpu | None, args: argparse.Namespace) -> list[Any]:
    """All rows of the table and their profiles: (Result, Trace or None)."""
    measured: list[tuple[Callable[..., Any], Sequence[int]]] = [
        *((_measure_prefill, pair) for pair in args.prefill),
        *((_measure_decode, pair) for pair in args.decode),
        *((_measure_mixed, three) for three in args.mixed),
    ]
    found = []
    for function, shape in measured:
        for num_drafts in args.drafts:
            bench.num_drafts = num_drafts
            found.append(function(bench, spec, gpu, args, *shape))
    return found


def _measure_prefill(
    bench: Bench, spec: ModelSpec, gpu: Gpu | None, args: argparse.Namespace, rows: int, tokens: int
) -> tuple[Result, Trace | None]:
    times = []
    for _ in range(args.repeats + 1):  # the first one may compile
        times.append(bench.prefill(rows, tokens))
        bench.free(rows)
    trace = None
    if args.profile:
        with traced() as trace:
            bench.prefill(rows, tokens)
        bench.free(rows)
    seconds, drafts = median(times[1:]), bench.num_drafts
    bound = prefill_seconds(spec, gpu, tokens, rows, drafts, bench.is_chained) if gpu else 0.0
    result = Result("prefill", rows, tokens, drafts, seconds * 1e3, 0.0, rows * tokens / seconds,
                    bound * 1e3, float(spec.num_experts),
                    idle_share=trace.idle_share if trace else None)  # fmt: skip
    return result, trace


def _measure_decode(
    bench: Bench, spec: ModelSpec, gpu: Gpu | None, args: argparse.Namespace, rows: int, tokens: int
) -> tuple[Result, Trace | None]:
    bench.prefill(rows, tokens)
    experts = bench.count_experts(rows)
    bench.decode(rows, _WARM_UP_STEPS)
    steps = bench.decode(rows, args.steps)
    trace = None
    if args.profile:
        with traced() as trace:
            bench.decode(rows, _PROFILED_STEPS - 1)
    bench.free(rows)
    seconds, drafts = median(steps.seconds), bench.num_drafts
    bound = decode_seconds(spec, gpu, rows, tokens, drafts, bench.is_chained) if gpu else 0.0
    result = Result("decode", rows, tokens, drafts, seconds * 1e3, steps.tokens_per_row,
                    rows * steps.tokens_per_row / seconds, bound * 1e3, experts.main,
                    experts.drafts, trace.idle_share if trace else None)  # fmt: skip
    return result, trace


def _measure_mixed(
    bench: Bench,
    spec: ModelSpec,
    gpu: Gpu | None,
    args: argparse.Namespace,
    rows: int,
    context: int,
    tokens: int,
) -> tuple[Result, Trace | None]:
    bench.prefill(rows, context)
    bench.mixed(rows, context, tokens, 3)
    bench.free(rows + 1)
    bench.prefill(rows, context)
    steps = bench.mixed(rows, context, tokens, _MIXED_STEPS)
    trace = None
    if args.profile:
        bench.free(rows + 1)
        bench.prefill(rows, context)
        with traced() as trace:
            bench.mixed(rows, context, tokens, _PROFILED_STEPS - 1)
    bench.free(rows + 1)
    seconds, drafts = median(steps.seconds), bench.num_drafts
    done = rows * steps.tokens_per_row + tokens
    how = drafts, bench.is_chained
    bound = mixed_seconds(spec, gpu, rows, context, tokens, *how) if gpu else 0.0
    result = Result("mixed", rows, tokens, drafts, seconds * 1e3, steps.tokens_per_row,
                    done / seconds, bound * 1e3, float(spec.num_experts),
                    idle_share=trace.idle_share if trace else None)  # fmt: skip
    return result, trace


def _show(console: Console, found: list[Any], device: str, num_experts: int) -> None:
    table = Table(title=f"step time on {device}")
    for name in ("step", "rows", "tokens", "drafts", "ms", "tokens/row", "tokens/s", "roofline",
                 "share", "experts", "in drafts", "idle"):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    for result, _ in found:
        is_known = result.roofline_ms > 0
        table.add_row(
            result.kind,
            str(result.rows),
            str(result.tokens),
            str(result.drafts),
            f"{result.ms:.2f}",
            f"{result.tokens_per_row:.2f}" if result.tokens_per_row else "-",
            f"{result.tokens_per_s:,.0f}",
            f"{result.roofline_ms:.2f}" if is_known else "-",
            f"{result.roofline_ms / result.ms:.0%}" if is_known else "-",
            f"{result.experts:.1f}",
            " ".join(f"{n:.1f}" for n in result.draft_experts) or "-",
            f"{result.idle_share:.1%}" if result.idle_share is not None else "-",
        )
    console.print(table)
    console.print(
        "tokens/row: new tokens of a decode row in a step. experts: the distinct ones, of "
        f"{num_experts},\nthat a MoE layer reads in a step; in drafts: in each pass of the draft "
        "layer. idle: the GPU's share of the time."
    )


def _show_profile(console: Console, result: Result, trace: Trace) -> None:
    passes = 1 if result.kind == "prefill" else _PROFILED_STEPS
    total = sum(us for _, us in trace.kernels.values())
    console.print(
        f"\n{result.kind} {result.rows} x {result.tokens}: {total / passes:.0f} us of kernels "
        f"per step, GPU idle {trace.idle_share:.1%}"
    )
    ordered = sorted(trace.kernels.items(), key=lambda item: -item[1][1])
    for name, (launches, us) in ordered[:_MOST_KERNELS]:
        each = us / launches
        console.print(f"{us / passes:9.1f} us {launches / passes:6.0f} x {each:8.2f}  {name[:90]}")


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """This benchmark's flags, and the rest, which are the server's. Raises UsageError."""

    def pair(text: str) -> tuple[int, int]:
        rows, cross, tokens = text.partition("x")
        if not (cross and rows.isdigit() and tokens.isdigit() and int(rows) and int(tokens)):
            raise UsageError(f"{text!r}: needs ROWSxTOKENS, for example 32x1024")
        return int(rows), int(tokens)

    def three(text: str) -> tuple[int, int, int]:
        first, _, tokens = text.partition("+")
        return (*pair(first), pair(f"1x{tokens}")[1])

    parser = argparse.ArgumentParser(prog="glimmer bench latency", description=__doc__)
    parser.add_argument("--decode", type=pair, nargs="*", default=[(1, 1024)],
                        metavar="ROWSxCONTEXT")  # fmt: skip
    parser.add_argument("--prefill", type=pair, nargs="*", default=[], metavar="PROMPTSxTOKENS")
    parser.add_argument("--mixed", type=three, nargs="*", default=[],
                        metavar="ROWSxCONTEXT+TOKENS")  # fmt: skip
    parser.add_argument("--drafts", type=int, nargs="+", default=[0],
                        help="of each row in a step; several: one after another")  # fmt: skip
    parser.add_argument("--text", action="store_true", help="prompts of English, not random ids")
    parser.add_argument("--steps", type=int, default=40, help="decode steps to measure")
    parser.add_argument("--repeats", type=int, default=3, help="prefills to measure")
    parser.add_argument("--profile", action="store_true", help="time by kernel, and GPU idle time")
    parser.add_argument("--json", type=Path, help="write the results there")
    args, rest = parser.parse_known_args(argv)
    if not 1 <= args.steps <= _MOST_STEPS or args.repeats < 1:
        raise UsageError(f"--steps needs to be from 1 to {_MOST_STEPS}, --repeats at least 1")
    return args, rest


def _check_drafts(wanted: Sequence[int], config: ServeConfig) -> None:
    most = config.mtp_step if config.mtp_mode is not None else 0
    for drafts in wanted:
        if not 0 <= drafts <= most:
            raise UsageError(
                f"--drafts {drafts}: needs to be from 0 to --mtp_step, and --mtp_mode; with these "
                f"flags {most} is the most"
            )


def main(argv: Sequence[str]) -> int:
    """Entry point of `glimmer bench latency`."""
    from ..cli import parse_with_logging, with_model
    from ..launcher.preflight import detect_hardware

    args, rest = parse(argv)
    config = with_model(parse_with_logging(rest))
    spec = load_model_spec(Path(config.model_dir))
    settled = resolve(config, spec, detect_hardware())
    _check_drafts(args.drafts, settled)
    text: list[int] = []
    if args.text and (tokenizer := load_tokenizer(config.model_dir, {})):
        text = tokenizer.encode(read_text(None), add_special_tokens=False).ids
    console = Console(width=128)
    where = environment()
    gpu = gpu_of(where["device"]) if settled.device != "cpu" else None
    with tempfile.TemporaryDirectory(prefix="glimmer-bench-") as directory:
        steps = args.steps + _WARM_UP_STEPS + _PROFILED_STEPS + 3
        bench = Bench(settled, spec, Path(directory), steps, text)
        console.print(f"{bench.runner.num_pages * settled.page_size:,} KV tokens")
        found = measure(bench, spec, gpu, args)
    for result, trace in found:
        if trace is not None:
            _show_profile(console, result, trace)
    _show(console, found, where["device"], spec.num_experts)
    if args.json:
        rows = [{**asdict(result), "kernels": trace and trace.kernels} for result, trace in found]
        settings = {k: v if k != "json" else str(v) for k, v in vars(args).items()}
        write_report(args.json, report("latency", argv, settings, rows))
    return 0
