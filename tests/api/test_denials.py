"""Who must not get in, tried on every route, method and listener there is.

Everything here is generated from the operations that the routers serve: a route added
tomorrow is tried tomorrow.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from starlette.routing import Router

from broker.api import schemas
from broker.api.operations import Operation, PathRoute
from broker.api.problems import TABLE, TYPE_PREFIX
from broker.api.protocol import UnixPeer
from broker.core.ids import LeaseId, TaskId
from tests.support.api import OPERATIONS, PARTNER, Api, credential_body
from tests.support.world import CHURN, STRANGER, SUPPORT

if TYPE_CHECKING:
    from collections.abc import Callable

    import httpx

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "BREW")
OPEN_TO_ANYBODY = {
    "readJwks",
    "readStatusList",
    "readServerMetadata",
    "readHealth",
    "readReadiness",
    "readMetrics",
}
"""The whole list of routes that ask for no proof. Whoever adds one adds it here, and says why there."""

PARAMETERS = {"lease": str(LeaseId.new()), "task": str(TaskId.new()), "number": "0"}
ALL = [(listener, operation) for listener, operations in OPERATIONS.items() for operation in operations]


def now_of(api: Api) -> datetime:
    return datetime.fromtimestamp(api.world.clock.now_ms() // 1000, UTC)


def paths_of(listener: str) -> dict[str, dict[str, Operation]]:
    found: dict[str, dict[str, Operation]] = {}
    for operation in OPERATIONS[listener]:
        found.setdefault(operation.path.format(**PARAMETERS), {})[operation.method] = operation
    return found


CODE_OF_STATUS = {404: "no-such-path", 405: "method-not-allowed"}


def outcome(answer: httpx.Response) -> tuple[int, str]:
    """Status and problem code; what is no problem document has no code."""
    if answer.headers.get("content-type") != "application/problem+json":
        return answer.status_code, ""
    if answer.request.method == "HEAD":  # whose answers have no body to read the code from
        return answer.status_code, CODE_OF_STATUS[answer.status_code]
    problem = schemas.Problem.model_validate_json(answer.content)
    return answer.status_code, problem.type.removeprefix(TYPE_PREFIX)


def documented(operation: Operation, answer: httpx.Response) -> bool:
    status, code = outcome(answer)
    if not code:
        return status in operation.answers
    return (status, code) in {(TABLE[kind].status, kind.code) for kind in operation.errors}


def without_trace(answer: httpx.Response) -> tuple[int, list[tuple[str, str]], bytes]:
    """The whole answer, byte for byte, but for the one thing that names the request."""
    trace_id = answer.headers["trace-id"]
    headers = [(name, value) for name, value in answer.headers.multi_items() if name != "trace-id"]
    return answer.status_code, headers, answer.content.replace(trace_id.encode(), b"-")


# --- the table itself ------------------------------------------------------------------------------


def test_only_the_listed_routes_answer_without_proof() -> None:
    assert {operation.id for _, operation in ALL if operation.security is None} == OPEN_TO_ANYBODY


def test_operation_ids_are_unique() -> None:
    assert len({operation.id for _, operation in ALL}) == len(ALL)


@pytest.mark.parametrize("listener", OPERATIONS)
async def test_a_listener_serves_exactly_its_operations(api: Api, listener: str) -> None:
    router = api.apps[listener]
    assert isinstance(router, Router)
    served = {
        (method, route.path)
        for route in router.routes
        if isinstance(route, PathRoute)
        for method in route.methods
    }
    assert served == {(operation.method, operation.path) for operation in OPERATIONS[listener]}
    assert all(isinstance(route, PathRoute) for route in router.routes)


# --- every route, every method ---------------------------------------------------------------------


async def wrong_outcomes(
    client: httpx.AsyncClient, listener: str, expected: Callable[[Operation], tuple[int, str] | None]
) -> dict[str, Any]:
    """Try every path with every method and return what was answered otherwise than it should be."""
    wrong: dict[str, Any] = {}
    for path, operations in paths_of(listener).items():
        for method in METHODS:
            answer = await client.request(method, path)
            operation = operations.get(method)
            if operation is None:
                allow = ", ".join(sorted(operations))
                right = outcome(answer) == (405, "method-not-allowed") and answer.headers["allow"] == allow
            else:
                wanted = expected(operation)
                right = documented(operation, answer) and (wanted is None or outcome(answer) == wanted)
            if not right:
                wrong[f"{method} {path}"] = outcome(answer)
    return wrong


def unless_open(status: int, code: str) -> Callable[[Operation], tuple[int, str] | None]:
    return lambda operation: None if operation.security is None else (status, code)


REFUSED_TOKENS: dict[str, tuple[Callable[[Api], str], str]] = {
    "expired": (lambda api: api.token(claims={"exp": api.world.clock.now_ms() // 1000 - 6}), "J-8"),
    "of an unknown trust domain": (
        lambda api: api.token("spiffe://stranger.example/agent/churn-report", issuer=api.stranger),
        "J-9",
    ),
    "of ours, signed by another trust domain": (lambda api: api.token(issuer=api.partner), "J-9"),
    "for another audience": (lambda api: api.token(aud="spiffe://dev.nhi.internal/tool/reports-api"), "J-7"),
    "for two audiences": (lambda api: api.token(aud=["nhi-broker", "other"]), "J-7"),
    "no token at all": (lambda _api: "not-a-token", "J-1"),
    "an unsigned one": (lambda api: api.token().rpartition(".")[0] + ".", "J-"),
}


@pytest.mark.parametrize("why", REFUSED_TOKENS)
async def test_a_token_that_our_rules_refuse_is_401_everywhere(api: Api, why: str) -> None:
    forge, rule = REFUSED_TOKENS[why]
    async with api.client(token=forge(api)) as client:
        assert await wrong_outcomes(client, "workload", unless_open(401, "unauthenticated")) == {}
    events = api.audited("authentication.refused")
    assert events, "nothing was audited"
    assert {event["fields"]["rule"][: len(rule)] for event in events} == {rule}


async def test_every_refused_proof_gets_the_same_bytes(api: Api) -> None:
    answers = []
    for forge, _ in REFUSED_TOKENS.values():
        async with api.client(token=forge(api)) as client:
            answers.append(without_trace(await client.get("/catalog")))
    async with api.client(None) as client:
        answers.append(without_trace(await client.get("/catalog")))
    assert all(answer == answers[0] for answer in answers)
    assert dict(answers[0][1])["www-authenticate"].startswith("Bearer")


async def test_no_proof_is_401_everywhere(api: Api) -> None:
    async with api.client(None) as client:
        assert await wrong_outcomes(client, "workload", unless_open(401, "unauthenticated")) == {}
    assert {event["fields"]["rule"] for event in api.audited("authentication.refused")} == {"A-1"}


async def test_another_scheme_than_bearer_is_401_everywhere(api: Api) -> None:
    async with api.client(None) as client:
        client.headers["authorization"] = "Basic c3BpZmZlOnNlY3JldA=="
        assert await wrong_outcomes(client, "workload", unless_open(401, "unauthenticated")) == {}


async def test_two_authorization_headers_are_400_everywhere(api: Api) -> None:
    async with api.client() as client:
        bearer = client.headers["authorization"]
        client.headers = [("authorization", bearer), ("authorization", bearer)]  # type: ignore[assignment]  # a list repeats
        expected = unless_open(400, "malformed-request")
        assert await wrong_outcomes(client, "workload", expected) == {}


async def test_a_token_and_a_certificate_of_two_identities_are_401_everywhere(api: Api) -> None:
    leaf = api.home.x509.leaf(path="/agent/support-bot", now=now_of(api))
    async with api.client(CHURN, chain=leaf.chain) as client:
        assert await wrong_outcomes(client, "workload", unless_open(401, "unauthenticated")) == {}
    assert {event["fields"]["rule"] for event in api.audited("authentication.refused")} == {"A-2"}


async def test_an_expired_certificate_is_401_everywhere_on_a_warm_connection_too(api: Api) -> None:
    leaf = api.home.x509.leaf(path="/agent/churn-report", now=now_of(api))
    async with api.client(None, chain=leaf.chain) as client:
        assert (await client.get("/catalog")).status_code == 200
        api.world.clock.advance(seconds=2 * 3600)
        assert await wrong_outcomes(client, "workload", unless_open(401, "unauthenticated")) == {}


async def test_a_withdrawn_trust_domain_is_401_everywhere_with_a_cached_token_too(api: Api) -> None:
    async with api.client() as client:
        assert (await client.get("/catalog")).status_code == 200
        api.bundles.remove("dev.nhi.internal")
        assert await wrong_outcomes(client, "workload", unless_open(401, "unauthenticated")) == {}


async def test_a_suspended_identity_is_403_everywhere(api: Api) -> None:
    async with api.client() as client:
        assert (await client.get("/catalog")).status_code == 200
        await api.world.services.inventory.suspend(CHURN, reason="theft", actor="operator:uid=0")
        assert await wrong_outcomes(client, "workload", unless_open(403, "identity-refused")) == {}


async def test_an_orphan_is_403_everywhere(api: Api) -> None:
    async with api.client(STRANGER) as client:
        assert await wrong_outcomes(client, "workload", unless_open(403, "identity-refused")) == {}


async def test_an_identity_of_another_trust_domain_has_no_standing_of_ours(api: Api) -> None:
    """Its path is one that our inventory knows: the trust domain is part of the name."""
    async with api.client(PARTNER) as client:
        assert await wrong_outcomes(client, "workload", unless_open(403, "identity-refused")) == {}


@pytest.mark.parametrize("peer", [None, UnixPeer(pid=1, uid=65_534, gid=0)], ids=["none", "nobody"])
async def test_the_operator_listener_is_for_operators_alone(api: Api, peer: UnixPeer | None) -> None:
    async with api.operator(peer) as client:
        client.headers["authorization"] = f"Bearer {api.token()}"
        assert await wrong_outcomes(client, "operator", unless_open(403, "identity-refused")) == {}


async def test_every_answer_to_the_allowed_is_documented_too(api: Api) -> None:
    async with api.client() as caller, api.operator() as operator, api.ops() as probe:
        for listener, client in (("workload", caller), ("operator", operator), ("ops", probe)):
            assert await wrong_outcomes(client, listener, lambda _operation: None) == {}


@pytest.mark.parametrize("listener", OPERATIONS)
async def test_a_path_on_the_wrong_listener_is_404(api: Api, listener: str) -> None:
    async with api.client() as caller, api.operator() as operator, api.ops() as probe:
        clients = {"workload": caller, "operator": operator, "ops": probe}
        for other in set(OPERATIONS) - {listener}:
            for path in paths_of(other):
                for method in METHODS:
                    answer = await clients[listener].request(method, path)
                    assert outcome(answer) == (404, "no-such-path"), (method, path)


def test_no_path_is_served_by_two_listeners() -> None:
    paths = [set(paths_of(listener)) for listener in OPERATIONS]
    assert sum(map(len, paths)) == len(set().union(*paths))


@pytest.mark.parametrize("spoiled", ["{}/", "/{}", "{}%0A", "{}%00", "{}%2F", "/x{}", "{}//", "{};a"])
async def test_a_path_that_is_almost_right_is_not_served(api: Api, spoiled: str) -> None:
    clients = {"workload": api.client(), "operator": api.operator(), "ops": api.ops()}
    for listener, client in clients.items():
        async with client:
            for path, operations in paths_of(listener).items():
                wrong = spoiled.format(path)
                answer = await client.request(next(iter(operations)), f"https://broker.test{wrong}")
                # 405: a name beside the exact path is an id of the pattern that stands there.
                assert outcome(answer) in {
                    (404, "no-such-path"),
                    (404, "not-found"),
                    (405, "method-not-allowed"),
                }, wrong


# --- another's objects ------------------------------------------------------------------------------


async def objects_of_churn(api: Api) -> dict[str, str]:
    async with api.client() as client:
        task = (await client.post("/tasks", json={"purpose": "churn-report"})).json()["task_id"]
        body = credential_body(task, "orders-db", "read")
        lease = (await client.post("/credentials/request", json=body)).json()["lease_id"]
    return {"task": task, "lease": lease, "number": "0"}


async def known_partner(api: Api) -> str:
    """A caller of another trust domain whom our inventory gives an owner."""
    async with api.client(PARTNER) as client:
        await client.get("/catalog")
    await api.world.services.inventory.set_owner(
        PARTNER, owner="partner-desk", team="analytics", environment="prod", actor="operator:uid=0"
    )
    return PARTNER


NOT_IDS = [
    "x",
    "..",
    "request",
    "lse_",
    "LSE_AAAAAAAAAAAAAAAA",
    "tsk_aaaaaaaaaaaaaaa1",
    "a" * 5000,
    "%0d%0aa",
]
WITH_AN_ID = [
    pytest.param(operation, id=operation.id)
    for operation in OPERATIONS["workload"]
    if set(operation.parameters) & {"lease", "task"}
]


@pytest.mark.parametrize("other", [SUPPORT, PARTNER], ids=["our domain", "another domain"])
@pytest.mark.parametrize("operation", WITH_AN_ID)
async def test_anothers_object_answers_byte_for_byte_as_an_unknown_one(
    api: Api, operation: Operation, other: str
) -> None:
    objects = await objects_of_churn(api)
    if other == PARTNER:
        await known_partner(api)
    async with api.client(other) as client:
        unknown = await client.request(operation.method, operation.path.format(**PARAMETERS))
        assert outcome(unknown) == (404, "not-found")
        anothers = await client.request(operation.method, operation.path.format(**objects))
        assert without_trace(anothers) == without_trace(unknown)
        for text in NOT_IDS:
            path = operation.path.format(lease=text, task=text)
            malformed = await client.request(operation.method, f"https://broker.test{path}")
            if outcome(malformed) in {(405, "method-not-allowed"), (404, "no-such-path")}:
                continue  # the dots or the word named another path
            assert without_trace(malformed) == without_trace(unknown), text
    async with api.client() as owner:
        assert (await owner.get(f"/credentials/{objects['lease']}")).json()["state"] == "active"
        assert (await owner.get(f"/tasks/{objects['task']}")).json()["state"] == "open"


@pytest.mark.parametrize("other", [SUPPORT, PARTNER], ids=["our domain", "another domain"])
async def test_a_credential_under_anothers_task_answers_as_under_an_unknown_one(api: Api, other: str) -> None:
    objects = await objects_of_churn(api)
    if other == PARTNER:
        await known_partner(api)
    async with api.client(other) as client:
        unknown = await client.post("/credentials/request", json=credential_body(PARAMETERS["task"]))
        anothers = await client.post("/credentials/request", json=credential_body(objects["task"]))
    assert outcome(unknown) == (404, "not-found")
    assert without_trace(anothers) == without_trace(unknown)


async def test_a_key_that_another_used_does_not_open_the_others_answer(api: Api) -> None:
    key = {"idempotency-key": "shared"}
    async with api.client() as churn, api.client(SUPPORT) as support:
        mine = await churn.post("/tasks", json={"purpose": "churn-report"}, headers=key)
        theirs = await support.post("/tasks", json={"purpose": "churn-report"}, headers=key)
    assert mine.status_code == 201
    assert outcome(theirs) == (403, "denied")
