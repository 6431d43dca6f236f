from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

import pytest

from nhi_sdk import (
    AsyncBroker,
    Broker,
    BudgetExhausted,
    Conflict,
    Denied,
    FieldError,
    InvalidRequest,
    NotFound,
    ProblemError,
    RateLimited,
    RetryPolicy,
    TaskClosed,
    TransportError,
    Unauthenticated,
    Unavailable,
)
from nhi_sdk._calls import read_task
from nhi_sdk._exchange import Failure, Pause, Send, exchange
from nhi_sdk._wire import Answer
from tests.unit.sdk.contract_server import ContractServer, Kind, problem

if TYPE_CHECKING:
    from collections.abc import Callable

INTENT = {"tool": "sql.query", "reason": "churn by plan"}
PASSING = Failure(TransportError("gone"), passing=True)


def keys(server: ContractServer) -> list[str]:
    return [one.headers["idempotency-key"] for one in server.calls("POST", "/request")]


@pytest.mark.parametrize("kind", [Kind.DROP_BEFORE, Kind.DROP_AFTER, Kind.HALF_ANSWER])
def test_a_connection_lost_before_the_answer_leaves_one_live_credential(
    broker: Broker, server: ContractServer, kind: Kind
) -> None:
    task = broker.open_task("t")
    server.fault(kind, route="/request")
    cred = task.request("orders-db", "read", **INTENT)
    assert server.alive() == [cred.lease_id]
    assert len(keys(server)) == 2
    assert len(set(keys(server))) == 1


@pytest.mark.parametrize("kind", [Kind.DROP_BEFORE, Kind.DROP_AFTER, Kind.HALF_ANSWER])
async def test_async_a_connection_lost_before_the_answer_leaves_one_live_credential(
    async_broker: AsyncBroker, server: ContractServer, kind: Kind
) -> None:
    task = await async_broker.open_task("t")
    server.fault(kind, route="/request")
    cred = await task.request("orders-db", "read", **INTENT)
    assert server.alive() == [cred.lease_id]
    assert len(set(keys(server))) == 1


def test_two_requests_never_share_an_idempotency_key(broker: Broker, server: ContractServer) -> None:
    task = broker.open_task("t")
    task.request("orders-db", "read", **INTENT)
    task.request("orders-db", "read", **INTENT)
    task.request("orders-db", "read", idempotency_key="mine-1", **INTENT)
    assert len(set(keys(server))) == 3
    assert keys(server)[2] == "mine-1"


@pytest.mark.parametrize("kind", [Kind.DROP_BEFORE, Kind.DROP_AFTER])
def test_an_end_whose_answer_was_lost_is_repeated(broker: Broker, server: ContractServer, kind: Kind) -> None:
    server.fault(kind, route="/end")
    with broker.task("t") as task, task.credential("orders-db", "read", **INTENT):
        pass
    assert server.open_tasks() == []
    assert len(server.calls("POST", "/end")) == 2


def test_503_with_retry_after_is_tried_again_no_sooner_than_it_says(
    broker: Broker, server: ContractServer, pauses: list[float]
) -> None:
    server.refuse(503, "backend-unavailable", "Try later.", times=2, headers={"retry-after": "2"})
    broker.open_task("t")
    assert len(pauses) == 2
    assert all(pause >= 2 for pause in pauses)


def test_409_still_minting_is_waited_for(broker: Broker, server: ContractServer, pauses: list[float]) -> None:
    server.refuse(
        409, "still-minting", "First request still running.", route="/request", headers={"retry-after": "1"}
    )
    assert broker.request("orders-db", "read", purpose="t", **INTENT).state == "active"
    assert len(pauses) == 1


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (400, "malformed-json", InvalidRequest),
        (401, "unauthenticated", Unauthenticated),
        (403, "denied", Denied),
        (403, "identity-refused", Denied),
        (404, "not-found", NotFound),
        (405, "method-not-allowed", InvalidRequest),
        (408, "body-too-slow", InvalidRequest),
        (409, "task-closed", TaskClosed),
        (409, "budget-exhausted", BudgetExhausted),
        (409, "idempotency-mismatch", Conflict),
        (413, "body-too-large", InvalidRequest),
        (421, "wrong-host", InvalidRequest),
        (422, "invalid-input", InvalidRequest),
        (429, "rate-limited", RateLimited),
        (500, "internal", ProblemError),
    ],
)
def test_every_other_refusal_is_final_and_typed(
    broker: Broker,
    server: ContractServer,
    pauses: list[float],
    status: int,
    code: str,
    error: type[ProblemError],
) -> None:
    server.refuse(status, code, "Because of this; do that.", headers={"retry-after": "1"}, lease_id="lse_x")
    with pytest.raises(error) as caught:
        broker.open_task("t")
    assert type(caught.value) is error
    assert str(caught.value) == "Because of this; do that."
    assert (caught.value.code, caught.value.status, caught.value.lease_id) == (code, status, "lse_x")
    assert caught.value.trace_id is not None
    assert pauses == []
    assert len(server.seen) == 1


def test_503_without_retry_after_is_final(broker: Broker, server: ContractServer) -> None:
    server.refuse(503, "ledger-unavailable", "Down.")
    with pytest.raises(Unavailable) as caught:
        broker.open_task("t")
    assert caught.value.retry_after_seconds is None
    assert len(server.seen) == 1


def test_a_503_that_stays_is_given_up_after_a_bounded_number_of_attempts(
    broker: Broker, server: ContractServer
) -> None:
    server.refuse(503, "ledger-unavailable", "Down.", times=100, headers={"retry-after": "1"})
    with pytest.raises(Unavailable) as caught:
        broker.open_task("t")
    assert caught.value.retry_after_seconds == 1
    assert len(server.seen) == RetryPolicy().attempts_max


def test_a_retry_after_beyond_the_deadline_is_not_waited_for(
    broker: Broker, server: ContractServer, pauses: list[float]
) -> None:
    server.refuse(503, "ledger-unavailable", "Down.", times=100, headers={"retry-after": "31"})
    with pytest.raises(Unavailable):
        broker.open_task("t")
    assert pauses == []


def test_a_denial_tells_why_and_by_which_policies(broker: Broker) -> None:
    with pytest.raises(Denied) as caught, broker.task("t") as task:
        task.request("payroll-db", "read", **INTENT)
    assert caught.value.reason == "payroll-db belongs to another team."
    assert caught.value.policy_ids == ("team-owns-resource",)
    assert caught.value.decision_id == "dec_aaaaaaaaaaaaaaaa"


def test_refused_fields_are_named(broker: Broker, server: ContractServer) -> None:
    errors = [{"field": "intent.tool", "message": "must be a word"}]
    server.refuse(422, "invalid-input", "One field is wrong.", errors=errors)
    with pytest.raises(InvalidRequest) as caught:
        broker.open_task("t")
    assert caught.value.errors == (FieldError("intent.tool", "must be a word"),)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[1]",
        b"null",
        b'{"type": 7, "detail": [], "errors": {"a": 1}, "decision": "x"}',
        b"\xff\xfe",
    ],
)
def test_a_refusal_that_is_no_problem_document_is_still_typed(
    broker: Broker, server: ContractServer, body: bytes
) -> None:
    server.fault(Kind.ANSWER, status=503, body=body)
    with pytest.raises(Unavailable, match="503"):
        broker.open_task("t")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>hunter2</html>",
        b"[]",
        b'{"task_id": "hunter2"}',
        b'{"task_id": 7, "state": "hunter2"}',
        b"\xff",
    ],
)
def test_an_answer_that_makes_no_sense_is_a_transport_error_that_shows_none_of_it(
    broker: Broker, server: ContractServer, body: bytes
) -> None:
    server.fault(Kind.ANSWER, status=200, body=body)
    with pytest.raises(TransportError) as caught:
        broker.read_task("tsk_x")
    assert caught.value.ambiguous
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_redirect_is_not_followed(broker: Broker, server: ContractServer) -> None:
    server.fault(Kind.ANSWER, status=307, headers={"location": server.url + "/catalog"})
    with pytest.raises(TransportError, match="redirect"):
        broker.read_task("tsk_x")
    assert len(server.seen) == 1


def test_an_endless_answer_is_cut_off(
    broker: Broker, server: ContractServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nhi_sdk._http.ANSWER_BYTES_MAX", 1000)
    server.fault(Kind.ANSWER, status=200, body=b"x" * 1001)
    with pytest.raises(TransportError, match="too large"):
        broker.read_task("tsk_x")


@pytest.fixture
def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def test_nothing_listening_is_tried_again_and_then_said(
    options: dict[str, Any], pauses: list[float], closed_port: int
) -> None:
    with Broker(f"https://127.0.0.1:{closed_port}", **options) as client:
        client._sleep = pauses.append
        with pytest.raises(TransportError, match="cannot connect") as caught:
            client.open_task("t")
    assert not caught.value.ambiguous
    assert len(pauses) == RetryPolicy().attempts_max - 1


async def test_async_nothing_listening_is_tried_again_and_then_said(
    options: dict[str, Any], pauses: list[float], closed_port: int
) -> None:
    async def pause(seconds: float) -> None:
        pauses.append(seconds)

    async with AsyncBroker(f"https://127.0.0.1:{closed_port}", **options) as client:
        client._sleep = pause
        with pytest.raises(TransportError, match="cannot connect"):
            await client.open_task("t")
    assert len(pauses) == RetryPolicy().attempts_max - 1


@pytest.mark.parametrize("client_of", [Broker, AsyncBroker])
async def test_an_answer_that_does_not_come_is_not_waited_for_for_ever(
    server: ContractServer, options: dict[str, Any], client_of: type[Any]
) -> None:
    server.fault(Kind.HOLD, times=100)
    options["retry"] = RetryPolicy(attempts_max=2, attempt_seconds=0.05, pause_seconds_base=0.001)
    client = client_of(server.url, **options)
    with pytest.raises(TransportError, match="in time") as caught:
        await client.open_task("t") if client_of is AsyncBroker else client.open_task("t")
    assert caught.value.ambiguous
    assert len(server.seen) == 2
    await client.aclose() if client_of is AsyncBroker else client.close()


# --- the core, without input or output ---------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.at = 0.0

    def __call__(self) -> float:
        return self.at


def drive(
    answers: list[Answer | Failure], policy: RetryPolicy, clock: Clock, *, took: float = 0.0
) -> list[float]:
    """Run one exchange; return its pauses; the clock moves by them and by `took` per attempt."""
    steps = exchange(read_task("tsk_x"), policy, clock)
    step, pauses, left = next(steps), [], list(answers)
    try:
        while True:
            if isinstance(step, Pause):
                pauses.append(step.seconds)
                clock.at += step.seconds
                step = steps.send(None)
            else:
                clock.at += took
                step = steps.send(left.pop(0))
    except (ProblemError, TransportError):
        return pauses


def test_pauses_are_jittered_below_a_growing_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[float, float]] = []

    def draw(low: float, high: float) -> float:
        drawn.append((low, high))
        return high

    monkeypatch.setattr("random.uniform", draw)
    policy = RetryPolicy(attempts_max=6, pause_seconds_base=1.0, pause_seconds_max=5.0, deadline_seconds=1000)
    assert drive([PASSING] * 6, policy, Clock()) == [1.0, 2.0, 4.0, 5.0, 5.0]
    assert {low for low, _ in drawn} == {0.0}


def test_all_attempts_together_keep_the_deadline() -> None:
    policy = RetryPolicy(attempts_max=1000, attempt_seconds=4, deadline_seconds=10, pause_seconds_base=0.001)
    clock = Clock()
    pauses = drive([PASSING] * 1000, policy, clock, took=4)
    assert len(pauses) == 2
    assert clock.at < 10 + 4


def test_an_attempt_gets_no_more_time_than_is_left() -> None:
    clock = Clock()
    steps = exchange(read_task("tsk_x"), RetryPolicy(attempt_seconds=10, deadline_seconds=12), clock)
    assert next(steps) == Send(10)
    clock.at = 9
    assert isinstance(steps.send(PASSING), Pause)
    clock.at = 9.5
    assert steps.send(None) == Send(2.5)


def test_a_failure_that_will_not_pass_is_final() -> None:
    assert drive([Failure(TransportError("no"), passing=False)], RetryPolicy(), Clock()) == []


@pytest.mark.parametrize("header", ["", "-1", "soon", "1.5", "²", "Fri, 20 Nov 2026 12:00:00 GMT"])
def test_a_retry_after_that_is_no_number_of_seconds_counts_as_absent(header: str) -> None:
    status, headers, body = problem(503, "ledger-unavailable", "Down.")
    assert drive([Answer(status, {**headers, "retry-after": header}, body)], RetryPolicy(), Clock()) == []


def test_an_answer_does_not_show_its_body() -> None:
    assert "hunter2" not in repr(Answer(200, {}, b"hunter2"))


@pytest.fixture(autouse=True)
def _nothing_leaks(leaks: Callable[[str], list[str]], caplog: pytest.LogCaptureFixture) -> Any:
    yield
    assert not leaks(caplog.text)
