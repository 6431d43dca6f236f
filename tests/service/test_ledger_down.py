from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from adapters.fake import Operation
from broker.core.errors import LedgerUnavailable

if TYPE_CHECKING:
    from broker.core.task import Task
    from tests.support.world import World


async def refused(world: World, task: Task) -> LedgerUnavailable:
    with pytest.raises(LedgerUnavailable) as down:
        await world.ask(task)
    assert down.value.retry_after_seconds is not None
    return down.value


def minted(world: World) -> int:
    return sum(operation is Operation.MINT for operation, _ in world.server.calls)


async def test_a_full_ledger_mints_nothing_and_says_503_and_recovers(world: World) -> None:
    task = await world.open_task()
    connection = world.store.writer._connection
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count={pages}")
    asking = (world.ask(task, "reports-api", "write") for _ in range(100))
    outcomes = await asyncio.gather(*asking, return_exceptions=True)
    assert any(isinstance(outcome, LedgerUnavailable) for outcome in outcomes)
    before = minted(world)
    await refused(world, task)
    assert minted(world) == before
    connection.execute("PRAGMA max_page_count=1000000")
    assert (await world.ask(task)).credential is not None


async def test_a_ledger_that_cannot_be_read_mints_nothing_and_says_503(world: World) -> None:
    task = await world.open_task()
    world.store.reader.close()
    await refused(world, task)
    assert minted(world) == 0
