"""Fixtures that start real parts. A part that cannot be had skips its tests and names the mend;
with NHI_REQUIRE_ALL=1 it fails them."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest
import pytest_asyncio

from broker.dev.orders_db import OrdersDatabase, seed_orders
from broker.dev.postgres_binaries import PostgresMissing
from broker.dev.postgres_home import NoServerAccount
from broker.dev.postgres_server import PostgresServer
from broker.dev.trust_domain import EmbeddedTrustDomain

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator


def part_missing(reason: str) -> NoReturn:
    """Skip the test, or fail it where every part is required."""
    if os.environ.get("NHI_REQUIRE_ALL") == "1":
        pytest.fail(f"a required part is missing: {reason}", pytrace=False)
    pytest.skip(reason)


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A private directory whose path is short enough for Unix sockets."""
    path = Path(tempfile.mkdtemp(prefix="nhi-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def postgres_server() -> AsyncIterator[PostgresServer]:
    """A running server, shared by the session: do not stop or pause it, start your own for that."""
    state_dir = Path(tempfile.mkdtemp(prefix="nhi-pg-", dir="/tmp"))
    server = PostgresServer(state_dir, durable=False)
    try:
        await server.start()
    except (PostgresMissing, NoServerAccount) as missing:
        shutil.rmtree(state_dir, ignore_errors=True)
        part_missing(str(missing))
    yield server
    await server.destroy()
    shutil.rmtree(state_dir, ignore_errors=True)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def orders_database(postgres_server: PostgresServer) -> OrdersDatabase:
    """The demo's databases `orders` and `nhi_fence`, groups and rows, on the shared server."""
    return await seed_orders(postgres_server)


@pytest_asyncio.fixture
async def trust_domain(short_dir: Path) -> AsyncIterator[EmbeddedTrustDomain]:
    """A running embedded trust domain of the test's own, with no identity registered yet."""
    async with EmbeddedTrustDomain(short_dir / "td") as domain:
        yield domain
