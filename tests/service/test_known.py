"""What is remembered of identities, grants and kills is never older than the last commit."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker.core.errors import IdentityRefused
from broker.core.facts import Grant, Lifecycle
from broker.core.registration import Registration
from broker.service.kill import KillOrder
from inventory import decisions, identities, kills
from inventory.kills import Kill, KillScope
from tests.support.world import CHURN, CHURN_OWNER, SUPPORT, World, caller, opened

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from inventory.store.writer import Transaction

    Unit = Callable[[Transaction], Any]

OPERATOR = "operator:uid=0"
GRANT = Grant("orders-db", "read")
TASK = "tsk_aaaaaaaaaaaaaaaa"


def lifecycle(target: Lifecycle) -> Unit:
    def unit(tx: Transaction) -> None:
        known = identities.get(tx, CHURN)
        assert known is not None
        identities.set_lifecycle(tx, known, target, at_ms=1, actor=OPERATOR, reason="drill")

    return unit


def owner(name: str) -> Unit:
    def unit(tx: Transaction) -> None:
        known = identities.get(tx, CHURN)
        assert known is not None
        identities.set_owner(
            tx, known, owner=name, team="analytics", environment=None, at_ms=1, actor=OPERATOR
        )

    return unit


def killed(scope: KillScope, value: str) -> Unit:
    return lambda tx: kills.mark(tx, Kill(scope, value, "drill", OPERATOR, 1))


def lifted(scope: KillScope, value: str) -> Unit:
    return lambda tx: kills.lift(tx, scope, value, reason="", actor=OPERATOR, at_ms=1)


def granted(scope: str, at_ms: int) -> Unit:
    return lambda tx: decisions.remember_grant(tx, (scope,), GRANT, at_ms=at_ms)


def registered(team: str) -> Unit:
    registration = Registration(spiffe_id=CHURN, owner="reg@example.com", team=team)
    return lambda tx: identities.register(tx, registration, at_ms=1)


def seen(tx: Transaction) -> None:
    identities.record_first_sight(tx, SUPPORT, None, at_ms=1)


CHANGES: dict[str, Unit] = {
    "suspend": lifecycle(Lifecycle.SUSPENDED),
    "resume": lifecycle(Lifecycle.ACTIVE),
    "own": owner("zo@example.com"),
    "own-back": owner(CHURN_OWNER),
    "kill-identity": killed(KillScope.IDENTITY, CHURN),
    "lift-identity": lifted(KillScope.IDENTITY, CHURN),
    "kill-owner": killed(KillScope.OWNER, CHURN_OWNER),
    "lift-owner": lifted(KillScope.OWNER, CHURN_OWNER),
    "kill-resource": killed(KillScope.RESOURCE, "orders-db"),
    "lift-resource": lifted(KillScope.RESOURCE, "orders-db"),
    "grant-task": granted(TASK, 1_000),
    "grant-task-later": granted(TASK, 200_000),
    "grant-identity": granted(CHURN, 1_000),
    "grant-identity-later": granted(CHURN, 200_000),
    "register": registered("analytics"),
    "register-elsewhere": registered("support"),
    "first-sight": seen,
}


def remembered(world: World) -> object:
    known = world.ctx.known
    of_churn = known.identity(CHURN)
    return (
        of_churn,
        known.identity(SUPPORT),
        known.history(task=TASK, identity=CHURN, since_ms=150_000),
        known.kill(identity=CHURN, owner="" if of_churn is None else of_churn.owner, resource="orders-db")
        is not None,
    )


def read(world: World) -> object:
    reader = world.store.reader
    of_churn = identities.facts(reader, CHURN)
    grants = decisions.grants_of(reader, TASK), decisions.grants_of(reader, CHURN)
    history = type(world.ctx.known.history(task=TASK, identity=CHURN, since_ms=0))(
        task=decisions.within(grants[0], 0), identity=decisions.within(grants[1], 150_000)
    )
    owner_now = "" if of_churn is None else of_churn.owner
    kill = kills.find(reader, identity=CHURN, owner=owner_now, resource="orders-db")
    return of_churn, identities.facts(reader, SUPPORT), history, kill is not None


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.lists(st.sampled_from(sorted(CHANGES)), min_size=1, max_size=3), max_size=8))
def test_memory_and_ledger_say_the_same_after_every_commit(
    tmp_path_factory: pytest.TempPathFactory, changes: list[list[str]]
) -> None:
    """Each inner list is committed as one group."""

    async def scenario() -> None:
        async with opened(tmp_path_factory.mktemp("known")) as world:
            await world.services.admission.admit(caller(CHURN))
            for together in changes:
                assert remembered(world) == read(world)
                await asyncio.gather(*(world.store.writer.run(CHANGES[name]) for name in together))
                assert remembered(world) == read(world)

    asyncio.run(scenario())


@pytest.mark.parametrize("name", sorted(CHANGES.keys() - {"own-back", "resume"}))
async def test_what_is_read_while_a_change_is_being_committed_is_not_kept(world: World, name: str) -> None:
    """The change has run, COMMIT has not: a reader still sees the old state, and must not keep it."""
    await world.services.admission.admit(caller(CHURN))
    before = remembered(world)
    entered, go_on = threading.Event(), threading.Event()
    writer = world.store.writer
    commit = writer._connection.commit

    def slow() -> None:
        entered.set()
        assert go_on.wait(10)
        commit()

    class Slow:
        """The writer's connection with a COMMIT that waits."""

        def __getattr__(self, attribute: str) -> Any:
            return slow if attribute == "commit" else getattr(connection, attribute)

    connection = writer._connection
    writer._connection = Slow()  # type: ignore[assignment]  # for one commit
    changing = asyncio.create_task(writer.run(CHANGES[name]))
    assert await asyncio.to_thread(entered.wait, 10)
    assert remembered(world) == before == read(world)
    go_on.set()
    await changing
    writer._connection = connection
    assert remembered(world) == read(world)


@pytest.mark.parametrize("name", ["suspend", "kill-identity", "kill-owner", "kill-resource"])
async def test_a_request_decided_on_what_a_commit_changes_gets_nothing(world: World, name: str) -> None:
    """The change and the request's own unit land in one group commit, the change first."""
    task = await world.open_task()
    await world.ask(task)
    asking = asyncio.create_task(world.ask(task))
    changing = asyncio.create_task(world.store.writer.run(CHANGES[name]))
    results = await asyncio.gather(changing, asking, return_exceptions=True)
    if not isinstance(results[1], BaseException):
        # It was recorded first: then it was issued before the change, and dies with it.
        order = KillOrder(scope=KillScope.IDENTITY, value=CHURN, reason="drill", actor=OPERATOR)
        await world.services.kill.kill(order)
        await world.drain()
        assert world.server.logins == {}
    with pytest.raises(IdentityRefused):
        await world.ask(task)


async def test_a_change_that_is_undone_leaves_nothing_in_memory(world: World) -> None:
    await world.services.admission.admit(caller(CHURN))

    def unit(tx: Transaction) -> None:
        CHANGES["suspend"](tx)
        remembered(world)
        raise RuntimeError("later in the same unit")

    with pytest.raises(RuntimeError):
        await world.store.writer.run(unit)
    assert remembered(world) == read(world)
    facts = world.ctx.known.identity(CHURN)
    assert facts is not None
    assert facts.lifecycle is Lifecycle.ACTIVE


async def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.service.known.REMEMBERED_MAX", 10)
    async with opened(tmp_path) as world:
        known = world.ctx.known
        for number in range(100):
            known.history(task=f"task {number}", identity=CHURN, since_ms=0)
        assert len(known._grants) <= 13
