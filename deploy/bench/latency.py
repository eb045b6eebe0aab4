"""`glimmer bench latency`: how long steps take, by batch and context, beside the roofline.

Runs one rank in this process, without HTTP and scheduler, and gives it plans as the scheduler
would: the next one is launched before the last one's tokens are read. All flags of `glimmer serve`
are taken; `--load_format dummy` needs no weights, only config.json.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from ...shared.config import ServeConfig
from ...shared.errors import UsageError
from ...shared.messages import PrefillChunk, RowAdmit, StepPlan
from ...shared.model_spec import ModelSpec, load_model_spec
from ...shared.resolve import resolve
from ...shared.sampling import SamplingParams
from .report import environment, report, write_report
from .roofline import Gpu, decode_seconds, gpu_of, mixed_seconds, prefill_seconds
from .trace import Trace, traced

_MOST_KERNELS = 40  # lines of a profile
_WARM_UP_STEPS, _PROFILED_STEPS, _MIXED_STEPS, _MOST_STEPS = 4, 8, 8, 150
_ROOM = 192  # tokens that each row may grow by


@dataclass(frozen=True)
class Result:
    """One row of the table. `roofline_ms` 0: the card is unknown."""

    kind: str  # "prefill", "decode" or "mixed", which is decode rows beside a prompt
    rows: int
    tokens: int  # of each prompt, or cached for each row
    ms: float  # median of a step
    tokens_per_s: float
    roofline_ms: float
    experts: float  # distinct experts per layer in one step, median over layers
    idle_share: float | None = None  # of the GPU while profiled


class Bench:
    """A rank and the plans it is given. Rows 0 to n-1 are used, pages one after the other."""

    def __init__(self, config: ServeConfig, spec: ModelSpec, runtime_dir: Path) -> None:
        from ...workers.startup import load_runner

        self._console = Console(stderr=True)
        self.runner = load_runner(config, 0, 0, runtime_dir, self._report)
        self.config = config
        self._vocab = spec.num_token_ids if spec.num_token_ids < 1 << 61 else spec.vocab_size
        self._page_size = config.page_size

    def prefill(self, rows: int, tokens: int) -> float:
        """Fill `rows` rows with prompts of `tokens` random tokens, as many per step as the
        budget lets. -> seconds until the last first token is there."""
        import torch

        budget = self.config.batch_max_tokens or tokens
        chunk = min(self.config.chunked_prefill_size or budget, budget)
        generator = torch.Generator().manual_seed(rows + tokens)
        pages = -(-(tokens + _ROOM) // self._page_size)
        ids = torch.randint(0, self._vocab, (rows, tokens), generator=generator).tolist()
        params = SamplingParams(max_new_tokens=1 << 20)
        plans = []
        done = [0] * rows
        while min(done) < tokens:
            admits, chunks, left = [], [], budget
            for row in range(rows):
                begin = done[row]
                end = done[row] = min(tokens, begin + min(chunk, left))
                left -= end - begin
                if begin == 0 < end:
                    own = list(range(row * pages, (row + 1) * pages))
                    admits.append(RowAdmit(row, params, own, 0, 0, []))
                if begin < end:
                    chunks.append(PrefillChunk(row, begin, ids[row][begin:end], end == tokens))
            plans.append(self._plan(admits, chunks))
        started = time.perf_counter()
        self._run(plans)
        return time.perf_counter() - started

    def decode(self, rows: int, steps: int) -> list[float]:
        """Decode all rows for some steps. -> seconds from one step's tokens to the next's."""
        return self._run([self._plan(decode=list(range(rows))) for _ in range(steps)])

    def mixed(self, rows: int, context: int, tokens: int, steps: int) -> list[float]:
        """Steps that decode all rows, of `context` tokens at first, beside a whole prompt of
        `tokens` tokens, each time a new one. -> as `decode`."""
        import torch

        first = rows * -(-(context + _ROOM) // self._page_size)
        own = list(range(first, first - (-tokens // self._page_size)))
        plans = []
        for step in range(steps):
            generator = torch.Generator().manual_seed(step)
            ids = torch.randint(0, self._vocab, (tokens,), generator=generator).tolist()
            admit = RowAdmit(rows, SamplingParams(max_new_tokens=1), own, 0, 0, [])
            chunk = PrefillChunk(rows, 0, ids, sample=True)
            freed = [rows] if step else []
            plans.append(self._plan([admit], [chunk], list(range(rows)), freed))
        return self._run(plans)

    def count_experts(self, rows: int) -> float:
        """Distinct experts per layer of one decode step; median over layers. 0 if there are no
        experts."""
        from ...workers.model.routing import count_distinct, recorded_routing

        graphs, self.runner.graphs = self.runner.graphs, None  # whose routing cannot be seen
        with recorded_routing() as seen:
            self.decode(rows, 1)
        self.runner.graphs = graphs
        return median(count_distinct(seen)) if seen else 0.0

    def free(self, rows: int) -> None:
        """Give all rows back."""
        self.runner.run(self._plan(freed=list(range(rows))))

    def _plan(
        self,
        admits: Sequence[RowAdmit] = (),
        chunks: Sequence[PrefillChunk] = (),
        decode: Sequence[int] = (),
        freed: Sequence[int] = (),
    ) -> StepPlan:
        return StepPlan(0, 0, list(freed), list(admits), [], list(chunks), list(decode))

    def _run(self, plans: Sequence[StepPlan]) -> list[float]:
        """Launch each plan before the one ahead of it is read, as a worker does."""
        times = []
        ahead = None
        for plan in plans:
            step = self.runner.launch(plan)
            if ahead is not None:
                self.runner.finish(ahead)
                times.append(time.perf_counter())
            ahead = step
        if ahead is not None:
            self.runner.finish(ahead)
            times.append(time.perf_counter())
        return [b - a for a, b in pairwise(times)]

    def _report(self, stage: str, done: int, total: int) -> None:
        if not done or done == total:
            self._console.print(f"{time.monotonic():.1f} {stage} {done}/{total}", style="dim")


def measure(bench: Bench, spec: ModelSpec, gpu: Gpu | None, args: argparse.Namespace) -> list[Any]:
    """All rows of the table and their profiles: (Result, Trace or None)."""
    return (
        [_measure_prefill(bench, spec, gpu, args, *pair) for pair in args.prefill]
        + [_measure_decode(bench, spec, gpu, args, *pair) for pair in args.decode]
        + [_measure_mixed(bench, spec, gpu, args, *three) for three in args.mixed]
    )


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
    seconds = median(times[1:])
    bound = prefill_seconds(spec, gpu, tokens, rows) if gpu else 0.0
    result = Result("prefill", rows, tokens, seconds * 1e3, rows * tokens / seconds, bound * 1e3,
                    float(spec.num_experts), trace.idle_share if trace else None)  # fmt: skip
    return result, trace


def _measure_decode(
    bench: Bench, spec: ModelSpec, gpu: Gpu | None, args: argparse.Namespace, rows: int, tokens: int
) -> tuple[Result, Trace | None]:
    bench.prefill(rows, tokens)
    experts = bench.count_experts(rows)
    bench.decode(rows, _WARM_UP_STEPS)
    step = median(bench.decode(rows, args.steps))
    trace = None
    if args.profile:
        with traced() as trace:
            bench.decode(rows, _PROFILED_STEPS)
    bench.free(rows)
    bound = decode_seconds(spec, gpu, rows, tokens) if gpu else 0.0
    result = Result("decode", rows, tokens, step * 1e3, rows / step, bound * 1e3, experts,
                    trace.idle_share if trace else None)  # fmt: skip
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
    seconds = median(bench.mixed(rows, context, tokens, _MIXED_STEPS))
    trace = None
    if args.profile:
        bench.free(rows + 1)
        bench.prefill(rows, context)
        with traced() as trace:
            bench.mixed(rows, context, tokens, _PROFILED_STEPS)
    bench.free(rows + 1)
    bound = mixed_seconds(spec, gpu, rows, context, tokens) if gpu else 0.0
    result = Result("mixed", rows, tokens, seconds * 1e3, (rows + tokens) / seconds, bound * 1e3,
                    float(spec.num_experts), trace.idle_share if trace else None)  # fmt: skip
    return result, trace


def _show(console: Console, found: list[Any], device: str) -> None:
    table = Table(title=f"step time on {device}")
    for name in ("step", "rows", "tokens", "ms", "tokens/s", "roofline ms", "share", "experts",
                 "GPU idle"):  # fmt: skip
        table.add_column(name, justify="right")
    for result, _ in found:
        share = f"{result.roofline_ms / result.ms:.0%}" if result.roofline_ms else "-"
        idle = f"{result.idle_share:.1%}" if result.idle_share is not None else "-"
        table.add_row(result.kind, str(result.rows), str(result.tokens), f"{result.ms:.2f}",
                      f"{result.tokens_per_s:,.0f}", f"{result.roofline_ms:.2f}", share,
                      f"{result.experts:.0f}", idle)  # fmt: skip
    console.print(table)


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
    parser.add_argument("--steps", type=int, default=40, help="decode steps to measure")
    parser.add_argument("--repeats", type=int, default=3, help="prefills to measure")
    parser.add_argument("--profile", action="store_true", help="time by kernel, and GPU idle time")
    parser.add_argument("--json", type=Path, help="write the results there")
    args, rest = parser.parse_known_args(argv)
    if not 1 <= args.steps <= _MOST_STEPS or args.repeats < 1:
        raise UsageError(f"--steps needs to be from 1 to {_MOST_STEPS}, --repeats at least 1")
    return args, rest


def main(argv: Sequence[str]) -> int:
    """Entry point of `glimmer bench latency`."""
    from ..cli import parse_with_logging, with_model
    from ..preflight import detect_hardware

    args, rest = parse(argv)
    config = with_model(parse_with_logging(rest))
    spec = load_model_spec(Path(config.model_dir))
    settled = resolve(config, spec, detect_hardware())
    console = Console(width=110)
    where = environment()
    gpu = gpu_of(where["device"]) if settled.device != "cpu" else None
    with tempfile.TemporaryDirectory(prefix="glimmer-bench-") as directory:
        bench = Bench(settled, spec, Path(directory))
        console.print(f"{bench.runner.num_pages * settled.page_size:,} KV tokens")
        found = measure(bench, spec, gpu, args)
    for result, trace in found:
        if trace is not None:
            _show_profile(console, result, trace)
    _show(console, found, where["device"])
    if args.json:
        rows = [{**asdict(result), "kernels": trace and trace.kernels} for result, trace in found]
        settings = {k: v if k != "json" else str(v) for k, v in vars(args).items()}
        write_report(args.json, report("latency", argv, settings, rows))
    return 0
