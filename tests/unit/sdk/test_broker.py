from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from typing import TYPE_CHECKING, Any

import pytest

from nhi_sdk import (
    AsyncBroker,
    Broker,
    Denied,
    NhiError,
    OtherSecret,
    PostgresLogin,
    TaskClosed,
    Unavailable,
)
from nhi_sdk._cleanup import shielded
from tests.unit.sdk.contract_server import ContractServer, Kind, catalog_item

if TYPE_CHECKING:
    from collections.abc import Callable

    from nhi_sdk import Credential

INTENT = {"tool": "sql.query", "reason": "churn by plan"}
UNAVAILABLE = {"status": 503, "headers": {"retry-after": "1"}}


class Boom(Exception):
    pass


def test_a_task_and_its_credential_are_dead_when_the_block_is_left(
    broker: Broker, server: ContractServer
) -> None:
    with (
        broker.task("churn-report", wait=5) as task,
        task.credential("orders-db", "read", **INTENT) as cred,
    ):
        assert server.alive() == [cred.lease_id]
        assert isinstance(cred.secret, PostgresLogin)
        assert cred.decision.policy_ids == ("team-reads",)
        assert cred.expires_at.tzinfo is not None
    assert server.alive() == []
    assert server.open_tasks() == []
    assert task.end_result is not None
    assert task.end_result.proven
    assert task.end_result.leases[0].evidence == server.evidence


def test_the_request_says_what_the_contract_asks_for(broker: Broker, server: ContractServer) -> None:
    with broker.task("churn-report", resources=["orders-db"], budget_leases=2, deadline_seconds=60) as task:
        task.request("orders-db", "read", ttl_seconds=120, **INTENT)
    opened, asked = server.calls("POST", "/tasks")[0], server.calls("POST", "/request")[0]
    assert opened.body == {
        "purpose": "churn-report",
        "resources": ["orders-db"],
        "budget_leases": 2,
        "deadline_seconds": 60,
    }
    assert asked.body == {
        "task": task.task_id,
        "resource": "orders-db",
        "action": "read",
        "intent": INTENT,
        "ttl_seconds": 120,
    }
    assert opened.headers["idempotency-key"] != asked.headers["idempotency-key"]


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_any_exception_kills_the_credential_and_arrives_unchanged(
    broker: Broker, server: ContractServer, error: type[BaseException]
) -> None:
    with (
        pytest.raises(error) as caught,
        broker.task("churn-report") as task,
        task.credential("orders-db", "read", **INTENT),
    ):
        raise error("mine")
    assert caught.value.args == ("mine",)
    assert server.alive() == []
    assert server.open_tasks() == []
    assert server.calls("POST", "/end")[0].body == {"reason": f"block left by {error.__name__}"}


def test_a_failure_to_clean_up_never_masks_the_first_error(
    broker: Broker, server: ContractServer, caplog: pytest.LogCaptureFixture
) -> None:
    def work() -> None:
        with broker.task("churn-report") as task, task.credential("orders-db", "read", **INTENT):
            server.refuse(500, "internal", "no", times=100)
            raise Boom

    with pytest.raises(Boom) as caught:
        work()
    assert [note.partition(" could")[0] for note in caught.value.__notes__] == [
        f"nhi_sdk: {next(iter(server.leases))}",
        f"nhi_sdk: task {next(iter(server.tasks))}",
    ]
    assert {record.levelno for record in caplog.records if record.name == "nhi_sdk"} == {logging.WARNING}


def test_without_another_error_a_failed_end_is_raised(broker: Broker, server: ContractServer) -> None:
    with pytest.raises(Unavailable), broker.task("churn-report"):
        server.refuse(503, "ledger-unavailable", "The ledger is down.", route="/end")


def test_closing_the_client_ends_what_an_interrupted_end_left(broker: Broker, server: ContractServer) -> None:
    with pytest.raises(Unavailable), broker.task("churn-report"):
        server.refuse(503, "ledger-unavailable", "The ledger is down.", route="/end")
    assert server.open_tasks()
    broker.close()
    assert server.open_tasks() == []


def test_an_interrupt_during_the_final_end_still_ends_the_task(
    broker: Broker, server: ContractServer
) -> None:
    server.fault(Kind.DROP_BEFORE, route="/end")

    def interrupted(_seconds: float) -> None:
        raise KeyboardInterrupt

    broker._sleep = interrupted
    with pytest.raises(KeyboardInterrupt), broker.task("churn-report"):
        pass
    assert server.open_tasks() == []


def test_a_second_end_and_a_second_revoke_are_harmless(broker: Broker, server: ContractServer) -> None:
    with broker.task("churn-report") as task, task.credential("orders-db", "read", **INTENT) as cred:
        assert broker.revoke(cred.lease_id).proven_dead
        assert broker.revoke(cred.lease_id, wait=3).proven_dead
        assert task.end().proven
        assert task.end(wait=2).proven
    assert server.alive() == []
    waits = [one.headers.get("prefer") for one in server.seen if "prefer" in one.headers]
    assert waits == ["wait=3", "wait=2"]


def test_an_end_that_is_not_proven_yet_says_so(broker: Broker, server: ContractServer) -> None:
    server.settle = False
    task = broker.open_task("churn-report")
    cred = task.request("orders-db", "read", **INTENT)
    ended = task.end(wait=500)
    assert not ended.proven
    assert [one.lease_id for one in ended.unproven] == [cred.lease_id]
    assert server.calls("POST", "/end")[0].headers["prefer"] == "wait=30"


@pytest.mark.parametrize("state", ["expired", "handed_out", "abandoned"])
def test_an_end_without_proof_is_never_called_proven(
    broker: Broker, server: ContractServer, state: str
) -> None:
    task = broker.open_task("churn-report")
    cred = task.request("orders-db", "read", **INTENT)
    server.leases[cred.lease_id]["state"] = state
    ended = task.end()
    assert ended.settled
    assert not ended.proven
    assert ended.leases[0].ended


def test_explicit_calls_read_back_what_was_done(broker: Broker) -> None:
    task = broker.open_task("churn-report", description="weekly")
    cred = broker.request("orders-db", "read", task=task.task_id, **INTENT)
    assert broker.read_task(task.task_id).leases_issued == 1
    assert task.refresh().leases_issued == 1
    assert broker.read_lease(cred.lease_id).state == "active"
    task.end()
    assert broker.read_task(task.task_id).ended
    with pytest.raises(TaskClosed):
        task.request("orders-db", "read", **INTENT)


def test_one_credential_without_a_task_ends_with_its_block(broker: Broker, server: ContractServer) -> None:
    with broker.credential("orders-db", "read", purpose="churn-report", **INTENT):
        assert server.calls("POST", "/request")[0].body["task"] == {"purpose": "churn-report"}
        assert len(server.open_tasks()) == 1
    assert server.open_tasks() == []


@pytest.mark.parametrize("given", [{}, {"task": "tsk_x", "purpose": "p"}])
def test_a_request_needs_either_a_task_or_a_purpose(broker: Broker, given: dict[str, str]) -> None:
    with pytest.raises(TypeError, match="either"):
        broker.request("orders-db", "read", **given, **INTENT)


@pytest.mark.parametrize("stray", ["", "..", ".", "../catalog", "a/b", "a?b", "a#b", "a\nb"])
def test_an_id_cannot_reach_another_route(broker: Broker, server: ContractServer, stray: str) -> None:
    with pytest.raises((NhiError, ValueError)):
        broker.read_task(stray)
    for seen in server.seen:
        assert seen.path.count("/") == 2


def test_the_catalog_is_read_to_its_end(broker: Broker, server: ContractServer) -> None:
    server.catalog = [catalog_item("orders-db", "read"), catalog_item("orders-db", "write", title=None)]
    items = broker.catalog()
    assert [(one.resource, one.action) for one in items] == [("orders-db", "read"), ("orders-db", "write")]
    assert items[0].ttl_seconds_max == 900


def test_fields_and_credentials_of_a_newer_broker_are_no_error(
    broker: Broker, leaks: Callable[[str], list[str]]
) -> None:
    cred = broker.request("warehouse-cloud", "read", purpose="p", **INTENT)
    assert isinstance(cred.secret, OtherSecret)
    assert cred.secret.kind == "cloud_session"
    assert not leaks(repr(cred))
    with pytest.raises(TypeError, match="cloud_session"):
        cred.env()


def test_no_repr_or_error_shows_a_secret(
    broker: Broker, leaks: Callable[[str], list[str]], token: str
) -> None:
    login = broker.request("orders-db", "read", purpose="p", **INTENT)
    bearer = broker.request("tool-api", "call", purpose="p", **INTENT)
    shown = repr(
        [login, login.secret, bearer, bearer.secret, bearer.httpx_auth(), broker, broker._session.prepare()]
    )
    for wrong in (login.httpx_auth, bearer.conninfo):
        with pytest.raises(TypeError) as caught:
            wrong()
        shown += str(caught.value)
    assert not leaks(shown)
    assert token not in shown


def test_a_tool_function_gets_its_credential_and_loses_it(broker: Broker, server: ContractServer) -> None:
    @broker.tool(
        "sql.query",
        resource="orders-db",
        action="read",
        purpose="churn-report",
        reason=lambda plan: f"churn of {plan}",
    )
    def churn(plan: str, credential: Credential) -> tuple[str, str]:
        """Count."""
        assert server.alive() == [credential.lease_id]
        return plan, credential.lease_id

    plan, lease_id = churn("gold")
    assert plan == "gold"
    assert server.leases[lease_id]["state"] == "revoked"
    assert server.open_tasks() == []
    assert server.calls("POST", "/request")[0].body["intent"] == {
        "tool": "sql.query",
        "reason": "churn of gold",
    }
    assert list(inspect.signature(churn).parameters) == ["plan"]
    assert churn.__doc__ == "Count."


def test_a_tool_function_issues_under_the_task_it_is_called_in(
    broker: Broker, server: ContractServer
) -> None:
    @broker.tool("sql.query", resource="orders-db", action="read", purpose="churn-report", inject="cred")
    def churn(*, cred: Credential) -> str:
        return cred.task_id

    with broker.task("weekly") as task:
        assert churn() == task.task_id
        assert server.alive() == []
    assert churn() != task.task_id


def test_a_tool_function_that_raises_leaves_nothing_alive(broker: Broker, server: ContractServer) -> None:
    @broker.tool("sql.query", resource="orders-db", action="read", purpose="churn-report")
    def churn(credential: Credential) -> None:
        raise Boom(credential.lease_id)

    with pytest.raises(Boom):
        churn()
    assert server.alive() == []


async def test_a_tool_decorator_refuses_what_it_cannot_serve(
    broker: Broker, async_broker: AsyncBroker
) -> None:
    spec = {"resource": "orders-db", "action": "read", "purpose": "p"}

    def no_slot() -> None: ...
    async def coroutine(credential: Credential) -> None: ...

    with pytest.raises(TypeError, match="no parameter 'credential'"):
        broker.tool("x", **spec)(no_slot)
    with pytest.raises(TypeError, match=r"AsyncBroker\.tool"):
        broker.tool("x", **spec)(coroutine)
    with pytest.raises(TypeError, match=r"Broker\.tool"):
        async_broker.tool("x", **spec)(no_slot)


def test_many_threads_share_one_client(broker: Broker, server: ContractServer) -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with broker.task("t") as task, task.credential("orders-db", "read", **INTENT):
                pass
        except BaseException as error:  # noqa: BLE001  reported by the assertion below
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(server.leases) == 8
    assert server.alive() == []


# --- asyncio -----------------------------------------------------------------------------------


async def test_async_a_task_and_its_credential_are_dead_when_the_block_is_left(
    async_broker: AsyncBroker, server: ContractServer
) -> None:
    async with (
        async_broker.task("churn-report", wait=5) as task,
        task.credential("orders-db", "read", **INTENT) as cred,
    ):
        assert server.alive() == [cred.lease_id]
        assert (await task.refresh()).leases_issued == 1
        assert (await async_broker.read_lease(cred.lease_id)).state == "active"
    assert server.alive() == []
    assert server.open_tasks() == []
    assert task.end_result is not None
    assert task.end_result.proven
    assert len(await async_broker.catalog()) == 1


async def test_async_an_exception_arrives_unchanged_with_notes(
    async_broker: AsyncBroker, server: ContractServer
) -> None:
    async def work() -> None:
        async with async_broker.task("t") as task, task.credential("orders-db", "read", **INTENT):
            server.refuse(500, "internal", "no", times=100)
            raise Boom

    with pytest.raises(Boom) as caught:
        await work()
    assert [note.partition(" could")[0] for note in caught.value.__notes__] == [
        f"nhi_sdk: {next(iter(server.leases))}",
        f"nhi_sdk: task {next(iter(server.tasks))}",
    ]


async def test_async_cancellation_in_the_block_kills_the_credential(
    async_broker: AsyncBroker, server: ContractServer
) -> None:
    inside = asyncio.Event()

    async def work() -> None:
        async with async_broker.task("t") as task, task.credential("orders-db", "read", **INTENT):
            inside.set()
            await asyncio.Event().wait()

    running = asyncio.create_task(work())
    await inside.wait()
    assert server.alive()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert server.alive() == []
    assert server.open_tasks() == []


async def test_async_a_second_cancellation_does_not_stop_the_clean_up(
    async_broker: AsyncBroker, server: ContractServer
) -> None:
    inside, pausing, go_on = asyncio.Event(), asyncio.Event(), asyncio.Event()
    server.fault(Kind.DROP_BEFORE, route="/revoke")

    async def pause(_seconds: float) -> None:
        pausing.set()
        await go_on.wait()

    async def work() -> None:
        async with async_broker.credential("orders-db", "read", purpose="p", **INTENT):
            inside.set()
            await asyncio.Event().wait()

    async_broker._sleep = pause
    running = asyncio.create_task(work())
    await inside.wait()
    running.cancel()
    await pausing.wait()
    running.cancel()
    running.cancel()
    await asyncio.sleep(0)
    assert not running.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert server.alive() == []


async def test_async_closing_the_client_ends_what_a_failed_end_left(
    async_broker: AsyncBroker, server: ContractServer
) -> None:
    async def work() -> None:
        async with async_broker.task("t"):
            server.refuse(503, "ledger-unavailable", "The ledger is down.", route="/end")

    with pytest.raises(Unavailable):
        await work()
    assert server.open_tasks()
    await async_broker.aclose()
    assert server.open_tasks() == []


async def test_async_a_clean_up_that_does_not_finish_is_given_up() -> None:
    stopped = asyncio.Event()

    async def endless() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    with pytest.raises(TimeoutError, match=r"0\.01 seconds"):
        await shielded(endless(), 0.01)
    await stopped.wait()


async def test_async_cancellation_while_the_credential_is_being_minted_kills_it(
    async_broker: AsyncBroker, server: ContractServer
) -> None:
    minting = server.fault(Kind.HOLD, route="/request")

    async def work() -> None:
        async with async_broker.credential("orders-db", "read", purpose="p", **INTENT):
            raise AssertionError("never reached")

    running = asyncio.create_task(work())
    await asyncio.to_thread(minting.held.wait, 10)
    assert server.alive()
    running.cancel()
    await asyncio.sleep(0)
    minting.release.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert server.alive() == []


async def test_async_cancellation_while_the_task_is_being_opened_ends_it(
    async_broker: AsyncBroker, server: ContractServer
) -> None:
    opening = server.fault(Kind.HOLD, route="/tasks")

    async def work() -> None:
        async with async_broker.task("t"):
            raise AssertionError("never reached")

    running = asyncio.create_task(work())
    await asyncio.to_thread(opening.held.wait, 10)
    running.cancel()
    await asyncio.sleep(0)
    opening.release.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert server.tasks
    assert server.open_tasks() == []


async def test_async_the_clean_up_is_bounded(server: ContractServer, options: dict[str, Any]) -> None:
    async def work(client: AsyncBroker) -> None:
        async with client.task("t"):
            raise Boom

    async with AsyncBroker(server.url, **options, cleanup_seconds=0.05) as client:
        server.fault(Kind.HOLD, route="/end", times=10)
        with pytest.raises(Boom) as caught:
            await work(client)
    assert "could not be ended" in caught.value.__notes__[0]


async def test_async_tool_function_gets_its_credential_and_loses_it(
    async_broker: AsyncBroker, server: ContractServer
) -> None:
    @async_broker.tool("sql.query", resource="orders-db", action="read", purpose="churn-report")
    async def churn(credential: Credential) -> str:
        assert server.alive() == [credential.lease_id]
        return credential.task_id

    task_id = await churn()
    assert server.alive() == []
    async with async_broker.task("weekly") as task:
        assert await churn() == task.task_id != task_id
    with pytest.raises(Denied):
        async with async_broker.credential("payroll-db", "read", purpose="p", **INTENT):
            pass
