from __future__ import annotations

from typing import TYPE_CHECKING

import pytest_asyncio

from adapters.conformance import ExternalAdapterConformance
from tests.contract.postgres_harness import PostgresHarness, postgres_harness

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from broker.dev.orders_db import OrdersDatabase


class TestPostgres(ExternalAdapterConformance):
    @pytest_asyncio.fixture
    async def harness(self, orders_database: OrdersDatabase) -> AsyncIterator[PostgresHarness]:
        async with postgres_harness(orders_database) as harness:
            yield harness
