from __future__ import annotations

from typing import TYPE_CHECKING

from broker.api import schemas
from tests.support.api import credential_body

if TYPE_CHECKING:
    from tests.support.api import Api


async def test_health_says_only_that_the_process_lives(api: Api) -> None:
    api.readiness.add("ledger", lambda: "OperationalError")
    async with api.ops() as probe:
        answer = await probe.get("/healthz")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


async def test_readiness_names_each_thing_that_is_not_ready(api: Api) -> None:
    problem: str | None = "none has arrived"
    api.readiness.add("trust bundles", lambda: problem)
    api.readiness.add("ledger", lambda: None)
    async with api.ops() as probe:
        before = await probe.get("/readyz")
        problem = None
        after = await probe.get("/readyz")
        api.readiness.drain()
        stopping = await probe.get("/readyz")
    assert before.status_code == 503
    assert before.json() == {"ready": False, "problems": {"trust bundles": "none has arrived"}}
    assert (after.status_code, after.json()) == (200, {"ready": True, "problems": {}})
    assert stopping.status_code == 503
    assert schemas.ReadinessView.model_validate_json(stopping.content).problems.keys() == {"drain"}


async def test_metrics_count_what_was_answered_and_refused(api: Api) -> None:
    async with api.client() as caller, api.client(None) as nobody, api.ops() as probe:
        await caller.post("/credentials/request", json=credential_body({"purpose": "churn-report"}))
        await nobody.get("/catalog")
        answer = await probe.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'nhi_http_answers_total{listener="workload",status="201"} 1.0' in answer.text
    assert 'nhi_requests_refused_total{reason="unauthenticated"} 1.0' in answer.text
