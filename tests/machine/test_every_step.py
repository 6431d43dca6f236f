"""The broker dies, or the ledger refuses, at each single step: nothing stays alive that should not.

A step is a write to the ledger or a call to the backend; each has a moment before and one after.
Dying is never coming back from there: no handler runs, as with kill -9.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest

from adapters.fake import FakeLogin
from broker.core.clock import ManualClock
from broker.core.errors import BrokerError, LedgerUnavailable
from broker.core.ids import LeaseId, backend_name
from broker.core.lease import ENDING, NEVER_ACTIVE, TERMINAL, LeaseState
from broker.service.kill import KillOrder
from broker.service.tasks import TaskSpec
from inventory import ledger
from inventory.kills import KillScope
from tests.machine.harness import Broker, HonestServer, Released
from tests.support.world import CHURN, CHURN_OWNER, World, caller

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from adapters.fake import Fault, Operation
    from inventory.store.writer import Transaction

    Scenario = Callable[[World, list[Released]], Awaitable[None]]

STEPS_MAX = 80
OPERATOR = "operator:uid=0"


# --- what is interrupted -------------------------------------------------------------------------


async def keep(world: World, released: list[Released], *how: Any, key: str | None = None) -> Released:
    issued = await world.ask(*how, key=key)
    released.append(Released(issued, key))
    return released[-1]


async def a_whole_life(world: World, released: list[Released]) -> None:
    task = await world.open_task()
    await keep(world, released, task)
    await world.end(task)
    await world.drain()


async def an_inline_task(world: World, released: list[Released]) -> None:
    one = await keep(world, released, TaskSpec(purpose="churn-report"))
    await world.services.revoke.release(caller(CHURN), one.issued.lease.id)
    await world.drain()


async def a_token(world: World, released: list[Released]) -> None:
    task = await world.open_task()
    await keep(world, released, task, "reports-api", "read")
    await world.end(task)


async def a_repeat(world: World, released: list[Released]) -> None:
    task = await world.open_task()
    await keep(world, released, task, key="k")
    await keep(world, released, task, key="k")
    await world.drain()


async def a_kill(world: World, released: list[Released]) -> None:
    for _ in range(2):
        task = await world.open_task()
        await keep(world, released, task)
        await keep(world, released, task, "reports-api", "read")
    order = KillOrder(scope=KillScope.OWNER, value=CHURN_OWNER, reason="drill", actor=OPERATOR)
    await world.services.kill.kill(order)
    await world.drain()


async def a_suspension(world: World, released: list[Released]) -> None:
    task = await world.open_task()
    await keep(world, released, task)
    await keep(world, released, task, "reports-api", "read")
    await world.services.inventory.suspend(CHURN, reason="drill", actor=OPERATOR)
    await world.drain()


async def an_expiry(world: World, released: list[Released]) -> None:
    await keep(world, released, await world.open_task())
    world.clock.advance(seconds=3601)
    await world.drain()


async def an_orphan(world: World, released: list[Released]) -> None:
    now_ms = world.clock.now_ms()
    name = backend_name(world.store.instance, LeaseId.new())
    world.server.create(name, FakeLogin("p" * 24, "read", now_ms - 60_000, now_ms + 10**8))
    await world.services.reconcile.scan_all()
    await world.drain()


SCENARIOS: list[Scenario] = [
    a_whole_life,
    an_inline_task,
    a_token,
    a_repeat,
    a_kill,
    a_suspension,
    an_expiry,
    an_orphan,
]


# --- how it is interrupted -----------------------------------------------------------------------


class Steps:
    """Counts the moments of a scenario and stops the world at one of them."""

    def __init__(self, stop_at: int, stop: Callable[[], Awaitable[None]]) -> None:
        self.passed = 0
        self.over = False
        self.reached = asyncio.Event()
        self._stop_at = stop_at
        self._stop = stop

    async def moment(self) -> None:
        self.passed += 1
        if self.passed == self._stop_at and not self.over:
            self.reached.set()
            await self._stop()

    def watch_writes(self, world: World, *, after: bool = True) -> None:
        writer = world.store.writer
        run = writer.run

        async def stepped(unit: Callable[[Transaction], Any]) -> Any:
            await self.moment()
            result = await run(unit)
            if after:
                await self.moment()
            return result

        writer.run = stepped  # type: ignore[method-assign]  # this instance only

    def watch_calls(self, server: SteppedServer) -> None:
        server.steps = self


class SteppedServer(HonestServer):
    """A backend whose calls can stop before they took effect, and after."""

    steps: Steps | None = None

    async def run(self, operation: Operation, name: str, effect: Callable[[], None]) -> Fault | None:
        if self.steps is None:
            return await super().run(operation, name, effect)
        await self.steps.moment()
        fault = await super().run(operation, name, effect)
        await self.steps.moment()
        return fault


async def never() -> None:
    await asyncio.get_running_loop().create_future()


async def ledger_refuses() -> None:
    raise LedgerUnavailable("the disk is full", retry_after_seconds=5)


def new_broker(directory: Path, *, strong_fence: bool, two_step: bool) -> tuple[Broker, SteppedServer]:
    clock = ManualClock()
    server = SteppedServer(clock, strong_fence=strong_fence)
    return Broker(directory, clock, server, two_step=two_step), server


async def check_dead(broker: Broker, server: SteppedServer) -> None:
    """What holds once the broker had time: first nothing half done, then nothing at all."""
    await broker.pass_time(20 * 60)
    await broker.world.services.reconcile.scan_all()
    for _ in range(4):
        await broker.sweep()
        await broker.pass_time(20 * 60)
    rows = broker.rows().values()
    assert not [row for row in rows if row.state in {*ENDING, *NEVER_ACTIVE}]
    broker.check_backend()
    await broker.pass_time(24 * 3600)
    for _ in range(3):
        await broker.sweep()
        await broker.pass_time(20 * 60)
    assert all(row.state in TERMINAL for row in broker.rows().values())
    assert server.logins == {}
    assert not any(broker.works(one) for one in broker.released)
    broker.check_audit()
    broker.check_no_secret_at_rest()


def barred(world: World) -> bool:
    """Whether a kill or a suspension of the caller is on record."""
    (kills,) = world.store.reader.execute("SELECT count(*) FROM kills").fetchone()
    lifecycle = world.store.reader.execute(
        "SELECT lifecycle FROM identities WHERE spiffe_id = ?", (CHURN,)
    ).fetchone()
    return bool(kills) or lifecycle == ("suspended",)


async def dies_at(
    directory: Path, scenario: Scenario, stop_at: int, *, strong_fence: bool, two_step: bool
) -> bool:
    """Kill the broker at one moment and see what the next one makes of it; False past the last moment."""
    broker, server = new_broker(directory, strong_fence=strong_fence, two_step=two_step)
    steps = Steps(stop_at, never)
    steps.watch_writes(broker.world)
    steps.watch_calls(server)
    running = asyncio.create_task(scenario(broker.world, broker.released))
    reached = asyncio.create_task(steps.reached.wait())
    await asyncio.wait({running, reached}, return_when=asyncio.FIRST_COMPLETED)
    if running.done():
        reached.cancel()
        running.result()
    server.steps = None
    await broker.crash()
    try:
        # Everything that was released is known; what a kill or suspension covers is dead at once.
        for one in broker.released:
            row = ledger.get(broker.world.store.reader, one.issued.lease.id)
            assert row is not None
            assert row.was_active
        await broker.sweep()
        if barred(broker.world):
            assert not any(broker.works(one) for one in broker.released), "it outlived its kill"
            active = [row for row in broker.rows().values() if row.state is LeaseState.ACTIVE]
            assert active == []
        await check_dead(broker, server)
    finally:
        await broker.world.close()
    return steps.reached.is_set()


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
async def test_a_broker_that_dies_at_any_step_leaves_nothing_alive(
    tmp_path: Path, scenario: Scenario
) -> None:
    await dies_at_each(tmp_path, scenario, strong_fence=True, two_step=False)


@pytest.mark.parametrize("scenario", [a_whole_life, a_repeat], ids=lambda scenario: scenario.__name__)
async def test_nor_does_it_without_a_fence_and_in_two_steps(tmp_path: Path, scenario: Scenario) -> None:
    await dies_at_each(tmp_path, scenario, strong_fence=False, two_step=True)


async def dies_at_each(tmp_path: Path, scenario: Scenario, *, strong_fence: bool, two_step: bool) -> None:
    stop_at = 1
    while await dies_at(
        tmp_path / str(stop_at), scenario, stop_at, strong_fence=strong_fence, two_step=two_step
    ):
        stop_at += 1
        assert stop_at < STEPS_MAX
    assert stop_at > 4, "the scenario has no steps: nothing was tested"


async def refused_at(directory: Path, scenario: Scenario, stop_at: int) -> bool:
    """Let the ledger refuse one write and see what the same broker makes of it."""
    broker, server = new_broker(directory, strong_fence=True, two_step=True)
    steps = Steps(stop_at, ledger_refuses)
    steps.watch_writes(broker.world, after=False)
    try:
        with contextlib.suppress(BrokerError):
            await scenario(broker.world, broker.released)
        await broker.settle()
        steps.over = True
        await check_dead(broker, server)
    finally:
        await broker.world.close()
    return steps.reached.is_set()


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
async def test_a_ledger_that_refuses_any_write_leaves_nothing_alive(
    tmp_path: Path, scenario: Scenario
) -> None:
    stop_at = 1
    while await refused_at(tmp_path / str(stop_at), scenario, stop_at):
        stop_at += 1
        assert stop_at < STEPS_MAX
    assert stop_at > 2, "the scenario writes nothing: nothing was tested"
