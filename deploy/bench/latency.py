"""`glimmer bench latency`: time of a step by batch and context, beside the roofline.

Runs one rank in this process (`rank.py`), without HTTP and scheduler. All flags of `glimmer serve`
are accepted; `--load_format dummy` needs only config.json, no weights. With `--mtp_mode`, `--drafts
0 3` measures every step without drafts and with 3 drafts per row. `--mtp_forced_acceptance` gives
the shares of drafts that are accepted, which is needed with random weights. `--constrained 0 8`
measures every step without and with 8 rows whose output must match a JSON schema; this needs the
model's tokenizer.json.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from ...shared.config import ServeConfig
from ...shared.errors import UsageError
from ...shared.model_spec import ModelSpec, load_model_spec
from ...shared.resolve import resolve
from .prompts import load_tokenizer, read_text
from .rank import Bench
from .report import environment, report, write_report
from .roofline import Gpu, Roofline, gpu_of
from .trace import Trace, traced

_MOST_KERNELS = 40  # printed of each profile
_WARM_UP_STEPS, _PROFILED_STEPS, _MIXED_STEPS, _MOST_STEPS = 4, 8, 8, 150


@dataclass(frozen=True)
class Result:
    """The figures of one row. `roofline_ms` is 0 for an unknown GPU."""

    kind: str  # "prefill", "decode", or "mixed": decode rows together with a new prompt
    rows: int
    tokens: int  # of each prompt, or cached for each row
    drafts: int  # number that each row verifies, and makes, in a step
    ms: float  # median of a step
    tokens_per_row: float  # new tokens of a decode row in a step: 1 and the accepted drafts
    tokens_per_s: float
    roofline_ms: float
    experts: float  # distinct experts in a step, mean over the main model's MoE layers
    draft_experts: list[float] = field(default_factory=list)  # in each pass of the draft layer
    constrained: int = 0  # rows whose output must match a JSON schema
    idle_share: float | None = None  # of the GPU while profiled


Row = tuple[Result, Trace | None]


@dataclass(frozen=True)
class _Measurement:
    """Measures steps of a rank. `gpu` None: the roofline is unknown."""

    bench: Bench
    spec: ModelSpec
    gpu: Gpu | None
    args: argparse.Namespace

    def prefill(self, rows: int, tokens: int) -> Row:
        """Prompts without anything else."""
        bench = self.bench
        times = []
        for _ in range(self.args.repeats + 1):  # the first one may compile
            times.append(bench.prefill(rows, tokens))
            bench.free(rows)
        trace = None
        if self.args.profile:
            with traced() as trace:
                bench.prefill(rows, tokens)
            bench.free(rows)
        seconds = median(times[1:])
        roofline = self._roofline()
        result = Result(
            "prefill",
            rows,
            tokens,
            bench.num_drafts,
            ms=seconds * 1e3,
            tokens_per_row=0.0,
            tokens_per_s=rows * tokens / seconds,
            roofline_ms=roofline.prefill(tokens, rows) * 1e3 if roofline else 0.0,
            experts=float(self.spec.num_experts),
            idle_share=trace.idle_share if trace else None,
        )
        return result, trace

    def decode(self, rows: int, tokens: int) -> Row:
        """Decode steps of rows with `tokens` cached tokens."""
        bench = self.bench
        bench.prefill(rows, tokens)
        experts = bench.count_experts(rows)
        bench.decode(rows, _WARM_UP_STEPS)
        steps = bench.decode(rows, self.args.steps)
        trace = None
        if self.args.profile:
            with traced() as trace:
                bench.decode(rows, _PROFILED_STEPS - 1)
        bench.free(rows)
        seconds = median(steps.seconds)
        roofline = self._roofline()
        result = Result(
            "decode",
            rows,
            tokens,
            bench.num_drafts,
            ms=seconds * 1e3,
            tokens_per_row=steps.tokens_per_row,
            tokens_per_s=rows * steps.tokens_per_row / seconds,
            roofline_ms=roofline.decode(rows, tokens) * 1e3 if roofline else 0.0,
            experts=experts.main,
            draft_experts=experts.drafts,
            constrained=min(rows, bench.num_constrained),
            idle_share=trace.idle_share if trace else None,
        )
        return result, trace

    def mixed(self, rows: int, context: int, tokens: int) -> Row:
        """Decode steps, each together with a new prompt of `tokens` tokens."""
        bench = self.bench
        bench.prefill(rows, context)
        bench.mixed(rows, context, tokens, 3)
        bench.free(rows + 1)
        bench.prefill(rows, context)
        steps = bench.mixed(rows, context, tokens, _MIXED_STEPS)
        trace = None
        if self.args.profile:
            bench.free(rows + 1)
            bench.prefill(rows, context)
            with traced() as trace:
                bench.mixed(rows, context, tokens, _PROFILED_STEPS - 1)
        bench.free(rows + 1)
        seconds = median(steps.seconds)
        roofline = self._roofline()
        result = Result(
            "mixed",
            rows,
            tokens,
            bench.num_drafts,
            ms=seconds * 1e3,
            tokens_per_row=steps.tokens_per_row,
            tokens_per_s=(rows * steps.tokens_per_row + tokens) / seconds,
            roofline_ms=roofline.mixed(rows, context, tokens) * 1e3 if roofline else 0.0,
            experts=float(self.spec.num_experts),
            constrained=min(rows, bench.num_constrained),
            idle_share=trace.idle_share if trace else None,
        )
        return result, trace

    def _roofline(self) -> Roofline | None:
        if self.gpu is None:
            return None
        return Roofline(self.spec, self.gpu, self.bench.num_drafts, self.bench.is_chained)


def measure(bench: Bench, spec: ModelSpec, gpu: Gpu | None, args: argparse.Namespace) -> list[Row]:
    """All rows of the table, in the order of the flags."""
    measurement = _Measurement(bench, spec, gpu, args)
    cases: list[tuple[Callable[..., Row], Sequence[int]]] = [
        *((measurement.prefill, shape) for shape in args.prefill),
        *((measurement.decode, shape) for shape in args.decode),
        *((measurement.mixed, shape) for shape in args.mixed),
    ]
    rows = []
    for function, shape in cases:
        # A prefill alone ends with the first token: what constrains the others has no effect.
        numbers = [0] if function == measurement.prefill else args.constrained
        for bench.num_drafts, bench.num_constrained in product(args.drafts, numbers):
            rows.append(function(*shape))
    return rows


def _show(console: Console, rows: list[Row], device: str, num_experts: int) -> None:
    table = Table(title=f"step time on {device}")
    for name in ("step", "rows", "tokens", "drafts", "schema", "ms", "tokens/row", "tokens/s",
                 "roofline", "share", "experts", "in drafts", "idle"):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    for result, _ in rows:
        is_known = result.roofline_ms > 0
        table.add_row(
            result.kind,
            str(result.rows),
            str(result.tokens),
            str(result.drafts),
            str(result.constrained),
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
        "tokens/row: new tokens of a decode row in a step. experts: distinct experts, of "
        f"{num_experts},\nthat a MoE layer reads in a step; in drafts: in each pass of the draft "
        "layer. schema: rows whose output must match a JSON schema.\nidle: share of the time in "
        "which the GPU idles."
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
    """The flags of this benchmark, and the remaining words, which are flags of `glimmer serve`.
    Raises UsageError."""

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
    parser.add_argument(
        "--drafts",
        type=int,
        nargs="+",
        default=[0],
        help="drafts of each row in a step; several numbers are measured in turn",
    )
    parser.add_argument(
        "--constrained",
        type=int,
        nargs="+",
        default=[0],
        help="rows whose output must match a JSON schema; several numbers are measured in turn",
    )
    parser.add_argument(
        "--text", action="store_true", help="prompts are English text, not random ids"
    )
    parser.add_argument("--steps", type=int, default=40, help="decode steps to measure")
    parser.add_argument("--repeats", type=int, default=3, help="prefills to measure")
    parser.add_argument("--profile", action="store_true", help="time by kernel, and GPU idle time")
    parser.add_argument("--json", type=Path, help="write the results there")
    args, rest = parser.parse_known_args(argv)
    if not 1 <= args.steps <= _MOST_STEPS or args.repeats < 1:
        raise UsageError(f"--steps needs to be from 1 to {_MOST_STEPS}, --repeats at least 1")
    return args, rest


def _check_drafts(numbers: Sequence[int], config: ServeConfig) -> None:
    most = config.mtp_step if config.mtp_mode is not None else 0
    for drafts in numbers:
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
    device = environment()["device"]
    gpu = gpu_of(device) if settled.device != "cpu" else None
    with tempfile.TemporaryDirectory(prefix="glimmer-bench-") as directory:
        steps = args.steps + _WARM_UP_STEPS + _PROFILED_STEPS + 3
        bench = Bench(settled, spec, Path(directory), steps, text)
        console.print(f"{bench.runner.num_pages * settled.page_size:,} KV tokens")
        rows = measure(bench, spec, gpu, args)
    for result, trace in rows:
        if trace is not None:
            _show_profile(console, result, trace)
    _show(console, rows, device, spec.num_experts)
    if args.json:
        results = [{**asdict(result), "kernels": trace and trace.kernels} for result, trace in rows]
        settings = {k: v if k != "json" else str(v) for k, v in vars(args).items()}
        write_report(args.json, report("latency", argv, settings, results))
    return 0
