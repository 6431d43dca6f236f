"""The ops listener: probes and metrics, on loopback."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from starlette.responses import Response

from broker.api import schemas
from broker.api.metrics import CONTENT_TYPE
from broker.api.operations import Answer, Operation, listener_app
from broker.api.responses import NOT_READY, OK, json_response
from broker.api.views import readiness_view

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import ASGIApp

    from broker.api.metrics import PrometheusTelemetry
    from broker.api.readiness import Readiness

HEALTH: Final = Operation(
    method="GET",
    path="/healthz",
    id="readHealth",
    summary="Whether the process is alive: nothing is checked, so that nothing else restarts it",
    answers={200: Answer("Alive.", schemas.Health)},
)
READINESS: Final = Operation(
    method="GET",
    path="/readyz",
    id="readReadiness",
    summary="Whether the broker can do its work",
    answers={
        200: Answer("Ready.", schemas.ReadinessView),
        503: Answer("Not ready: each thing that is not, by name.", schemas.ReadinessView),
    },
)
METRICS: Final = Operation(
    method="GET",
    path="/metrics",
    id="readMetrics",
    summary="Metrics in Prometheus' text format",
    answers={200: Answer("The metrics.", media_type=CONTENT_TYPE)},
)

OPERATIONS: Final = (HEALTH, READINESS, METRICS)


def ops_app(readiness: Readiness, telemetry: PrometheusTelemetry) -> ASGIApp:
    """Return the application of the ops listener."""

    async def health(_request: Request) -> Response:
        return json_response({"status": "ok"})

    async def ready(_request: Request) -> Response:
        problems = readiness.problems()
        return json_response(readiness_view(problems), NOT_READY if problems else OK)

    async def metrics(_request: Request) -> Response:
        return Response(telemetry.exposition(), media_type=CONTENT_TYPE)

    return listener_app([(HEALTH, health), (READINESS, ready), (METRICS, metrics)])
