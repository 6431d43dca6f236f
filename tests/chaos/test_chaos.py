from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from broker.dev.chaos import Chaos, run_chaos
from broker.dev.environment import DevEnvironment
from broker.dev.postgres_binaries import PostgresMissing
from nhi_sdk import AsyncBroker
from tests.support.parts import part_missing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

AGENT = "spiffe://dev.nhi.internal/agent/churn-report"
SHORT_KILLS = 5


@pytest.fixture
async def environment() -> AsyncIterator[DevEnvironment]:
    try:
        async with DevEnvironment() as started:
            yield started
    except PostgresMissing as missing:
        part_missing(str(missing))


@pytest.mark.parametrize(("resource", "action"), [("orders-db", "read"), ("reports-api", "write")])
async def test_the_check_by_use_tells_a_living_credential_from_a_dead_one(
    environment: DevEnvironment, resource: str, action: str
) -> None:
    chaos = Chaos(environment, kills=0, seed=1, tell=lambda _line: None)
    async with AsyncBroker.from_env(environment.agent_environment(AGENT)) as broker:
        task = await broker.open_task("churn-report")
        held = await task.request(resource, action, tool="chaos", reason="control")
        assert await chaos.works(held)
        ended = await task.end(wait=10)
        assert ended.proven
        assert not await chaos.works(held)
    await chaos.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_broker_killed_under_load_loses_nothing_and_nothing_outlives_its_end() -> None:
    report = await run_chaos(kills=SHORT_KILLS, seed=7, tell=lambda _line: None)
    assert report.kills == SHORT_KILLS
    assert report.clean, report.details
