from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from adapters.fake import FakeLogin
from broker.api import schemas
from broker.api.listeners import Listener, UnixBind
from broker.api.metrics import SilentEdgeTelemetry
from broker.core.ids import LeaseId, backend_name
from tests.support.api import Api, credential_body
from tests.support.world import CHURN, CHURN_OWNER, REPORTS_API, SUPPORT

if TYPE_CHECKING:
    from pathlib import Path

    from broker.service.issue import Issued


def code_of(answer: httpx.Response) -> str:
    return str(schemas.Problem.model_validate_json(answer.content).type.rpartition(":")[2])


async def walk(client: httpx.AsyncClient, path: str) -> list[dict[str, Any]]:
    """Every item of a list, one page of one item at a time."""
    items: list[dict[str, Any]] = []
    mark = "&" if "?" in path else "?"
    cursor = ""
    for _ in range(100):
        page = (await client.get(f"{path}{mark}limit=1{cursor}")).json()
        assert len(page["items"]) <= 1
        items += page["items"]
        if page["next"] is None:
            return items
        cursor = f"&cursor={page['next']}"
    raise AssertionError("the pages do not end")


async def stuck_lease(api: Api) -> Issued:
    world = api.world
    task = await world.open_task()
    issued = await world.ask(task, ttl_seconds=3600)
    world.server.down = True
    await world.end(task)
    for _ in range(20):
        await world.drain()
        world.clock.advance(seconds=60)
    return issued


# --- the kill switch -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scope", "value"), [("identity", CHURN), ("owner", CHURN_OWNER), ("resource", "reports-api")]
)
async def test_a_kill_stops_its_scope_until_it_is_lifted(api: Api, scope: str, value: str) -> None:
    body = credential_body({"purpose": "churn-report"})
    async with api.client() as caller, api.operator() as operator:
        issued = (await caller.post("/credentials/request", json=body)).json()
        killed = await operator.post("/kill", json={scope: value, "reason": "suspected theft"})
        assert schemas.KillAnswer.model_validate_json(killed.content).scope == scope
        refused = await caller.post("/credentials/request", json=body)
        assert refused.status_code == 403
        lease = await caller.get(f"/credentials/{issued['lease_id']}")
        assert lease.json()["state"] == "revoked"
        listed = (await operator.get("/kills")).json()["items"]
        assert [(kill["scope"], kill["value"], kill["actor"]) for kill in listed] == [
            (scope, value, "operator:uid=0")
        ]
        lifted = await operator.post("/kill/lift", json={scope: value, "reason": "false alarm"})
        assert lifted.json() == {"scope": scope, "value": value}
        assert (await operator.get("/kills")).json()["items"] == []
        assert (await caller.post("/credentials/request", json=body)).status_code == 201
    assert [event["fields"]["what"] for event in api.audited("kill.ordered")] == ["ordered", "lifted"]


async def test_killing_a_task_ends_it_for_good(api: Api) -> None:
    task = await api.world.open_task()
    await api.world.ask(task, "reports-api", "write")
    async with api.operator() as operator:
        killed = await operator.post("/kill", json={"task": task.id, "reason": "went astray"})
        lift = await operator.post("/kill/lift", json={"task": task.id, "reason": "sorry"})
    assert (killed.json()["tasks_ended"], killed.json()["leases_moved"]) == (1, 1)
    assert (lift.status_code, code_of(lift)) == (422, "invalid-request")


async def test_killing_what_does_not_exist_says_so(api: Api) -> None:
    async with api.operator() as operator:
        for scope, value in (("owner", "nobody"), ("resource", "nothing"), ("identity", f"{CHURN}x")):
            answer = await operator.post("/kill", json={scope: value, "reason": "r"})
            assert (answer.status_code, code_of(answer)) == (422, "invalid-request")
        answer = await operator.post("/kill", json={"task": "tsk_aaaaaaaaaaaaaaaa", "reason": "r"})
        assert (answer.status_code, code_of(answer)) == (404, "not-found")
        answer = await operator.post("/kill/lift", json={"owner": "nobody", "reason": "r"})
        assert (answer.status_code, code_of(answer)) == (422, "invalid-request")


@pytest.mark.parametrize(
    "body", [{"reason": "r"}, {"owner": "a", "resource": "b", "reason": "r"}, {"owner": "a"}]
)
async def test_a_kill_names_exactly_one_scope_and_a_reason(api: Api, body: dict[str, str]) -> None:
    async with api.operator() as operator:
        for path in ("/kill", "/kill/lift"):
            assert (await operator.post(path, json=body)).status_code == 422


# --- leases ---------------------------------------------------------------------------------------


async def test_a_stuck_lease_shows_cause_next_try_and_last_error(api: Api) -> None:
    issued = await stuck_lease(api)
    async with api.operator() as operator:
        page = (await operator.get("/leases?stuck=true")).json()
    (lease,) = page["items"]
    assert schemas.OperatorLease.model_validate(lease).lease_id == issued.lease.id
    assert (lease["stuck"], lease["cause"], lease["identity"]) == (True, "task_end", CHURN)
    assert lease["attempts"] > 1
    assert lease["last_error"]
    assert lease["next_try_at"] > lease["first_failed_at"]


async def test_a_stuck_lease_is_retried_or_given_up(api: Api) -> None:
    issued = await stuck_lease(api)
    path = f"/leases/{issued.lease.id}"
    async with api.operator() as operator:
        retried = await operator.post(f"{path}/retry")
        assert retried.status_code == 200
        assert (await operator.post(f"{path}/abandon", json={})).status_code == 422
        given_up = await operator.post(f"{path}/abandon", json={"reason": "server scrapped"})
        assert given_up.json()["state"] == "abandoned"
        again = await operator.post(f"{path}/retry")
        assert (again.status_code, code_of(again)) == (422, "invalid-request")
    assert {event["actor"] for event in api.audited("lease.retry_ordered")} == {"operator:uid=0"}


async def test_leases_are_paged_and_filtered_by_state(api: Api) -> None:
    task = await api.world.open_task()
    issued = [await api.world.ask(task, "reports-api", "write") for _ in range(5)]
    async with api.client() as caller, api.operator() as operator:
        await caller.post(f"/credentials/{issued[0].lease.id}/revoke")
        active = await walk(operator, "/leases?state=active")
        everything = await walk(operator, "/leases")
    assert {lease["lease_id"] for lease in active} == {each.lease.id for each in issued[1:]}
    assert {lease["lease_id"] for lease in everything} == {each.lease.id for each in issued}
    assert len(everything) == 5


async def test_an_orphan_has_no_task(api: Api) -> None:
    name = backend_name(api.world.store.instance, LeaseId.new())
    now_ms = api.world.clock.now_ms()
    api.world.server.create(name, FakeLogin("p", "read", now_ms - 60_000, now_ms + 10**6))
    async with api.operator() as operator:
        scanned = await operator.post("/scan")
        (lease,) = (await operator.get("/leases")).json()["items"]
        (finding,) = (await operator.get("/findings")).json()["items"]
    assert schemas.ScanAnswer.model_validate_json(scanned.content).scanned[0].orphans == 1
    assert schemas.OperatorLease.model_validate(lease).task_id is None
    assert (lease["cause"], finding["check"]) == ("orphan", "orphan-credential")


async def test_a_scan_names_the_backends_it_could_not_reach(api: Api) -> None:
    api.world.server.down = True
    async with api.operator() as operator:
        answer = (await operator.post("/scan", json={})).json()
    assert answer["failed"] == ["orders-postgres"]
    assert answer["scanned"] == []


# --- identities -----------------------------------------------------------------------------------


async def seen(api: Api) -> None:
    for who in (CHURN, SUPPORT, REPORTS_API):
        async with api.client(who) as client:
            await client.get("/catalog")


async def test_identities_are_paged_in_order_and_found_by_prefix(api: Api) -> None:
    await seen(api)
    async with api.operator() as operator:
        everyone = await walk(operator, "/identities")
        found = (await operator.get("/identities", params={"q": "mara."})).json()["items"]
    assert [each["spiffe_id"] for each in everyone] == sorted([CHURN, SUPPORT, REPORTS_API])
    assert [each["spiffe_id"] for each in found] == [CHURN]


async def test_an_identity_is_shown_with_its_live_leases(api: Api) -> None:
    issued = await api.world.ask(await api.world.open_task(), "reports-api", "write")
    async with api.operator() as operator:
        answer = await operator.get("/identity", params={"spiffe_id": CHURN})
        unknown = await operator.get("/identity", params={"spiffe_id": f"{CHURN}x"})
    detail = schemas.IdentityDetail.model_validate_json(answer.content)
    assert (detail.owner, detail.orphan) == (CHURN_OWNER, False)
    assert [lease.lease_id for lease in detail.leases] == [issued.lease.id]
    assert unknown.status_code == 404


async def test_an_orphan_is_given_an_owner_and_may_ask_from_then_on(api: Api) -> None:
    stranger = "spiffe://dev.nhi.internal/agent/unheard-of"
    async with api.client(stranger) as caller, api.operator() as operator:
        assert (await caller.get("/catalog")).status_code == 403
        body = {"spiffe_id": stranger, "owner": "mara", "team": "analytics", "environment": "prod"}
        answer = await operator.post("/identity/owner", json=body)
        assert schemas.IdentityView.model_validate_json(answer.content).owner_source == "operator"
        assert (await caller.get("/catalog")).status_code == 200


async def test_a_suspended_identity_loses_what_it_has_until_it_is_resumed(api: Api) -> None:
    issued = await api.world.ask(await api.world.open_task(), "reports-api", "write")
    order = {"spiffe_id": CHURN, "reason": "theft"}
    async with api.client() as caller, api.operator() as operator:
        suspended = await operator.post("/identity/suspend", json=order)
        assert suspended.json()["lifecycle"] == "suspended"
        assert (await caller.get("/catalog")).status_code == 403
        leases = (await operator.get("/leases?state=revoked")).json()["items"]
        assert [lease["lease_id"] for lease in leases] == [issued.lease.id]
        assert (await operator.post("/identity/resume", json=order)).json()["lifecycle"] == "active"
        assert (await caller.get("/catalog")).status_code == 200
    changes = [event["fields"]["after"] for event in api.audited("identity.changed")]
    assert changes == [{"lifecycle": "suspended"}, {"lifecycle": "active"}]


# --- the broker itself ----------------------------------------------------------------------------


async def test_the_status_says_what_lives_what_is_stuck_and_what_is_not_ready(api: Api) -> None:
    await stuck_lease(api)
    await api.world.ask(await api.world.open_task(), "reports-api", "write")
    api.readiness.add("trust bundles", lambda: "none has arrived")
    async with api.operator() as operator:
        answer = await operator.get("/status")
    status = schemas.StatusView.model_validate_json(answer.content)
    assert (status.instance, status.live, status.stuck) == (api.world.store.instance, 2, 1)
    by_name = {backend.name: backend for backend in status.backends}
    assert (by_name["orders-postgres"].live, by_name["orders-postgres"].breaker) == (1, "open")
    assert (by_name["tokens"].live, by_name["tokens"].breaker) == (1, "closed")
    assert status.policy_hash == api.world.ctx.policy.policy_hash
    assert status.ledger.audit_seq == api.world.store.writer.head.seq
    assert status.readiness.problems == {"trust bundles": "none has arrived"}


async def test_findings_are_paged(api: Api) -> None:
    world = api.world
    now_ms = world.clock.now_ms()
    for _ in range(3):
        name = backend_name(world.store.instance, LeaseId.new())
        world.server.create(name, FakeLogin("p", "read", now_ms - 60_000, now_ms + 10**6))
    await world.services.reconcile.scan_all()
    async with api.operator() as operator:
        found = await walk(operator, "/findings")
    assert [each["check"] for each in found] == ["orphan-credential"] * 3
    assert len({each["subject"] for each in found}) == 3


async def test_kills_are_paged(api: Api) -> None:
    await seen(api)
    async with api.operator() as operator:
        for spiffe_id in (CHURN, SUPPORT):
            await operator.post("/kill", json={"identity": spiffe_id, "reason": "r"})
        await operator.post("/kill", json={"resource": "orders-db", "reason": "r"})
        kills = await walk(operator, "/kills")
    assert [(kill["scope"], kill["value"]) for kill in kills] == [
        ("identity", CHURN),
        ("identity", SUPPORT),
        ("resource", "orders-db"),
    ]


async def test_the_access_log_names_the_operator(api: Api) -> None:
    async with api.operator() as operator:
        await operator.get("/status")
    assert json.loads(api.access_lines.getvalue())["identity"] == "operator:uid=0"


async def test_over_a_real_socket_the_kernel_names_the_operator(api: Api, short_dir: Path) -> None:
    path = short_dir / "operator" / "op.sock"
    listener = Listener(
        "operator", api.boundaries["operator"], UnixBind(path), telemetry=SilentEdgeTelemetry()
    )
    await listener.start()
    try:
        transport = httpx.AsyncHTTPTransport(uds=str(path))
        async with httpx.AsyncClient(transport=transport, base_url="http://operator") as client:
            await client.get("/catalog")
            task = await api.world.open_task()
            answer = await client.post("/kill", json={"task": task.id, "reason": "drill"})
            exported = await client.get("/audit/export")
    finally:
        await listener.stop(1)
    assert answer.status_code == 200
    assert api.audited("task.ended")[0]["actor"] == f"operator:uid={os.getuid()}"
    assert exported.text.endswith('"type":"end"}\n')
