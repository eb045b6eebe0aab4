"""A request as spans, by an exporter in memory and by a collector of OTLP that is played."""

import asyncio
import gzip
import logging
from typing import Any

import pytest
from aiohttp import web

pytest.importorskip("opentelemetry.sdk")
from glimmer.frontend.engine import traces
from glimmer.frontend.engine.traces import Tracer
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
BODY = {"inputs": [1, 2, 3], "parameters": {"max_new_tokens": 2}}


def context(sampled: bool) -> dict[str, str]:
    return {"traceparent": f"00-{TRACE_ID}-00f067aa0ba902b7-0{int(sampled)}"}


async def traced(server: Any, exporter: SpanExporter) -> Tracer:
    tracer = Tracer("tiny", exporter)
    server.frontend.tracer = tracer
    return tracer


async def finish(server: Any, headers: dict[str, str], **times: float) -> None:
    """One request that the scheduler says these times of."""
    server.engine.manual = True
    count = len(server.engine.submits)
    waiting = asyncio.create_task(server.post("/generate", BODY, headers=headers))
    submit = (await server.engine.submitted(count + 1))[count]
    server.engine.tokens(submit, [5, 6])
    server.engine.finish(submit, "length", 2, **times)
    assert (await waiting)[0] == 200


async def test_a_request_is_a_span_with_queue_prefill_and_decode(server: Any) -> None:
    memory = InMemorySpanExporter()
    tracer = await traced(server, memory)
    await finish(server, context(True), queue_s=0.5, prefill_s=0.25, decode_s=0.125)
    tracer.close()
    spans = {span.name: span for span in memory.get_finished_spans()}
    assert set(spans) == {"text_completion tiny", "queue", "prefill", "decode"}
    root = spans["text_completion tiny"]
    assert all(f"{span.context.trace_id:032x}" == TRACE_ID for span in spans.values())
    assert root.parent is not None
    assert f"{root.parent.span_id:016x}" == "00f067aa0ba902b7"
    lengths = {name: span.end_time - span.start_time for name, span in spans.items()}
    assert (lengths["queue"], lengths["prefill"], lengths["decode"]) == (5e8, 2.5e8, 1.25e8)
    assert spans["queue"].end_time == spans["prefill"].start_time
    for name in ("queue", "prefill", "decode"):
        assert spans[name].parent.span_id == root.context.span_id
    wanted = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.max_tokens": 2,
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 2,
        "http.response.status_code": 200,
        "http.route": "/generate",
    }
    assert wanted.items() <= dict(root.attributes).items()
    assert root.attributes["glimmer.request_id"]
    assert tracer.num_dropped == 0


async def test_a_parent_that_is_not_sampled_is_followed(server: Any) -> None:
    memory = InMemorySpanExporter()
    tracer = await traced(server, memory)
    await finish(server, context(False))
    await finish(server, {"traceparent": "nonsense"})
    tracer.close()
    roots = [span for span in memory.get_finished_spans() if span.name.startswith("text")]
    assert len(roots) == 1, "the second one begins a trace of its own"
    assert roots[0].parent is None


class Broken(SpanExporter):
    def __init__(self) -> None:
        self.works = False

    def export(self, spans: Any) -> SpanExportResult:
        if not self.works:
            raise ConnectionError("no collector")
        return SpanExportResult.SUCCESS


def test_an_outage_is_logged_once_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    broken = Broken()
    exporter = traces.CountingExporter(broken)
    spans: list[ReadableSpan] = [ReadableSpan("a"), ReadableSpan("b")]
    with caplog.at_level(logging.WARNING):
        exporter.export(spans)
        exporter.export(spans)
        broken.works = True
        exporter.export(spans)
    assert (exporter.num_failed, exporter.num_sent) == (4, 2)
    assert caplog.text.count("takes no spans") == 1


async def test_spans_that_do_not_fit_the_queue_are_dropped(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traces, "_MAX_WAITING", 6)
    memory = InMemorySpanExporter()
    tracer = await traced(server, memory)
    await finish(server, {})
    await finish(server, {})
    assert tracer.num_dropped == 4
    tracer.close()
    assert len(memory.get_finished_spans()) == 4


async def test_a_collector_gets_them_by_http(start: Any) -> None:
    bodies: list[bytes] = []

    async def take(request: web.Request) -> web.Response:
        bodies.append(await request.read())
        return web.Response()

    app = web.Application()
    app.router.add_post("/v1/traces", take)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    endpoint = f"http://127.0.0.1:{runner.addresses[0][1]}/v1/traces"
    server = await start(otlp_traces_endpoint=endpoint)
    await finish(server, context(True), decode_s=0.1)
    await asyncio.to_thread(server.frontend.tracer.close)
    assert "glimmer_trace_spans_dropped_total" in (await server.get("/metrics"))[1]
    await runner.cleanup()
    raw = bodies[0]
    message = ExportTraceServiceRequest()
    message.ParseFromString(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
    [resource] = message.resource_spans
    names = {span.name for scope in resource.scope_spans for span in scope.spans}
    assert names == {"text_completion tiny", "queue", "prefill", "decode"}
