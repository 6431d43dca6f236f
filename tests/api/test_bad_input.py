"""What malformed input gets on every route that reads a body or a query: a 4xx, and no echo of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from structlog.testing import capture_logs

from broker.api import schemas
from broker.api.operations import FORM, JSON, Operation
from broker.core.ids import LeaseId, TaskId
from tests.support.api import OPERATIONS, Api
from tests.support.world import CHURN

if TYPE_CHECKING:
    import httpx

CANARY = "k9fQ2xCanary"
LISTENERS = ("workload", "operator")
ALL = [operation for listener in LISTENERS for operation in OPERATIONS[listener]]
WITH_BODY = [operation for operation in ALL if operation.body is not None and not operation.form]
WITH_QUERY = [operation for operation in ALL if operation.query is not None]

VALID: dict[str, dict[str, Any]] = {
    "requestCredential": {
        "task": str(TaskId.new()),
        "resource": "reports-api",
        "action": "write",
        "intent": {"tool": "reports.publish", "reason": "weekly report"},
        "ttl_seconds": 60,
    },
    "revokeLease": {"reason": "done"},
    "openTask": {
        "purpose": "churn-report",
        "description": "churn by plan",
        "resources": ["reports-api"],
        "actions": ["write"],
        "classification_max": "internal",
        "budget_leases": 2,
        "deadline_seconds": 600,
    },
    "endTask": {"reason": "done"},
    "kill": {"identity": str(CHURN), "reason": "theft"},
    "liftKill": {"identity": str(CHURN), "reason": "found"},
    "retryLease": {},
    "abandonLease": {"reason": "server scrapped"},
    "setOwner": {"spiffe_id": str(CHURN), "owner": "mara", "team": "analytics", "environment": "prod"},
    "suspendIdentity": {"spiffe_id": str(CHURN), "reason": "theft"},
    "resumeIdentity": {"spiffe_id": str(CHURN), "reason": "found"},
    "scan": {},
    "proveAdapter": {"resource": "orders-db", "action": "read"},
}
"""A body for every operation that takes one, with each of its fields: what is spoiled below."""

WRONG_TYPES: list[Any] = [
    1,
    -1,
    1.5,
    10**15,
    True,
    [],
    [[CANARY]],
    {CANARY: CANARY},
    "",
    "a" * 4000 + CANARY,
    f"{CANARY}\n\u202e",
    f"\u2028{CANARY}",
    f"<script>{CANARY}</script>\x1b[2J",
]

SPOILED: dict[str, bytes] = {
    "nothing": b"",
    "not JSON": b"{" + CANARY.encode(),
    "a list": b"[]",
    "a string": json.dumps(CANARY).encode(),
    "null": b"null",
    "a number": b"1e5",
    "NUL": b'{"reason":"' + CANARY.encode() + b'\\u0000"}',
    "a raw NUL": b'{"reason":"\x00' + CANARY.encode() + b'"}',
    "a huge number": b'{"ttl_seconds":' + b"9" * 4000 + b"}",
    "a huge exponent": b'{"ttl_seconds":1e999999}',
    "not a number": b'{"ttl_seconds":NaN}',
    "nested deep": b"[" * 5000 + b"]" * 5000,
    "nested deep in an object": b'{"a":' * 5000 + b"1" + b"}" * 5000,
    "a repeated key": b'{"reason":"a","reason":"' + CANARY.encode() + b'"}',
    "not UTF-8": b'{"reason":"\xff\xfe' + CANARY.encode() + b'"}',
    "a lone surrogate": b'{"reason":"\\ud800' + CANARY.encode() + b'"}',
    "a byte order mark": b"\xef\xbb\xbf{}",
    "two values": b"{}{}",
    "one megabyte": b'{"reason":"' + b"a" * 1_000_000 + CANARY.encode() + b'"}',
    "an unknown field": b'{"' + CANARY.encode() + b'":1}',
    "a prototype": b'{"__proto__":{"' + CANARY.encode() + b'":1}}',
}


async def client_of(api: Api, operation: Operation) -> httpx.AsyncClient:
    return api.client() if operation in OPERATIONS["workload"] else api.operator()


async def path_of(api: Api, operation: Operation) -> str:
    """The path with objects of the caller's own, so that nothing but the body is wrong."""
    if not operation.parameters:
        return operation.path
    issued = await api.world.ask(await api.world.open_task(), "reports-api", "write")
    return operation.path.format(task=issued.lease.task_id, lease=issued.lease.id, number=0)


def check_refused(api: Api, answer: httpx.Response, what: str) -> None:
    assert 400 <= answer.status_code < 500, (what, answer.status_code)
    problem = schemas.Problem.model_validate_json(answer.content)
    assert problem.status == answer.status_code
    assert CANARY not in answer.text, f"{what}: the answer repeats what was sent"
    assert CANARY not in str(answer.headers), f"{what}: a header repeats what was sent"
    assert CANARY not in api.access_lines.getvalue(), f"{what}: the access log repeats what was sent"


def test_there_is_a_valid_body_for_every_operation_that_takes_one() -> None:
    assert set(VALID) == {operation.id for operation in WITH_BODY}
    for operation in WITH_BODY:
        assert operation.body is not None
        operation.body.model_validate_json(json.dumps(VALID[operation.id]))


@pytest.mark.parametrize("operation", WITH_BODY, ids=lambda operation: operation.id)
async def test_a_spoiled_body_is_refused_without_an_echo(api: Api, operation: Operation) -> None:
    path = await path_of(api, operation)
    with capture_logs() as logged:
        async with await client_of(api, operation) as client:
            for what, body in SPOILED.items():
                if not body and operation.body_optional:
                    continue
                answer = await client.post(path, content=body, headers={"content-type": JSON})
                check_refused(api, answer, what)
    assert CANARY not in str(logged)


def spoiled_fields(valid: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Bodies with one field of the wrong type, one unknown field, or one level of nesting too many."""
    found = [("unknown field", {**valid, CANARY: 1})]
    for name, value in valid.items():
        found += [(f"{name}={wrong!r:.40}", {**valid, name: wrong}) for wrong in WRONG_TYPES]
        if isinstance(value, dict):
            found += [(f"{name}.{what}", {**valid, name: inner}) for what, inner in spoiled_fields(value)]
        if isinstance(value, list):
            found += [(f"{name}[{wrong!r:.40}]", {**valid, name: [wrong]}) for wrong in WRONG_TYPES]
            found.append((f"{name} too long", {**valid, name: ["a"] * 100_0}))
    return found


@pytest.mark.parametrize("operation", WITH_BODY, ids=lambda operation: operation.id)
async def test_a_field_of_the_wrong_type_is_refused_without_an_echo(api: Api, operation: Operation) -> None:
    path = await path_of(api, operation)
    assert operation.body is not None
    with capture_logs() as logged:
        async with await client_of(api, operation) as client:
            for what, body in spoiled_fields(VALID[operation.id]):
                text = json.dumps(body)
                try:
                    operation.body.model_validate_json(text)
                except ValueError:
                    answer = await client.post(path, content=text, headers={"content-type": JSON})
                    check_refused(api, answer, what)
                    assert answer.status_code == 422, what
    assert CANARY not in str(logged)


@pytest.mark.parametrize("operation", WITH_BODY, ids=lambda operation: operation.id)
async def test_another_content_type_is_415(api: Api, operation: Operation) -> None:
    path = await path_of(api, operation)
    body = json.dumps(VALID[operation.id])
    async with await client_of(api, operation) as client:
        for content_type in (
            "text/plain",
            FORM,
            "application/json; charset=latin-1",
            "application/xml",
            "a/b, c/d",
        ):
            answer = await client.post(path, content=body, headers={"content-type": content_type})
            check_refused(api, answer, content_type)
            assert answer.status_code == 415, content_type


SPOILED_FORMS = (
    b"",
    b"token",
    b"token=",
    b"token=a&token=b",
    b"token=a%00b",
    b"token=%ff%fe",
    b"token=" + CANARY.encode() + b"%0d%0aSet-Cookie:x",
    b"token_type_hint=access_token",
    b"token=" + b"a" * 70_000,
    b"&".join(b"p%d=1" % n for n in range(64)),
    b'{"token":"' + CANARY.encode() + b'"}',
)


async def test_a_spoiled_form_is_refused_without_an_echo(api: Api) -> None:
    async with api.client() as client:
        for form in SPOILED_FORMS:
            answer = await client.post("/oauth2/introspect", content=form, headers={"content-type": FORM})
            check_refused(api, answer, repr(form[:40]))


async def test_introspection_takes_no_json(api: Api) -> None:
    async with api.client() as client:
        assert (await client.post("/oauth2/introspect", json={"token": "a"})).status_code == 415


SPOILED_QUERIES = (
    f"{CANARY}=1",
    f"limit={CANARY}",
    "limit=0",
    "limit=-1",
    "limit=01",
    "limit=9999999999999999999999",
    "limit=1&limit=2",
    f"cursor={CANARY}",
    f"cursor=%00{CANARY}",
    "cursor=WzEsMl0",
    "cursor=Wzk5OTk5OTk5OTk5OTk5OTk5OSwiYSJd",
    "cursor=W251bGxd",
    f"spiffe_id={CANARY}",
    f"q=%0a{CANARY}",
    f"state={CANARY}",
    "stuck=yes",
    f"lease={CANARY}",
    f"from={CANARY}",
    "from=2026-99-99T00:00:00.000Z",
    "&&&",
    "=",
    "a" * 5000,
)


@pytest.mark.parametrize("operation", WITH_QUERY, ids=lambda operation: operation.id)
async def test_a_spoiled_query_is_refused_without_an_echo(api: Api, operation: Operation) -> None:
    async with await client_of(api, operation) as client:
        for query in SPOILED_QUERIES:
            answer = await client.get(f"{operation.path}?{query}")
            check_refused(api, answer, query)
            assert answer.status_code == 422, query


@pytest.mark.parametrize("path", ["/tasks", "/credentials/request"])
async def test_a_spoiled_idempotency_key_is_refused_without_an_echo(api: Api, path: str) -> None:
    body = VALID["openTask" if path == "/tasks" else "requestCredential"]
    async with api.client() as client:
        for key in ("", " ", "a" * 129, "a b", f"{CANARY}\x7f", "{}", f"{CANARY}<>"):
            answer = await client.post(path, json=body, headers={"idempotency-key": key})
            check_refused(api, answer, key)
            assert answer.status_code == 422, key


async def test_an_id_that_is_not_one_is_not_repeated(api: Api) -> None:
    async with api.client() as client:
        for path in (f"/tasks/{CANARY}", f"/credentials/{LeaseId.prefix}{CANARY}", f"/{CANARY}"):
            check_refused(api, await client.get(path), path)
