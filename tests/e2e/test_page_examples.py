"""The examples of the README and of the SDK's page, run as they stand by an agent of the dev environment."""

from __future__ import annotations

import ast
import asyncio
import os
import re
import sys
from typing import TYPE_CHECKING

import pytest

from broker.core.lease import LeaseState
from broker.dev.environment import DevEnvironment
from broker.dev.postgres_binaries import PostgresMissing
from broker.dev.postgres_home import NoServerAccount
from inventory import ledger
from tests.support.documents import blocks
from tests.support.parts import part_missing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

AGENT = "spiffe://dev.nhi.internal/agent/churn-report"
RUN_SECONDS = 60


@pytest.fixture
async def environment() -> AsyncIterator[DevEnvironment]:
    try:
        async with DevEnvironment() as environment:
            yield environment
    except (PostgresMissing, NoServerAccount) as missing:
        part_missing(str(missing))


def _first_block(page: str) -> str:
    return next(block.text for block in blocks(page) if block.language == "python")


async def _run(source: str, environment: DevEnvironment) -> str:
    """Run a page's lines as the agent would: a process of its own, with the variables of an agent."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("NHI_", "SPIFFE_"))
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-W", "error", "-c", source,
        env={**inherited, **environment.agent_environment(AGENT)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        out, errors = await asyncio.wait_for(process.communicate(), RUN_SECONDS)
    except TimeoutError:
        process.kill()
        await process.wait()
        raise
    assert process.returncode == 0, errors.decode()
    assert errors == b""
    return out.decode()


async def test_the_example_of_the_readme_reads_rows_and_leaves_nothing_alive(
    environment: DevEnvironment,
) -> None:
    out = await _run(_first_block("README.md") + "\nprint(rows)\n", environment)
    plans = dict(ast.literal_eval(out))
    assert set(plans) <= {"free", "team", "business"}
    assert sum(plans.values()) > 0
    await _all_proven_dead(environment, 1)


async def test_the_example_of_the_sdk_page_prints_the_proof(environment: DevEnvironment) -> None:
    out = await _run(_first_block("docs/sdk.md"), environment)
    assert re.fullmatch(r"lse_[a-z2-7]{16} revoked \{.*'role_exists': False.*\}\n", out)
    await _all_proven_dead(environment, 1)


async def _all_proven_dead(environment: DevEnvironment, leases: int) -> None:
    services = environment.broker.services
    assert services is not None
    await services.sweeper.drain()
    states = [lease.state for lease in ledger.page(services.ctx.store.reader, limit=100)]
    assert states == [LeaseState.REVOKED] * leases
