"""`--otlp_traces_endpoint`: each generating request as OpenTelemetry spans, if the extra `otel` is
installed.

The spans of a request are made when it has ended, from times that are measured anyway: one for the
request, with a queue, prefill and decode span for each of its sequences. A thread of the SDK sends
them. Its queue is bounded: when the collector does not take them, spans are dropped and counted.
The SDK reads OTEL_* variables, such as those of the sampler; a sampled parent is always followed.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from threading import Thread
from typing import TYPE_CHECKING, Any

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from ...shared.messages import Finished
from .metrics import RequestRecord

if TYPE_CHECKING:  # it imports this module's users
    from .job import Job, Reply

_MAX_WAITING = 2048  # spans
_MAX_SEQUENCES = 8  # of a request, that get spans of their own
_END_S = 2.0  # for the last spans when the process ends
_EXPORT_S = 5.0
_OPERATIONS = {"/v1/completions": "text_completion", "/generate": "text_completion"}
_PROPAGATOR = TraceContextTextMapPropagator()
logger = logging.getLogger(__name__)


class CountingExporter(SpanExporter):
    """Sends spans by another exporter, counts them, and logs the first failure of an outage. Called
    on the thread of the SDK."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self.num_sent = self.num_failed = 0
        self._is_failing = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send them. Never raises."""
        try:
            result = self._exporter.export(spans)
        except Exception as error:
            logger.debug("spans were not sent: %s", error)
            result = SpanExportResult.FAILURE
        is_failing = result is not SpanExportResult.SUCCESS
        if is_failing:
            self.num_failed += len(spans)
        else:
            self.num_sent += len(spans)
        if is_failing and not self._is_failing:
            logger.warning("the trace collector takes no spans: they are dropped and counted")
        self._is_failing = is_failing
        return result

    def shutdown(self) -> None:
        """End the other exporter."""
        self._exporter.shutdown()


class Tracer:
    """Makes spans of ended requests and hands them to `exporter` on a thread. Used on one event
    loop. `num_dropped` counts spans that were not delivered."""

    def __init__(self, model: str, exporter: SpanExporter) -> None:
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # the first failure is enough
        self._model = model
        self._exporter = CountingExporter(exporter)
        self._num_started = self._num_refused = 0
        resource = Resource.create({"service.name": "glimmer"})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        processor = BatchSpanProcessor(
            self._exporter,
            max_queue_size=_MAX_WAITING,
            max_export_batch_size=min(512, _MAX_WAITING),
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("glimmer")

    @classmethod
    def to(cls, endpoint: str, model: str) -> "Tracer":
        """One that sends to this URL by OTLP over HTTP."""
        return cls(model, OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_S))

    @property
    def num_dropped(self) -> int:
        """Spans that were refused because too many waited, or that the collector did not take."""
        return self._num_refused + self._exporter.num_failed

    def trace(self, job: "Job[Any]", record: RequestRecord, status: int) -> None:
        """Make the spans of a request that ends now."""
        exporter, replies = self._exporter, job.replies[:_MAX_SEQUENCES]
        num_spans = 1 + 3 * len(replies)
        num_waiting = self._num_started - exporter.num_sent - exporter.num_failed
        if num_waiting + num_spans > _MAX_WAITING:
            self._num_refused += num_spans
            return
        end_ns = time.time_ns()
        start_ns = end_ns - _ns(record.total_s)
        operation = _OPERATIONS.get(job.request.path.removesuffix("_stream"), "chat")
        root = self._tracer.start_span(
            f"{operation} {self._model}",
            _PROPAGATOR.extract(_trace_headers(job.request.headers)),
            trace.SpanKind.SERVER,
            attributes=self._attributes(job, record, status, operation),
            start_time=start_ns,
        )
        if root.is_recording():
            self._num_started += num_spans
            for reply in replies:
                self._trace_reply(root, reply, start_ns + _ns(record.submitted_s))
            if status >= 500:
                root.set_status(trace.StatusCode.ERROR)
        root.end(end_ns)

    def _trace_reply(self, root: Span, reply: "Reply[Any]", begin_ns: int) -> None:
        """The spans of one sequence, submitted at `begin_ns`, by the scheduler's times."""
        finished = reply.finished or Finished(0, "")
        for name, seconds in (
            ("queue", finished.queue_s),
            ("prefill", finished.prefill_s),
            ("decode", finished.decode_s),
        ):
            span = self._tracer.start_span(
                name,
                trace.set_span_in_context(root),
                attributes={"glimmer.sequence": reply.index},
                start_time=begin_ns,
            )
            begin_ns += _ns(seconds)
            span.end(begin_ns)

    def close(self) -> None:
        """Send what waits, but not for long."""
        closer = Thread(target=self._provider.shutdown, daemon=True)
        closer.start()
        closer.join(_END_S)

    def _attributes(
        self, job: "Job[Any]", record: RequestRecord, status: int, operation: str
    ) -> dict[str, Any]:
        """Names of OpenTelemetry's conventions for HTTP and for generative AI."""
        sampling = job.spec.sampling
        reasons = [reply.finish_reason or "none" for reply in job.replies]
        return {
            "http.request.method": job.request.method,
            "http.route": job.request.path,
            "http.response.status_code": status,
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "glimmer",
            "gen_ai.request.model": self._model,
            "gen_ai.response.model": self._model,
            "gen_ai.request.max_tokens": record.max_new_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.choice.count": job.spec.n,
            "gen_ai.response.finish_reasons": reasons,
            "gen_ai.usage.input_tokens": record.num_prompt_tokens,
            "gen_ai.usage.output_tokens": record.num_output_tokens,
            "gen_ai.usage.cache_read.input_tokens": record.num_cached_tokens,
            "gen_ai.latency.time_to_first_token": record.first_token_s,
            "glimmer.request_id": job.generation.name,
        }


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)


def _trace_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers of the trace context, by the names that the propagator looks for."""
    return {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
