"""The demo's target database."""

from __future__ import annotations

import asyncpg
import pytest

from broker.dev.orders_db import CUSTOMER_COUNT, ORDER_COUNT, OrdersDatabase, seed_orders


async def _login(orders: OrdersDatabase, group: str | None, database: str) -> asyncpg.Connection:
    admin = await orders.server.connect()
    login = f"test_{group or 'nobody'}"
    try:
        await admin.execute(f"DROP ROLE IF EXISTS {login}")
        await admin.execute(f"CREATE ROLE {login} LOGIN PASSWORD 'p' {f'IN ROLE {group}' if group else ''}")
    finally:
        await admin.close()
    return await asyncpg.connect(
        host=orders.server.host,
        port=orders.server.port,
        user=login,
        password="p",
        database=database,
        ssl=False,
    )


async def test_a_reader_reads_the_seeded_rows_and_writes_nothing(orders_database: OrdersDatabase) -> None:
    session = await _login(orders_database, orders_database.reader, orders_database.name)
    try:
        assert await session.fetchval("SELECT count(*) FROM customers") == CUSTOMER_COUNT
        assert await session.fetchval("SELECT count(*) FROM orders") == ORDER_COUNT
        unpaid = await session.fetchval("SELECT count(*) FROM orders WHERE status = 'open'")
        assert await session.fetchval("SELECT count(*) FROM payments") == ORDER_COUNT - unpaid
        for statement in (
            "UPDATE orders SET status = 'paid'",
            "CREATE TABLE mine ()",
            "CREATE TEMP TABLE t ()",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await session.execute(statement)
    finally:
        await session.close()


async def test_a_writer_changes_orders_but_deletes_nothing_and_leaves_customers_alone(
    orders_database: OrdersDatabase,
) -> None:
    session = await _login(orders_database, orders_database.writer, orders_database.name)
    try:
        changes = session.transaction()
        await changes.start()
        await session.execute("UPDATE orders SET total_cents = total_cents + 1 WHERE id = 1")
        await session.execute(
            "INSERT INTO orders (customer_id, placed_at, status, total_cents) VALUES (1, now(), 'open', 5)"
        )
        await changes.rollback()
        for statement in ("DELETE FROM orders", "UPDATE customers SET plan = 'free'"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await session.execute(statement)
    finally:
        await session.close()


@pytest.mark.parametrize("database", ["orders", "nhi_fence", "postgres", "template1"])
async def test_a_login_outside_the_groups_connects_nowhere(
    orders_database: OrdersDatabase, database: str
) -> None:
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await _login(orders_database, None, database)


async def test_a_reader_cannot_reach_the_fences(orders_database: OrdersDatabase) -> None:
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await _login(orders_database, orders_database.reader, orders_database.fence)


async def test_seeding_again_changes_nothing(orders_database: OrdersDatabase) -> None:
    admin = await orders_database.server.connect(orders_database.name)
    try:
        before = await admin.fetchval("SELECT md5(string_agg(o::text, ',' ORDER BY id)) FROM orders o")
        await seed_orders(orders_database.server)
        after = await admin.fetchval("SELECT md5(string_agg(o::text, ',' ORDER BY id)) FROM orders o")
    finally:
        await admin.close()
    assert before == after
