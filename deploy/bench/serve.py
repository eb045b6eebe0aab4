"""`glimmer bench serve`: measures a running OpenAI-compatible server under load.

Works with Glimmer, vLLM and LightLLM. Times are defined as in `vllm bench serve` and have the same
names in the JSON, so the figures of both can be compared:

  TTFT  from sending a request to its first chunk with tokens
  TPOT  (last chunk - first chunk) / (output tokens - 1); the first token is left out
  ITL   between two successive chunks with tokens; a chunk may hold several tokens
  E2EL  from sending a request to its last chunk
  throughput: of complete replies, over the time from the first request to the last chunk

Tokens are counted by the server (stream_options.include_usage), otherwise by a tokenizer. Unlike in
vLLM, a chunk that only opens or ends a reply does not count as a token. Failed requests are counted
by reason and are not part of other figures. Warm-up requests have different prompts.

  glimmer bench serve --concurrency 32 --num_prompts 128 --input_len 1024 --output_len 256 \\
      --ignore_eos --json result.json
  glimmer bench serve --request_rate 4 --dataset shared-prefix --prefix_len 2000 --input_len 200
  glimmer bench serve --route chat --dataset text --tokenizer /path/to/GLM-4.7-Flash --seed 7

Exit code: 0 all requests were answered, 1 some failed or none could be sent, 2 usage.
"""

import asyncio
import gc
import resource
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import uvloop
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ...shared.errors import StartError
from .client import Client, ask_server, is_local, open_session, served_model
from .load import arrivals, run_load
from .metrics import PERCENTILES, TIMES, Run, details, summarize
from .prompts import load_tokenizer, make_prompts
from .report import report, write_report
from .settings import Settings, parse_settings, without_secrets

_BUSY = 0.7  # from this share of a core on, this process may slow down the measured server
_MOST_REASONS = 10
_TITLES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "time between chunks",
    "e2el": "whole request",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, print the tables (and write JSON with --json). Returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    settings = parse_settings(words, __doc__)
    _allow_connections()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            server, run = runner.run(_measure(settings))
    except KeyboardInterrupt:
        raise StartError("stopped before the end: there are no figures") from None
    results = summarize(run)
    if settings.details:
        results["requests"] = details(run)
    full_report = report(
        "serve",
        without_secrets(words),
        settings.public(),
        results,
        server={"is_local": is_local(settings.url), **server},
    )
    _print(full_report, results)
    if settings.json is not None:
        write_report(settings.json, full_report)
    return 1 if results["failed"] else 0


def _allow_connections() -> None:
    """Raise the limit of open files to the greatest allowed: each request may be a connection."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _known_vocab_size(settings: Settings, server: dict[str, Any]) -> int:
    """`--vocab_size`, or less if the server says that it has less."""
    info = server.get("info")
    size = info.get("vocab_size") if isinstance(info, dict) else None
    return min(settings.vocab_size, size) if isinstance(size, int) else settings.vocab_size


async def _measure(settings: Settings) -> tuple[dict[str, Any], Run]:
    """Warm up, then measure. Returns the server's description of itself, and the run."""
    async with open_session(settings) as session:
        server = await ask_server(session, settings.url)
        model = settings.model or served_model(server)
        tokenizer = load_tokenizer(settings.tokenizer, server)
        settings = replace(settings, vocab_size=_known_vocab_size(settings, server))
        warmups = make_prompts(settings, tokenizer, settings.num_warmups, "warm-up")
        prompts = make_prompts(settings, tokenizer, settings.num_prompts, "measured")
        client = Client(session, settings, model, tokenizer)
        if warmups:
            warm = await run_load(warmups, client.send, [0.0] * len(warmups), settings.concurrency)
            _check_warmup(warm)
        gc.collect()
        gc.freeze()  # garbage collection over all prompts would delay the reading of chunks
        times_s = arrivals(len(prompts), settings.request_rate, settings.seed)
        with Progress(console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task("requests", total=len(prompts))
            progress.disable = not progress.console.is_terminal
            run = await run_load(
                prompts,
                client.send,
                times_s,
                settings.concurrency,
                lambda outcome: progress.advance(bar),
            )
    return {"model": model, **server}, run


def _check_warmup(warm: Run) -> None:
    """Raise StartError if every warm-up request failed: the measured ones would fail as well."""
    errors = [o.error for o in warm.outcomes if o.error is not None]
    if len(errors) == len(warm.outcomes):
        raise StartError(f"the warm-up failed, nothing was measured: {errors[0]}")


def _print(full_report: dict[str, Any], results: dict[str, Any]) -> None:
    console = Console(width=100)
    console.print(_overview(full_report, results))
    console.print(_latencies(results))
    for line in _remarks(full_report, results):
        console.print(line, markup=False, highlight=False)


def _overview(full_report: dict[str, Any], results: dict[str, Any]) -> Table:
    settings, environment = full_report["settings"], full_report["environment"]
    device = environment["device"] if full_report["server"]["is_local"] else "another machine"
    table = Table(title=f"{full_report['server']['model']} on {device}", show_header=False)
    rate = settings["request_rate"]
    prefix = f"{settings['prefix_len']} shared + " if settings["prefix_len"] else ""
    lengths = f"{prefix}{settings['input_len']} in, {settings['output_len']} out"
    pace = "all at once" if settings["concurrency"] is None and rate is None else ""
    pace += f"{settings['concurrency']} at a time" if settings["concurrency"] else ""
    pace += f" {rate:g}/s" if rate else ""
    rows = {
        "workload": f"{settings['route']}, {settings['dataset']}: {lengths}, {pace.strip()}",
        "requests answered, failed": f"{results['completed']}, {results['failed']}",
        "duration": f"{results['duration']:.2f} s",
        "tokens in, out": f"{results['total_input_tokens']:,}, {results['total_output_tokens']:,}",
        "requests/s": f"{results['request_throughput']:.2f}",
        "output tokens/s": f"{results['output_throughput']:,.1f}",
        "all tokens/s": f"{results['total_token_throughput']:,.1f}",
        "decode tokens/s of a stream": _number(results["decode_tokens_per_s_per_stream"]),
        "prefill tokens/s of a stream": _number(results["prefill_tokens_per_s_per_stream"]),
        "tokens per chunk": _number(results["tokens_per_chunk"]),
        "most requests at once": str(results["max_concurrent_requests"]),
        "client's share of a core": f"{results['client_cpu_share']:.0%}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _latencies(results: dict[str, Any]) -> Table:
    names = ("mean", "median", *(f"p{p}" for p in PERCENTILES))
    table = Table("ms", *names)
    for column in table.columns[1:]:
        column.justify = "right"
    for time in TIMES:
        values = (_number(results[f"{name}_{time}_ms"]) for name in names)
        table.add_row(f"{time.upper()}, {_TITLES[time]}", *values)
    return table


def _remarks(full_report: dict[str, Any], results: dict[str, Any]) -> list[str]:
    """Warnings about the figures of the tables."""
    lines = [f"{f['count']} failed: {f['reason']}" for f in results["failures"]]
    if len(lines) > _MOST_REASONS:
        others = sum(f["count"] for f in results["failures"][_MOST_REASONS:])
        lines[_MOST_REASONS:] = [f"{others} failed for other reasons: see --json"]
    if full_report["settings"]["ignore_eos"] and results["short_replies"]:
        short = results["short_replies"]
        lines.append(f"{short} replies are shorter than requested, although --ignore_eos was given")
    for counter, number in results["counted_by"].items():
        if counter != "usage":
            lines.append(f"the server did not count the tokens of {number} replies: {counter} did")
    if results["client_cpu_share"] > _BUSY:
        lines.append("this process was busy: it may have slowed down the server")
    if not full_report["server"]["is_local"]:
        lines.append(
            "the server runs on another machine: the JSON has GPU and versions of this one"
        )
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}"
