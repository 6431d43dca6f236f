"""The login helpers against a real PostgreSQL server."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import httpx
import psycopg
import psycopg.conninfo
import pytest
import pytest_asyncio

from nhi_sdk import AccessToken, AsyncBroker, Broker, MissingExtra, PostgresLogin
from tests.support.parts import part_missing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from broker.dev.orders_db import OrdersDatabase
    from tests.unit.sdk.contract_server import ContractServer

INTENT = {"tool": "sql.query", "reason": "churn by plan"}
COUNT = "SELECT count(*) FROM customers"


@pytest_asyncio.fixture
async def login(orders_database: OrdersDatabase, server: ContractServer) -> AsyncIterator[dict[str, Any]]:
    """A login that the contract server hands out; its password needs quoting everywhere."""
    target = orders_database.server
    name, password = f"nhi_sdk_{secrets.token_hex(4)}", secrets.token_urlsafe(12) + "'\\ \" $x"
    admin = await target.connect()
    literal = password.replace("'", "''")
    await admin.execute(f"CREATE ROLE {name} LOGIN PASSWORD '{literal}' IN ROLE {orders_database.reader}")
    server.login = {
        "host": target.host,
        "port": target.port,
        "database": orders_database.name,
        "username": name,
        "password": password,
        "sslmode": "disable",
    }
    server.passwords.append(password)
    yield server.login
    await admin.execute(f"DROP ROLE {name}")
    await admin.close()


def test_connect_reads_rows_and_the_block_closes_the_connection(
    broker: Broker, login: dict[str, Any]
) -> None:
    with broker.credential("orders-db", "read", purpose="p", **INTENT) as cred:
        rows = cred.connect().execute(COUNT).fetchall()
        kept = cred.connect(autocommit=True, application_name="churn")
        assert rows == [(120,)]
        assert kept.info.user == login["username"]
        assert kept.autocommit
    assert kept.closed


def test_connect_leaves_nothing_open_when_the_block_fails(broker: Broker, login: dict[str, Any]) -> None:
    connections: list[psycopg.Connection[Any]] = []

    def work() -> None:
        with broker.credential("orders-db", "read", purpose="p", **INTENT) as cred:
            connections.append(cred.connect())
            connections[0].execute("SELECT nonsense")

    with pytest.raises(psycopg.errors.UndefinedColumn):
        work()
    assert connections[0].closed


async def test_async_connect_reads_rows_and_the_block_closes_the_connection(
    async_broker: AsyncBroker, login: dict[str, Any]
) -> None:
    async with async_broker.credential("orders-db", "read", purpose="p", **INTENT) as cred:
        connection = await cred.aconnect()
        cursor = await connection.execute(COUNT)
        assert await cursor.fetchall() == [(120,)]
        beside = cred.connect()
    assert connection.closed
    assert beside.closed


def test_conninfo_and_env_carry_any_password(
    broker: Broker, login: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cred = broker.request("orders-db", "read", purpose="p", **INTENT)
    with psycopg.connect(cred.conninfo()) as connection:
        assert connection.execute(COUNT).fetchone() == (120,)
    for name, value in cred.env().items():
        monkeypatch.setenv(name, value)
    with psycopg.connect("") as connection:
        assert connection.execute(COUNT).fetchone() == (120,)


@pytest.mark.parametrize("password", ["", "'", "\\", "\\'", " a b ", "=", "ü€", "a\nb", "host=evil"])
def test_conninfo_means_to_libpq_what_was_given(password: str) -> None:
    login = PostgresLogin(
        host="/tmp/x y", port=5433, database="o'rders", username="u\\", password=password, sslmode="require"
    )
    assert psycopg.conninfo.conninfo_to_dict(login.conninfo()) == login.parameters()


def test_psql_runs_under_exec_with_the_credential(
    login: dict[str, Any], environ: dict[str, str], server: ContractServer
) -> None:
    psql = shutil.which("psql")
    if psql is None:
        part_missing("psql is not installed")
    command = ["-m", "nhi_sdk", "exec", "--cred", "orders-db:read", "--purpose", "p", "--reason", "r"]
    done = subprocess.run(
        [sys.executable, *command, "psql", "-Atc", COUNT],
        env={**os.environ, **environ, "PGHOSTADDR": "192.0.2.1", "PGSERVICE": "elsewhere"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "120\n"), done.stderr
    assert server.alive() == []


def test_without_the_extra_connect_names_it(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    cred = broker.request("orders-db", "read", purpose="p", **INTENT)
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(MissingExtra, match=r"nhi-sdk\[psycopg\]"):
        cred.connect()


def test_a_token_is_sent_as_bearer(broker: Broker) -> None:
    cred = broker.request("tool-api", "call", purpose="p", **INTENT)
    assert isinstance(cred.secret, AccessToken)
    seen: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers["Authorization"])
        return httpx.Response(200)

    with httpx.Client(transport=httpx.MockTransport(answer), auth=cred.httpx_auth()) as client:
        client.get("https://tool.example.test/")
    assert seen == [f"Bearer {cred.secret.access_token}"]
    assert cred.env() == {"NHI_TOKEN": cred.secret.access_token}
