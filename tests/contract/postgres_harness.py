"""The PostgreSQL backend as the conformance suite needs it: a real server behind a proxy."""

from __future__ import annotations

import contextlib
import secrets
from typing import TYPE_CHECKING

import asyncpg

from adapters.conformance import ExternalHarness, Trouble
from adapters.postgres import PostgresAdapter, PostgresConfig, install_scripts
from broker.core.ids import InstanceTag
from broker.core.secret import Secret
from tests.support.tcp_proxy import Mode, TcpProxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from broker.core.ports import Credential
    from broker.dev.orders_db import OrdersDatabase

MODES: Mapping[Trouble, Mode] = {
    Trouble.DOWN: Mode.DOWN,
    Trouble.SILENT: Mode.SILENT,
    Trouble.ANSWER_LOST: Mode.ANSWER_LOST,
}


class PostgresSession:
    """An open connection of a leased login."""

    def __init__(self, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        self.connection = connection

    async def is_alive(self) -> bool:
        try:
            return await self.connection.fetchval("SELECT 1") == 1
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
            return False


async def connect_with(credential: Credential) -> asyncpg.Connection[asyncpg.Record]:
    """Log in as the holder of a credential would."""
    return await asyncpg.connect(
        host=credential.public["host"],
        port=credential.public["port"],
        database=credential.public["database"],
        user=credential.public["username"],
        password=credential.secret["password"].reveal(),
        ssl=False,
    )


class PostgresHarness(ExternalHarness):
    def __init__(self, orders: OrdersDatabase, proxy: TcpProxy) -> None:
        self.orders = orders
        self.proxy = proxy
        self.instance = InstanceTag.new()
        self.login = f"nhi_broker_{self.instance}"
        self.password = Secret(secrets.token_urlsafe(16))
        self.recipe = {"database": orders.name, "group": orders.reader}
        self.bad_recipes = (
            {},
            {**self.recipe, "database": ""},
            {**self.recipe, "database": orders.fence},
            {**self.recipe, "group": 7},
            {**self.recipe, "group": "with\nnewline"},
            {**self.recipe, "connection_limit": 0},
            {**self.recipe, "connection_limit": "2"},
            {**self.recipe, "table": "orders"},
        )
        self.adapter = PostgresAdapter(self.config())
        self.opened: list[asyncpg.Connection[asyncpg.Record]] = []

    def config(self, instance: InstanceTag | None = None, **changes: object) -> PostgresConfig:
        tag = instance or self.instance
        settings = {
            "name": "orders-pg",
            "instance": tag,
            "host": self.proxy.host,
            "port": self.proxy.port,
            "sslmode": "disable",
            "fence_database": self.orders.fence,
            "broker_user": f"nhi_broker_{tag}",
            "broker_password": self.password,
            "connect_timeout_seconds": 1,
            "statement_timeout_seconds": 2,
            "lock_timeout_seconds": 0.5,
        }
        return PostgresConfig.model_validate({**settings, **changes})

    async def install(self, config: PostgresConfig) -> None:
        """Do what an administrator does."""
        for database, script in install_scripts(config, [self.recipe], set_password=True).items():
            admin = await self.orders.server.connect(database)
            try:
                await admin.execute(script)
            finally:
                await admin.close()

    async def prepare_neighbour(self) -> None:
        self.neighbour_tag = InstanceTag.new()
        await self.install(self.config(self.neighbour_tag))

    def neighbour(self) -> tuple[InstanceTag, PostgresAdapter]:
        return self.neighbour_tag, PostgresAdapter(self.config(self.neighbour_tag))

    def powerless(self) -> PostgresAdapter:
        # The login of one instance, configured for another: nothing of it is allowed.
        return PostgresAdapter(self.config(InstanceTag.new(), broker_user=self.login))

    @contextlib.asynccontextmanager
    async def trouble(self, kind: Trouble) -> AsyncIterator[None]:
        async with self.proxy.misbehaving(MODES[kind]):
            yield

    async def open_session(self, credential: Credential) -> PostgresSession:
        connection = await connect_with(credential)
        self.opened.append(connection)
        return PostgresSession(connection)


@contextlib.asynccontextmanager
async def postgres_harness(orders: OrdersDatabase) -> AsyncIterator[PostgresHarness]:
    """A fresh instance on the shared server; every role it made is dropped afterwards."""
    async with TcpProxy(orders.server.host, orders.server.port).running() as proxy:
        harness = PostgresHarness(orders, proxy)
        await harness.install(harness.config())
        await harness.prepare_neighbour()
        try:
            yield harness
        finally:
            for connection in harness.opened:
                connection.terminate()
            await harness.adapter.close()
            await sweep(harness)


async def sweep(harness: PostgresHarness) -> None:
    """Leave no role of this test behind on the shared server."""
    admin = await harness.orders.server.connect(harness.orders.name)
    try:
        for tag in (harness.instance, harness.neighbour_tag):
            names = await admin.fetch(
                "SELECT rolname FROM pg_roles WHERE rolname LIKE $1", f"nhi\\_{tag}\\_%"
            )
            for (name,) in names:
                await admin.execute(f'DROP OWNED BY "{name}"; DROP ROLE "{name}"')
    finally:
        await admin.close()
