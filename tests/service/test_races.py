"""What changes between the decision and the record: two units in one commit, in the order they came."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from adapters.fake import Fault, Operation
from broker.core.errors import IdentityRefused, MintFailed, PolicyDenied
from broker.core.lease import Cause, LeaseState
from broker.service.kill import KillOrder
from inventory import ledger
from inventory.kills import KillScope
from tests.support.world import CHURN, World, opened

if TYPE_CHECKING:
    from pathlib import Path


async def warmed_up(world: World) -> None:
    """Reserve status indices and record first sight, so that a request decides without waiting."""
    await world.ask(await world.open_task(), "reports-api", "write")


async def test_two_requests_at_once_launder_no_history(world: World) -> None:
    await warmed_up(world)
    task = await world.open_task()
    read, write = await asyncio.gather(
        world.ask(task, "orders-db", "read"),
        world.ask(task, "partner-export", "write"),
        return_exceptions=True,
    )
    assert not isinstance(read, BaseException)
    assert isinstance(write, PolicyDenied)
    assert [lease.resource for lease in ledger.of_task(world.store.reader, task.id)] == ["orders-db"]


@pytest.mark.parametrize(
    ("scope", "value"), [(KillScope.RESOURCE, "reports-api"), (KillScope.IDENTITY, str(CHURN))]
)
async def test_a_kill_recorded_after_the_decision_releases_nothing(
    world: World, scope: KillScope, value: str
) -> None:
    await warmed_up(world)
    task = await world.open_task()
    order = KillOrder(scope=scope, value=value, reason="theft", actor="operator:uid=0")
    _, asked = await asyncio.gather(
        world.services.kill.kill(order), world.ask(task, "reports-api", "write"), return_exceptions=True
    )
    assert isinstance(asked, IdentityRefused)
    assert ledger.of_task(world.store.reader, task.id) == []


async def test_a_refused_second_step_is_revoked_because_the_first_left_a_handle(tmp_path: Path) -> None:
    async with opened(tmp_path, two_step=True) as world:
        world.server.inject(Operation.MINT, Fault.REFUSE)
        task = await world.open_task()
        with pytest.raises(MintFailed) as failed:
            await world.ask(task)
        assert failed.value.lease_id is not None
        await world.drain()
        lease = ledger.get(world.store.reader, failed.value.lease_id)
        assert lease is not None
        assert (lease.state, lease.cause) == (LeaseState.REVOKED, Cause.MINT_REFUSED)
        assert lease.handle is not None
