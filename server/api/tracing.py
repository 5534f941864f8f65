"""Traces of requests, as OpenTelemetry's, where the standard `OTEL_*` variables ask for them.

One span for each request, with the times and tokens of its sequences, in the trace that the client began. Needs the
extra `otel`; nothing of it is imported otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import server
from server.context import RequestContext, current

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

logger = logging.getLogger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
HTTP = "http/protobuf"


def wanted(environment: Mapping[str, str]) -> bool:
    """Whether the variables ask for traces."""
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    exporter = environment.get("OTEL_TRACES_EXPORTER", "")
    return exporter != "none" and bool(exporter or any(environment.get(name) for name in ENDPOINTS))


def make_provider(environment: Mapping[str, str]) -> TracerProvider | None:
    """What exports the spans, as the variables say; None where they ask for none, or for what is not there."""
    if not wanted(environment):
        return None
    exporter = environment.get("OTEL_TRACES_EXPORTER", "") or "otlp"
    protocol = next((environment[name] for name in PROTOCOLS if environment.get(name)), HTTP)
    if exporter not in ("otlp", "console") or protocol != HTTP:
        logger.warning(
            "no traces: of exporters otlp by %s and console are there, not %s by %s", HTTP, exporter, protocol
        )
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
        from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter  # noqa: PLC0415
    except ImportError:
        logger.warning("no traces: they need the extra `otel` (pip install 'multilora[otel]')")
        return None
    about = {SERVICE_VERSION: server.__version__}
    if not environment.get("OTEL_SERVICE_NAME"):
        about[SERVICE_NAME] = "multilora"
    provider = TracerProvider(resource=Resource.create(about))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter() if exporter == "otlp" else ConsoleSpanExporter()))
    return provider


class Tracing:
    """A span around each request, from its head to the last byte of its answer."""

    def __init__(self, app: ASGIApp, provider: TracerProvider) -> None:
        from opentelemetry.propagate import extract  # noqa: PLC0415
        from opentelemetry.trace import SpanKind  # noqa: PLC0415

        self.app = app
        self._tracer = provider.get_tracer("multilora", server.__version__)
        self._extract = extract
        self._kind = SpanKind.SERVER

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        parent = self._extract(dict(Headers(scope=scope)))
        with self._tracer.start_as_current_span(scope["method"], parent, self._kind) as span:
            context = current()
            context.trace_id = f"{span.get_span_context().trace_id:032x}"

            async def send_noted(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                await send(message)

            try:
                await self.app(scope, receive, send_noted)
            finally:
                route = getattr(scope.get("route"), "path", None)
                if route:
                    span.update_name(f"{scope['method']} {route}")
                span.set_attributes(_attributes(scope, route, context))


def _attributes(scope: Scope, route: str | None, context: RequestContext) -> dict[str, Any]:
    """Of OpenTelemetry's conventions for HTTP and generative AI; latencies, in seconds, under vLLM's names."""
    found: dict[str, Any] = {
        "http.request.method": scope["method"],
        "url.path": scope["path"],
        "http.route": route,
        "gen_ai.request.id": context.id,
    }
    if context.sequences:
        found |= {
            "gen_ai.request.model": ", ".join(context.models),
            "gen_ai.usage.input_tokens": context.prompt_tokens,
            "gen_ai.usage.output_tokens": context.completion_tokens,
            "gen_ai.latency.time_in_queue": context.queue_s,
            "gen_ai.latency.time_to_first_token": context.first_token_s,
            "multilora.sequences": context.sequences,
            "multilora.adapter_digests": [digest for digest in context.models.values() if digest],
        }
    return {name: value for name, value in found.items() if value is not None}
