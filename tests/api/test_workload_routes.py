from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from broker.api import schemas
from broker.api.limits import LimitSettings
from broker.core.status_list import SIZE
from tests.support.api import Api, api_opened, credential_body
from tests.support.world import CHURN, ISSUER, REPORTS_API, STRANGER, SUPPORT

if TYPE_CHECKING:
    from pathlib import Path

    import httpx

INLINE = {"purpose": "churn-report"}


async def open_task(client: httpx.AsyncClient, **more: Any) -> str:
    answer = await client.post("/tasks", json={"purpose": "churn-report", **more})
    assert answer.status_code == 201, answer.text
    return schemas.TaskView.model_validate_json(answer.content).task_id


async def issue(client: httpx.AsyncClient, task: object = INLINE, **how: str) -> httpx.Response:
    answer = await client.post("/credentials/request", json=credential_body(task, **how))
    assert answer.status_code == 201, answer.text
    return answer


def code_of(answer: httpx.Response) -> str:
    return str(schemas.Problem.model_validate_json(answer.content).type.rpartition(":")[2])


# --- credentials ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resource", "action", "kind"),
    [("reports-api", "write", "access_token"), ("orders-db", "read", "postgresql_login")],
)
async def test_a_credential_is_issued_used_and_given_back(
    api: Api, resource: str, action: str, kind: str
) -> None:
    async with api.client() as client:
        task = await open_task(client)
        answer = await issue(client, task, resource=resource, action=action)
        if kind == "access_token":
            issued = schemas.CredentialAnswer.model_validate_json(answer.content)
            assert issued.credential.kind == kind
        lease_id = answer.json()["lease_id"]
        seen = await client.get(f"/credentials/{lease_id}")
        assert schemas.LeaseView.model_validate_json(seen.content).state == "active"
        released = await client.post(f"/credentials/{lease_id}/revoke")
        await api.world.drain()
        proven = await client.post(f"/credentials/{lease_id}/revoke", json={"reason": "done"})
    assert released.status_code == (200 if kind == "access_token" else 202)
    assert proven.status_code == 200
    assert schemas.LeaseView.model_validate_json(proven.content).evidence


async def test_an_answer_with_a_secret_is_stored_by_nobody(api: Api) -> None:
    async with api.client() as client:
        answer = await issue(client)
    assert answer.headers["cache-control"] == "no-store"


async def test_the_decision_in_the_answer_finds_the_record(api: Api) -> None:
    async with api.client() as client:
        decision = (await issue(client)).json()["decision"]
    assert decision["policy_ids"] == ["analytics-publishes-reports"]
    assert decision["policy_hash"] == api.world.ctx.policy.policy_hash
    assert decision["id"] in {event["decision_id"] for event in api.audited("decision.made")}


async def test_an_inline_task_ends_with_its_only_lease(api: Api) -> None:
    async with api.client() as client:
        issued = (await issue(client)).json()
        await client.post(f"/credentials/{issued['lease_id']}/revoke")
        task = (await client.get(f"/tasks/{issued['task_id']}")).json()
    assert (task["state"], task["inline"], task["end_cause"]) == ("ended", True, "inline")


async def test_what_policy_denies_is_403_with_the_decision(api: Api) -> None:
    async with api.client(SUPPORT) as client:
        answer = await client.post(
            "/credentials/request", json=credential_body({"purpose": "support-ticket"}, "reports-api")
        )
    problem = schemas.Problem.model_validate_json(answer.content)
    assert (answer.status_code, code_of(answer)) == (403, "denied")
    assert problem.decision is not None
    assert problem.decision.id in {event["decision_id"] for event in api.audited("decision.made")}


async def test_what_needs_approval_is_403_naming_the_group_and_that_none_can_be_had(api: Api) -> None:
    async with api.client("spiffe://dev.nhi.internal/agent/reconciler") as client:
        answer = await client.post(
            "/credentials/request",
            json=credential_body({"purpose": "nightly-reconciliation"}, "payments-ledger", "write"),
        )
    assert (answer.status_code, code_of(answer)) == (403, "denied")
    assert "payments-leads" in answer.json()["detail"]
    assert "approvals are not available yet" in answer.json()["detail"]


# --- idempotency ---------------------------------------------------------------------------------


async def test_the_same_key_and_body_supersedes_the_first_credential(api: Api) -> None:
    async with api.client() as client:
        body = credential_body(await open_task(client))
        key = {"idempotency-key": "once"}
        first = await client.post("/credentials/request", json=body, headers=key)
        second = await client.post("/credentials/request", json=body, headers=key)
        before = (await client.get(f"/credentials/{first.json()['lease_id']}")).json()
    assert (first.status_code, second.status_code) == (201, 201)
    assert first.json()["lease_id"] != second.json()["lease_id"]
    assert (before["state"], before["cause"]) == ("revoked", "superseded")


async def test_the_same_key_after_the_lease_has_ended_answers_the_lease_and_no_secret(api: Api) -> None:
    async with api.client() as client:
        body = credential_body(await open_task(client))
        key = {"idempotency-key": "once"}
        first = (await client.post("/credentials/request", json=body, headers=key)).json()
        await client.post(f"/credentials/{first['lease_id']}/revoke")
        again = await client.post("/credentials/request", json=body, headers=key)
    assert again.status_code == 200
    assert schemas.LeaseView.model_validate_json(again.content).lease_id == first["lease_id"]
    assert first["credential"]["access_token"] not in again.text


async def test_the_same_key_with_another_body_is_refused(api: Api) -> None:
    async with api.client() as client:
        task = await open_task(client)
        key = {"idempotency-key": "once"}
        await client.post("/credentials/request", json=credential_body(task), headers=key)
        other = {**credential_body(task), "ttl_seconds": 60}
        answer = await client.post("/credentials/request", json=other, headers=key)
    assert (answer.status_code, code_of(answer)) == (409, "idempotency-mismatch")


async def test_a_key_of_another_identity_is_another_key(api: Api) -> None:
    key = {"idempotency-key": "once"}
    async with api.client() as churn, api.client(SUPPORT) as support:
        mine = await churn.post("/tasks", json={"purpose": "churn-report"}, headers=key)
        theirs = await support.post("/tasks", json={"purpose": "support-ticket"}, headers=key)
    assert (mine.status_code, theirs.status_code) == (201, 201)
    assert mine.json()["task_id"] != theirs.json()["task_id"]


async def test_opening_a_task_twice_with_one_key_opens_one(api: Api) -> None:
    key = {"idempotency-key": "once"}
    async with api.client() as client:
        first = await client.post("/tasks", json={"purpose": "churn-report"}, headers=key)
        second = await client.post("/tasks", json={"purpose": "churn-report"}, headers=key)
    assert first.json()["task_id"] == second.json()["task_id"]


# --- tasks ---------------------------------------------------------------------------------------


async def test_a_task_is_opened_with_all_its_bounds(api: Api) -> None:
    bounds = {
        "description": "churn by plan",
        "resources": ["reports-api"],
        "actions": ["write"],
        "classification_max": "internal",
        "budget_leases": 2,
        "deadline_seconds": 600,
    }
    async with api.client() as client:
        task_id = await open_task(client, **bounds)
        task = (await client.get(f"/tasks/{task_id}")).json()
    assert {name: task[name] for name in bounds if name != "deadline_seconds"} == {
        name: value for name, value in bounds.items() if name != "deadline_seconds"
    }
    assert task["deadline_at"] > task["opened_at"]


async def test_a_task_that_names_no_bounds_gets_those_its_purpose_allows(api: Api) -> None:
    async with api.client(SUPPORT) as client:
        answer = await client.post("/tasks", json={"purpose": "support-ticket"})
    ceiling = api.world.ctx.catalog.purposes["support-ticket"].budget_leases_max
    assert answer.json()["budget_leases"] == ceiling


async def test_ending_a_task_answers_202_until_every_lease_is_proven_dead(api: Api) -> None:
    async with api.client() as client:
        task = await open_task(client)
        await issue(client, task)
        await issue(client, task, resource="orders-db", action="read")
        ended = await client.post(f"/tasks/{task}/end", json={"reason": "report is out"})
        await api.world.drain()
        proven = await client.post(f"/tasks/{task}/end")
    assert (ended.status_code, proven.status_code) == (202, 200)
    leases = schemas.TaskEnded.model_validate_json(proven.content).leases
    assert [lease.state for lease in leases] == ["revoked", "revoked"]
    assert all(lease.evidence for lease in leases)


async def test_prefer_wait_holds_the_answer_back_until_the_proof(api: Api) -> None:
    api.world.services.sweeper.start()
    async with api.client() as client:
        task = await open_task(client)
        await issue(client, task, resource="orders-db", action="read")
        ended = await client.post(f"/tasks/{task}/end", headers={"prefer": "wait=30"})
    assert ended.status_code == 200
    assert [lease["state"] for lease in ended.json()["leases"]] == ["revoked"]


async def test_nothing_is_issued_under_an_ended_task(api: Api) -> None:
    async with api.client() as client:
        task = await open_task(client)
        await client.post(f"/tasks/{task}/end")
        answer = await client.post("/credentials/request", json=credential_body(task))
    assert (answer.status_code, code_of(answer)) == (409, "task-closed")
    assert answer.json()["task_id"] == task


# --- the catalog ---------------------------------------------------------------------------------


async def test_the_catalog_shows_only_what_policy_could_allow(api: Api) -> None:
    async with api.client() as churn, api.client(SUPPORT) as support:
        mine = (await churn.get("/catalog")).json()
        theirs = (await support.get("/catalog")).json()
    assert ("partner-export", "write") in {(item["resource"], item["action"]) for item in mine["items"]}
    assert ("partner-export", "write") not in {(item["resource"], item["action"]) for item in theirs["items"]}
    assert schemas.CatalogPage.model_validate(mine, strict=False).next is None


async def test_the_catalog_is_paged(api: Api) -> None:
    async with api.client() as client:
        whole = (await client.get("/catalog")).json()["items"]
        paged, cursor = [], ""
        for _ in whole:
            page = (await client.get(f"/catalog?limit=1{cursor}")).json()
            paged += page["items"]
            cursor = f"&cursor={page['next']}"
    assert paged == whole
    assert page["next"] is None


# --- what resource servers use ---------------------------------------------------------------------


async def test_introspection_tells_the_audience_and_the_holder_and_nobody_else(api: Api) -> None:
    async with api.client() as holder:
        token = (await issue(holder)).json()["credential"]["access_token"]
        mine = (await holder.post("/oauth2/introspect", data={"token": token})).json()
    async with api.client(REPORTS_API) as audience:
        theirs = (await audience.post("/oauth2/introspect", data={"token": token})).json()
        unknown = await audience.post("/oauth2/introspect", data={"token": "eyJunk"})
    async with api.client(SUPPORT) as nobody:
        foreign = await nobody.post("/oauth2/introspect", data={"token": token})
    assert mine == theirs
    assert schemas.Introspection.model_validate(theirs).sub == CHURN
    assert foreign.content == unknown.content == b'{"active":false}'


async def test_introspection_answers_inactive_from_the_commit_that_ended_the_task(api: Api) -> None:
    async with api.client() as client:
        task = await open_task(client)
        token = (await issue(client, task)).json()["credential"]["access_token"]
        await client.post(f"/tasks/{task}/end")
        answer = await client.post("/oauth2/introspect", data={"token": token})
    assert answer.content == b'{"active":false}'
    assert answer.headers["cache-control"] == "no-store"


async def test_keys_may_be_cached_for_as_long_as_rotation_counts_on(api: Api) -> None:
    async with api.client(None) as nobody:
        answer = await nobody.get("/oauth2/jwks")
    assert answer.headers["cache-control"] == f"public, max-age={api.world.keys.jwks_cache_seconds}"
    assert [key["kid"] for key in answer.json()["keys"]]
    assert not any("d" in key for key in answer.json()["keys"]), "a private key is published"


async def test_a_status_list_is_served_for_as_long_as_it_says(api: Api) -> None:
    async with api.client() as client:
        lease_id = (await issue(client)).json()["lease_id"]
    index = next(lease.status_index for lease in api.world.services.leases.page() if lease.id == lease_id)
    assert index is not None
    async with api.client(None) as nobody:
        answer = await nobody.get(f"/statuslists/{index // SIZE}")
        unknown = await nobody.get("/statuslists/999999")
        malformed = [await nobody.get(f"/statuslists/{n}") for n in ("00", "-1", "1e3", "9" * 400, "%D9%A1")]
    assert answer.headers["content-type"] == "application/statuslist+jwt"
    assert answer.headers["cache-control"] == "public, max-age=15"
    assert {each.status_code for each in [unknown, *malformed]} == {404}
    assert {each.json()["type"] for each in malformed} == {unknown.json()["type"]}


async def test_the_metadata_names_what_is_served(api: Api) -> None:
    async with api.client(None) as nobody:
        answer = await nobody.get("/.well-known/oauth-authorization-server")
    metadata = schemas.ServerMetadata.model_validate(answer.json(), strict=False)
    assert metadata.issuer == ISSUER
    assert metadata.jwks_uri == f"{ISSUER}/oauth2/jwks"
    assert answer.headers["cache-control"].startswith("public, max-age=")


# --- when things fail ------------------------------------------------------------------------------


async def test_a_backend_that_does_not_answer_is_503_naming_the_lease(api: Api) -> None:
    async with api.client() as client:
        task = await open_task(client)
        api.world.server.down = True
        answer = await client.post("/credentials/request", json=credential_body(task, "orders-db", "read"))
        assert (answer.status_code, code_of(answer)) == (503, "mint-failed")
        assert int(answer.headers["retry-after"]) > 0
        lease = await client.get(f"/credentials/{answer.json()['lease_id']}")
    assert lease.json()["state"] == "revoke_pending"


async def test_a_closed_ledger_is_503_and_nothing_is_minted(api: Api) -> None:
    async with api.client() as client:
        task = await open_task(client)
        await api.world.store.writer.close()
        answer = await client.post("/credentials/request", json=credential_body(task, "orders-db", "read"))
    assert (answer.status_code, code_of(answer)) == (503, "ledger-unavailable")
    assert api.world.server.logins == {}


async def test_an_orphan_gets_nothing_and_is_recorded(api: Api) -> None:
    async with api.client(STRANGER) as client:
        answer = await client.get("/catalog")
    assert (answer.status_code, code_of(answer)) == (403, "identity-refused")
    assert STRANGER in {event["identity"] for event in api.audited("identity.first_seen")}


async def test_one_identity_that_asks_too_much_is_429_and_others_are_served(tmp_path: Path) -> None:
    limits = LimitSettings(requests_per_second=0.001, burst=2)
    async with api_opened(tmp_path, limits=limits) as api, api.client() as noisy, api.client(SUPPORT) as calm:
        answers = [await noisy.get("/catalog") for _ in range(3)]
        assert [each.status_code for each in answers] == [200, 200, 429]
        assert int(answers[-1].headers["retry-after"]) > 0
        assert (await calm.get("/catalog")).status_code == 200


async def test_the_access_log_names_the_caller_and_holds_no_secret(api: Api) -> None:
    async with api.client() as client:
        issued = (await issue(client)).json()
        await client.post("/oauth2/introspect", data={"token": issued["credential"]["access_token"]})
    lines = api.access_lines.getvalue()
    assert lines.count(CHURN) == 2
    assert issued["credential"]["access_token"] not in lines
    assert "weekly report" not in lines
