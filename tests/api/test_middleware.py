from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import httpx
import orjson
import pytest
from starlette.responses import Response, StreamingResponse
from structlog.testing import capture_logs

from broker.api import schemas
from broker.api.limits import LimitSettings, RequestLimiter
from broker.api.metrics import PrometheusTelemetry
from broker.api.middleware import RequestBoundary, remember_identity, trace_id_of
from broker.api.strict_json import read_model
from broker.core.errors import LedgerUnavailable, TaskClosed, Unauthenticated
from tests.support.edge import routed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request
    from starlette.types import ASGIApp

    from broker.api.logs import AccessRecord

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def _thing(request: Request) -> Response:
    remember_identity(request.scope, "spiffe://example.test/agent")
    return Response(orjson.dumps({"trace_id": trace_id_of(request.scope)}))


async def _tasks(request: Request) -> Response:
    await read_model(request, schemas.TaskRequest)
    raise TaskClosed("The task has ended.")


async def _failing(_request: Request) -> Response:
    raise RuntimeError("password=hunter2")


async def _barred(_request: Request) -> Response:
    raise Unauthenticated("J-7", "two audiences")


async def _full(_request: Request) -> Response:
    raise LedgerUnavailable("Nothing durable.") from OSError("disk full")


async def _kept(_request: Request) -> Response:
    return Response(b"", headers={"cache-control": "max-age=60"})


async def _half(_request: Request) -> Response:
    async def body() -> AsyncIterator[bytes]:
        yield b"half"
        raise RuntimeError("gone")

    return StreamingResponse(body())


class Edge:
    """A boundary around a small application, with what it logged and counted."""

    def __init__(self, **options: Any) -> None:
        self.records: list[AccessRecord] = []
        self.telemetry = PrometheusTelemetry([], ["workload"])
        self.reached = asyncio.Event()
        self.go = asyncio.Event()
        self.boundary = RequestBoundary(
            self._application(),
            listener="workload",
            telemetry=self.telemetry,
            access_log=self.records.append,
            **options,
        )

    def _application(self) -> ASGIApp:
        async def slow(_request: Request) -> Response:
            self.reached.set()
            await self.go.wait()
            return Response(b"")

        return routed(
            {
                "GET /things/{name}": _thing,
                "POST /tasks": _tasks,
                "GET /failing": _failing,
                "GET /barred": _barred,
                "GET /full": _full,
                "GET /kept": _kept,
                "GET /half": _half,
                "GET /slow": slow,
            }
        )

    def client(self) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(app=self.boundary, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="https://broker.test")


def check_problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert schemas.Problem.model_validate_json(answer.content).trace_id == answer.headers["trace-id"]
    members: dict[str, Any] = answer.json()
    assert members["type"] == f"urn:nhi-broker:problem:{code}"
    return members


async def test_every_answer_carries_a_fresh_trace_id_and_is_not_stored() -> None:
    async with Edge().client() as client:
        one, two = await client.get("/things/a"), await client.get("/things/a")
    assert one.json()["trace_id"] == one.headers["trace-id"] != two.headers["trace-id"]
    assert one.headers["cache-control"] == "no-store"
    assert one.headers["x-content-type-options"] == "nosniff"


async def test_a_valid_traceparent_is_taken_over() -> None:
    async with Edge().client() as client:
        answer = await client.get("/things/a", headers={"traceparent": PARENT})
    assert answer.headers["trace-id"] == PARENT.split("-")[1]


@pytest.mark.parametrize(
    "value",
    [
        "",
        "00-" + "0" * 32 + "-b7ad6b7169203331-01",
        PARENT.upper(),
        PARENT.replace("00-", "ff-", 1),
        PARENT + "-<script>",
        "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
    ],
)
async def test_any_other_traceparent_is_not(value: str) -> None:
    async with Edge().client() as client:
        answer = await client.get("/things/a", headers={"traceparent": value})
    assert len(answer.headers["trace-id"]) == 32
    assert answer.headers["trace-id"].lower() not in PARENT
    assert set(answer.headers["trace-id"]) != {"0"}


async def test_a_route_may_allow_caching() -> None:
    async with Edge().client() as client:
        assert (await client.get("/kept")).headers.get_list("cache-control") == ["max-age=60"]


async def test_a_core_error_becomes_its_problem() -> None:
    async with Edge().client() as client:
        check_problem(await client.post("/tasks", json={"purpose": "p"}), 409, "task-closed")


async def test_errors_of_the_router_and_the_readers_have_the_same_shape() -> None:
    async with Edge().client() as client:
        check_problem(await client.get("/nowhere/<script>"), 404, "no-such-path")
        wrong_method = await client.delete("/tasks")
        check_problem(wrong_method, 405, "method-not-allowed")
        assert wrong_method.headers["allow"] == "POST"
        check_problem(await client.post("/tasks", content=b"{"), 415, "unsupported-media-type")
        check_problem(await client.get("/things/a/"), 404, "no-such-path")


async def test_what_nobody_expected_is_opaque_and_logged_once_with_its_trace_id() -> None:
    edge = Edge()
    with capture_logs() as logged:
        async with edge.client() as client:
            answer = await client.get("/failing")
    check_problem(answer, 500, "internal")
    assert "hunter2" not in answer.text
    errors = [entry for entry in logged if entry["log_level"] == "error"]
    assert [entry["trace_id"] for entry in errors] == [answer.headers["trace-id"]]
    assert isinstance(errors[0]["exc_info"], RuntimeError)


async def test_the_rule_that_refused_an_svid_is_logged_and_not_told() -> None:
    with capture_logs() as logged:
        async with Edge().client() as client:
            answer = await client.get("/barred")
    check_problem(answer, 401, "unauthenticated")
    assert "J-7" not in answer.text
    assert [entry["rule"] for entry in logged if "rule" in entry] == ["J-7"]


async def test_a_503_is_logged_with_its_cause() -> None:
    with capture_logs() as logged:
        async with Edge().client() as client:
            check_problem(await client.get("/full"), 503, "ledger-unavailable")
    assert [entry["cause"] for entry in logged if "cause" in entry] == ["OSError('disk full')"]


async def test_half_an_answer_is_not_completed() -> None:
    edge = Edge()
    sent: list[Any] = []

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/half", "query_string": b"", "headers": []}
    with capture_logs() as logged:
        await edge.boundary(scope, receive, send)
    assert all(message.get("more_body", True) for message in sent)
    assert "failed after its answer began" in [entry["event"] for entry in logged]


async def test_the_access_log_holds_the_template_and_nothing_that_was_sent() -> None:
    edge = Edge()
    async with edge.client() as client:
        await client.get("/things/s3cret?limit=5", headers={"authorization": "Bearer s3cret"})
        await client.request("BREW", "/s3cret")
    first, second = edge.records
    assert (first.route, first.status, first.identity, first.problem) == (
        "/things/{name}",
        200,
        "spiffe://example.test/agent",
        None,
    )
    assert (second.method, second.route, second.problem) == ("-", "-", "no-such-path")
    assert "s3cret" not in repr(edge.records)


async def test_answers_and_refusals_are_counted() -> None:
    edge = Edge()
    async with edge.client() as client:
        await client.get("/things/a")
        await client.get("/nowhere")
    value = edge.telemetry.registry.get_sample_value
    assert value("nhi_http_answers_total", {"listener": "workload", "status": "200"}) == 1
    assert value("nhi_http_answers_total", {"listener": "workload", "status": "404"}) == 1
    assert value("nhi_requests_refused_total", {"reason": "no-such-path"}) == 1


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8443", "127.0.0.1:1", "[::1]:8443", "[::1]"])
async def test_a_host_of_the_list_is_served(host: str) -> None:
    edge = Edge(allowed_hosts=frozenset({"localhost", "127.0.0.1", "[::1]"}))
    async with edge.client() as client:
        assert (await client.get("/things/a", headers={"host": host})).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.test", "localhost.evil.test", "localhost:x", "localhost@evil.test", ""]
)
async def test_another_host_is_refused(host: str) -> None:
    edge = Edge(allowed_hosts=frozenset({"localhost", "127.0.0.1", "[::1]"}))
    async with edge.client() as client:
        answer = await client.get("/things/a", headers={"host": host})
    check_problem(answer, 421, "wrong-host")


async def test_more_requests_than_the_process_may_serve_get_503() -> None:
    limiter = RequestLimiter(LimitSettings(concurrent_total=1))
    edge = Edge(limiter=limiter)
    async with edge.client() as client:
        first = asyncio.create_task(client.get("/slow"))
        await edge.reached.wait()
        refused = await client.get("/things/a")
        check_problem(refused, 503, "overloaded")
        assert refused.headers["retry-after"] == "1"
        edge.go.set()
        assert (await first).status_code == 200
        assert (await client.get("/things/a")).status_code == 200
    assert limiter.running == 0


async def test_a_request_cut_by_the_stop_is_answered_503() -> None:
    edge = Edge()
    async with edge.client() as client:
        serving = asyncio.create_task(client.get("/slow"))
        await edge.reached.wait()
        serving.cancel()
        answer = await serving
    check_problem(answer, 503, "overloaded")
