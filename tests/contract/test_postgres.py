"""What is particular to PostgreSQL: traps that the conformance suite cannot know of."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

import asyncpg
import pytest
import pytest_asyncio

from adapters import postgres as postgres_module
from adapters.conformance import assert_dead, error_of, mint, target_of
from adapters.postgres import PostgresAdapter, PostgresConfig, RevocationBlockedError, install_sql
from adapters.postgres_scram import new_password, scram_verifier
from adapters.postgres_sql import MINT_AGE_MS_MAX, TTL_MS_MAX
from broker.core.ids import LeaseId, backend_name
from broker.core.ports import ErrorClass, Liveness, Presence
from broker.core.secret import Secret
from broker.dev.postgres_binaries import find_postgres
from tests.contract.postgres_harness import PostgresHarness, connect_with, postgres_harness

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from broker.core.ports import Check
    from broker.dev.orders_db import OrdersDatabase

Connection = asyncpg.Connection


@pytest_asyncio.fixture
async def harness(orders_database: OrdersDatabase) -> AsyncIterator[PostgresHarness]:
    async with postgres_harness(orders_database) as harness:
        yield harness


@contextlib.asynccontextmanager
async def admin_of(harness: PostgresHarness, database: str | None = None) -> AsyncIterator[Connection]:
    admin = await harness.orders.server.connect(database or harness.orders.fence)
    try:
        yield admin
    finally:
        await admin.close()


async def until(admin: Connection, condition: str, *arguments: object) -> None:
    """Wait until the server says that `condition` holds; pytest's own timeout bounds it."""
    while await admin.fetchval(f"SELECT {condition}", *arguments) is not True:
        pass


# --- what the server is told ---------------------------------------------------------------------


async def test_the_server_stores_our_verifier_and_nothing_else(harness: PostgresHarness) -> None:
    request = harness.request()
    minted = await mint(harness.adapter, request)
    async with admin_of(harness) as admin:
        stored, until_ms, limit, comment = await admin.fetchrow(
            "SELECT rolpassword, extract(epoch FROM rolvaliduntil) * 1000, rolconnlimit,"
            " shobj_description(oid, 'pg_authid') FROM pg_authid WHERE rolname = $1",
            request.backend_name,
        )
    assert stored.startswith("SCRAM-SHA-256$4096:")
    assert minted.credential.secret["password"].reveal() not in stored
    assert int(until_ms) == request.not_after_ms
    assert limit == 2
    assert request.lease_id in comment


async def test_the_verifier_cannot_be_used_as_the_password(harness: PostgresHarness) -> None:
    request = harness.request()
    minted = await mint(harness.adapter, request)
    async with admin_of(harness) as admin:
        stored = await admin.fetchval(
            "SELECT rolpassword FROM pg_authid WHERE rolname = $1", request.backend_name
        )
    stolen = replace(minted.credential, secret={"password": Secret(stored)})
    assert await harness.adapter.probe(stolen) is Liveness.DEAD


def test_every_verifier_has_its_own_salt() -> None:
    password = Secret(new_password())
    assert scram_verifier(password) != scram_verifier(password)


@pytest.mark.parametrize("password", ["", "pässword", "soft\u00adhyphen", "tab\tbed"])
def test_a_password_that_saslprep_might_change_gets_no_verifier(password: str) -> None:
    with pytest.raises(ValueError, match="printable ASCII"):
        scram_verifier(Secret(password))


# --- the fence -----------------------------------------------------------------------------------


async def test_a_mint_stuck_in_the_server_is_ended_by_its_revocation(harness: PostgresHarness) -> None:
    request = harness.request()
    async with admin_of(harness) as admin, admin_of(harness) as watcher:
        blocker = admin.transaction()
        await blocker.start()
        await admin.execute(f'CREATE ROLE "{request.backend_name}"')  # the mint waits for this to end
        minting = asyncio.create_task(error_of(mint(harness.adapter, request)))
        await until(
            watcher,
            "EXISTS (SELECT FROM pg_stat_activity WHERE application_name = $1 AND wait_event_type = 'Lock')",
            request.backend_name,
        )
        await harness.adapter.revoke(target_of(request))
        error = await minting
        await blocker.rollback()
    assert isinstance(error, asyncpg.AdminShutdownError | asyncpg.PostgresConnectionError)
    assert harness.adapter.classify(error) is ErrorClass.RETRY
    await assert_dead(harness, request, None)


async def test_a_mint_that_reaches_the_server_after_the_revocation_is_refused(
    harness: PostgresHarness,
) -> None:
    request = harness.request()
    await harness.adapter.revoke(target_of(request))
    error = await error_of(mint(harness.adapter, request))
    assert isinstance(error, asyncpg.PostgresError)
    assert error.sqlstate == "NHI01"
    assert harness.adapter.classify(error) is ErrorClass.PERMANENT


async def test_a_second_mint_of_a_live_lease_is_not_called_harmless(harness: PostgresHarness) -> None:
    request = harness.request()
    await mint(harness.adapter, request)
    error = await error_of(mint(harness.adapter, request))
    assert harness.adapter.classify(error) is ErrorClass.RETRY


async def test_tombstones_are_forgotten_only_when_no_mint_can_need_them(harness: PostgresHarness) -> None:
    old, young, undropped = harness.request(), harness.request(), harness.request()
    for request in (old, young, undropped):
        await harness.adapter.revoke(target_of(request))
    async with admin_of(harness) as admin:
        await admin.execute(
            "UPDATE nhi.tombstone SET at = now() - interval '61 minutes' WHERE role = ANY ($1)",
            [old.backend_name, undropped.backend_name],
        )
        await admin.execute(f'CREATE ROLE "{undropped.backend_name}"')
        assert [one async for one in harness.adapter.scan([])]
        left = {name for (name,) in await admin.fetch("SELECT role FROM nhi.tombstone")}
        await admin.execute(f'DROP ROLE "{undropped.backend_name}"')
    assert old.backend_name not in left
    assert {young.backend_name, undropped.backend_name} <= left


async def test_a_tombstone_that_finds_a_living_session_is_not_forgotten(harness: PostgresHarness) -> None:
    request = harness.request()
    session = await harness.open_session((await mint(harness.adapter, request)).credential)
    async with admin_of(harness) as admin:
        oid = await admin.fetchval("SELECT oid FROM pg_roles WHERE rolname = $1", request.backend_name)
        await admin.execute(f'DROP ROLE "{request.backend_name}"')
        await admin.execute(
            "INSERT INTO nhi.tombstone VALUES ($1, $2, now() - interval '1 day')", request.backend_name, oid
        )
        assert [one async for one in harness.adapter.scan([])] == []
        kept = await admin.fetchval(
            "SELECT count(*) FROM nhi.tombstone WHERE role = $1", request.backend_name
        )
    assert kept == 1
    assert await session.is_alive()


@pytest.mark.parametrize("age_ms", [MINT_AGE_MS_MAX + 60_000, -MINT_AGE_MS_MAX - 60_000])
async def test_a_mint_call_older_than_a_tombstone_may_become_is_refused(
    harness: PostgresHarness, age_ms: int
) -> None:
    request = harness.request()
    stale = replace(request, now_ms=request.now_ms - age_ms)
    error = await error_of(mint(harness.adapter, stale))
    assert harness.adapter.classify(error) is ErrorClass.PERMANENT


async def test_the_fence_refuses_an_isolation_level_it_could_be_fooled_in(harness: PostgresHarness) -> None:
    async with broker_login(harness) as login, login.transaction(isolation="repeatable_read"):
        with pytest.raises(asyncpg.PostgresError, match="read committed"):
            await login.fetch("SELECT * FROM nhi.revoke($1)", [harness.request().backend_name])


# --- sessions ------------------------------------------------------------------------------------


async def test_a_session_that_took_its_groups_identity_is_cut(harness: PostgresHarness) -> None:
    request = harness.request()
    session = await harness.open_session((await mint(harness.adapter, request)).credential)
    await session.connection.execute(f"SET ROLE {harness.orders.reader}")
    assert await session.connection.fetchval("SELECT count(*) FROM orders") > 0
    await harness.adapter.revoke(target_of(request))
    assert not await session.is_alive()


async def test_a_session_in_the_middle_of_a_query_is_cut(harness: PostgresHarness) -> None:
    request = harness.request()
    session = await harness.open_session((await mint(harness.adapter, request)).credential)
    running = asyncio.create_task(error_of(session.connection.fetch("SELECT pg_sleep(60)")))
    async with admin_of(harness) as admin:
        await until(
            admin,
            "EXISTS (SELECT FROM pg_stat_activity WHERE usename = $1 AND wait_event = 'PgSleep')",
            request.backend_name,
        )
    await harness.adapter.revoke(target_of(request))
    assert isinstance(await running, asyncpg.PostgresConnectionError | asyncpg.AdminShutdownError)
    assert not await session.is_alive()
    await assert_dead(harness, request, None)


async def test_a_session_in_another_database_is_cut_and_counted(harness: PostgresHarness) -> None:
    request = harness.request()
    other = f"other_{harness.instance}"
    async with admin_of(harness) as admin:
        await admin.execute(f"CREATE DATABASE {other}")
        minted = await mint(harness.adapter, request)
        elsewhere = replace(minted.credential, public={**minted.credential.public, "database": other})
        session = await harness.open_session(elsewhere)
        assert (await harness.adapter.verify(target_of(request))).evidence["sessions"] == 1
        await harness.adapter.revoke(target_of(request))
        assert not await session.is_alive()
        await admin.execute(f"DROP DATABASE {other} WITH (FORCE)")


async def test_a_session_that_outlived_its_role_is_still_seen_and_cut(harness: PostgresHarness) -> None:
    request = harness.request()
    session = await harness.open_session((await mint(harness.adapter, request)).credential)
    async with admin_of(harness) as admin:
        oid = await admin.fetchval("SELECT oid FROM pg_roles WHERE rolname = $1", request.backend_name)
        await admin.execute(f'DROP ROLE "{request.backend_name}"')
        await admin.execute(
            "INSERT INTO nhi.tombstone (role, role_oid) VALUES ($1, $2)", request.backend_name, oid
        )
    verification = await harness.adapter.verify(target_of(request))
    assert verification.presence is Presence.PRESENT
    assert verification.evidence["role_exists"] is False
    assert verification.evidence["sessions"] == 1
    await harness.adapter.revoke(target_of(request))
    assert not await session.is_alive()
    await assert_dead(harness, request, None)


async def test_a_client_that_keeps_reconnecting_is_out_for_good(harness: PostgresHarness) -> None:
    request = harness.request()
    minted = await mint(harness.adapter, request)
    opened: list[Connection] = []
    first_in = asyncio.Event()

    async def keep_coming_back() -> None:
        while True:
            try:
                opened.append(await connect_with(minted.credential))
                first_in.set()
                await opened[-1].execute("CREATE TEMP TABLE hoard AS SELECT 1; SELECT pg_sleep(60)")
            except asyncpg.InvalidAuthorizationSpecificationError:
                return  # the login is refused: the class of 28000 and 28P01
            except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError):
                continue

    coming = asyncio.create_task(keep_coming_back())
    await first_in.wait()
    await harness.adapter.revoke(target_of(request))
    await coming
    for connection in opened:
        connection.terminate()
    await assert_dead(harness, request, minted)


async def test_a_session_that_slips_in_while_its_role_is_being_dropped_is_cut(
    harness: PostgresHarness,
) -> None:
    request = harness.request()
    minted = await mint(harness.adapter, request)
    patient = PostgresAdapter(harness.config(statement_timeout_seconds=40, lock_timeout_seconds=10))
    async with admin_of(harness) as admin, admin_of(harness) as watcher:
        lock = admin.transaction()
        await lock.start()
        await admin.execute(f'ALTER ROLE "{request.backend_name}" CONNECTION LIMIT 1')  # holds up the drop
        revoking = asyncio.create_task(patient.revoke(target_of(request)))
        await until(
            watcher,
            "EXISTS (SELECT FROM pg_stat_activity WHERE usename = $1 AND wait_event_type = 'Lock')",
            harness.login,
        )
        session = await harness.open_session(minted.credential)
        await lock.rollback()
        await revoking
    await patient.close()
    assert not await session.is_alive()
    await assert_dead(harness, request, minted)


async def test_a_session_that_locks_its_own_role_does_not_hold_up_its_end(harness: PostgresHarness) -> None:
    request = harness.request()
    session = await harness.open_session((await mint(harness.adapter, request)).credential)
    await session.connection.execute("BEGIN; ALTER ROLE CURRENT_USER SET search_path = public")
    await harness.adapter.revoke(target_of(request))
    assert not await session.is_alive()
    await assert_dead(harness, request, None)


async def test_a_role_locked_by_someone_else_loses_its_groups_and_sessions_at_least(
    harness: PostgresHarness,
) -> None:
    request = harness.request()
    session = await harness.open_session((await mint(harness.adapter, request)).credential)
    async with admin_of(harness) as admin:
        lock = admin.transaction()
        await lock.start()
        await admin.execute(f'ALTER ROLE "{request.backend_name}" CONNECTION LIMIT 1')
        error = await error_of(harness.adapter.revoke(target_of(request)))
        assert isinstance(error, RevocationBlockedError)
        assert error.sqlstate == "55P03"
        assert not await session.is_alive()
        assert await admin.fetchval(
            "SELECT count(*) = 0 FROM pg_auth_members WHERE member = $1::regrole", request.backend_name
        )
        assert (await harness.adapter.verify(target_of(request))).presence is Presence.PRESENT
        await lock.rollback()
    await harness.adapter.revoke(target_of(request))
    await assert_dead(harness, request, None)


# --- what a login leaves behind ------------------------------------------------------------------


async def test_what_a_login_owns_does_not_keep_its_role_alive_and_is_not_deleted(
    harness: PostgresHarness,
) -> None:
    request = harness.request()
    session = await harness.open_session((await mint(harness.adapter, request)).credential)
    large_object = await session.connection.fetchval("SELECT lo_from_bytea(0, 'kept')")
    await session.connection.execute("ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO PUBLIC")
    await harness.adapter.revoke(target_of(request))
    await assert_dead(harness, request, None)
    async with admin_of(harness, harness.orders.name) as admin:
        owner = await admin.fetchval(
            "SELECT lomowner::regrole::text FROM pg_largeobject_metadata WHERE oid = $1", large_object
        )
        await admin.execute("SELECT lo_unlink($1)", large_object)
    assert owner == "nhi_quarantine"


async def test_a_role_that_cannot_be_dropped_is_disarmed_named_and_never_called_absent(
    harness: PostgresHarness,
) -> None:
    request = harness.request()
    other = f"other_{harness.instance}"  # a database that no install script was run in
    async with admin_of(harness) as admin:
        await admin.execute(f"CREATE DATABASE {other}")
    minted = await mint(harness.adapter, request)
    elsewhere = replace(minted.credential, public={**minted.credential.public, "database": other})
    session = await harness.open_session(elsewhere)
    await session.connection.fetchval("SELECT lo_create(0)")

    error = await error_of(harness.adapter.revoke(target_of(request)))

    assert isinstance(error, RevocationBlockedError)
    assert other in str(error)
    assert harness.adapter.classify(error) is ErrorClass.RETRY
    assert not await session.is_alive()
    assert await harness.adapter.probe(minted.credential) is Liveness.DEAD
    verification = await harness.adapter.verify(target_of(request))
    assert verification.presence is Presence.PRESENT
    assert verification.evidence["can_login"] is False
    async with admin_of(harness, other) as admin:
        groups = await admin.fetchval(
            "SELECT count(*) FROM pg_auth_members WHERE member = $1::regrole", request.backend_name
        )
        assert groups == 0
        await admin.execute(f'DROP OWNED BY "{request.backend_name}"')
    await harness.adapter.revoke(target_of(request))
    await assert_dead(harness, request, minted)
    async with admin_of(harness) as admin:
        await admin.execute(f"DROP DATABASE {other} WITH (FORCE)")


async def test_a_live_lease_is_not_disowned(harness: PostgresHarness) -> None:
    request = harness.request()
    await mint(harness.adapter, request)
    async with broker_login(harness, harness.orders.name) as login:
        with pytest.raises(asyncpg.PostgresError, match="still alive"):
            await login.execute("SELECT nhi.disown($1)", request.backend_name)


async def test_another_instances_role_is_not_disowned(harness: PostgresHarness) -> None:
    alien = backend_name(harness.neighbour_tag, LeaseId.new())
    async with broker_login(harness, harness.orders.name) as login:
        with pytest.raises(asyncpg.PostgresError) as refused:
            await login.execute("SELECT nhi.disown($1)", alien)
    assert refused.value.sqlstate == "NHI04"


# --- what the broker's login may do, and what not ------------------------------------------------


@contextlib.asynccontextmanager
async def broker_login(harness: PostgresHarness, database: str | None = None) -> AsyncIterator[Connection]:
    connection = await asyncpg.connect(
        host=harness.proxy.host,
        port=harness.proxy.port,
        user=harness.login,
        password=harness.password.reveal(),
        database=database or harness.orders.fence,
        ssl=False,
    )
    try:
        yield connection
    finally:
        await connection.close()


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE ROLE mine",
        "DROP ROLE orders_reader",
        "GRANT orders_writer TO CURRENT_USER",
        "SELECT * FROM nhi.tombstone",
        "DELETE FROM nhi.tombstone",
        "INSERT INTO nhi.allowed_group VALUES ('aaaaaa', 'postgres')",
        "SELECT nhi.cut_sessions('{10}', '1 second')",
        "SELECT nhi.drop_or_disarm('postgres')",
        "CREATE FUNCTION nhi.mine() RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "CREATE TABLE public.mine (a int)",
    ],
)
async def test_the_brokers_login_can_only_execute(harness: PostgresHarness, statement: str) -> None:
    async with broker_login(harness) as login:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await login.execute(statement)


@pytest.mark.parametrize(
    "name", ["postgres", "orders_reader", "nhi_aaaaaa_short", "nhi_aaaaaa_aaaaaaaaaaaaaaaa\n", ""]
)
async def test_the_functions_touch_leased_roles_only(harness: PostgresHarness, name: str) -> None:
    async with broker_login(harness) as login:
        for call in ("nhi.revoke", "nhi.cut", "nhi.inspect"):
            with pytest.raises(asyncpg.PostgresError) as refused:
                await login.fetch(f"SELECT {call}($1)", [name])
            assert refused.value.sqlstate == "NHI03"


async def test_the_functions_touch_roles_of_our_own_instance_only(harness: PostgresHarness) -> None:
    alien = backend_name(harness.neighbour_tag, LeaseId.new())
    async with broker_login(harness) as login:
        for call in ("nhi.revoke", "nhi.cut", "nhi.inspect"):
            with pytest.raises(asyncpg.PostgresError) as refused:
                await login.fetch(f"SELECT {call}($1)", [alien])
            assert refused.value.sqlstate == "NHI04"


@pytest.mark.parametrize(
    ("position", "value"),
    [
        (2, "a plaintext password"),
        (2, "md5" + 32 * "0"),
        (2, None),
        (4, 4_102_444_800_000),
        (4, None),
        (5, 0),
        (5, 101),
        (5, None),
    ],
)
async def test_mint_refuses_what_no_honest_broker_sends(
    harness: PostgresHarness, position: int, value: object
) -> None:
    request = harness.request()
    verifier = scram_verifier(Secret(new_password()))
    arguments = [
        request.backend_name, harness.orders.reader, verifier, request.now_ms, request.not_after_ms, 2,
    ]  # fmt: skip
    arguments[position] = value
    async with broker_login(harness) as login:
        with pytest.raises(asyncpg.PostgresError) as refused:
            await login.execute(postgres_module.sql.MINT, *arguments)
    assert refused.value.sqlstate == "NHI03"


@pytest.mark.parametrize("group", ["orders_writer", "postgres", "pg_signal_backend", "no_such_group"])
async def test_a_group_off_the_allow_list_is_refused_for_good(harness: PostgresHarness, group: str) -> None:
    request = replace(harness.request(), recipe={**harness.recipe, "group": group})
    error = await error_of(mint(harness.adapter, request))
    assert harness.adapter.classify(error) is ErrorClass.PERMANENT
    assert (await harness.adapter.verify(target_of(request))).evidence["role_exists"] is False


async def test_a_leased_login_cannot_reach_the_fence(harness: PostgresHarness) -> None:
    minted = await mint(harness.adapter, harness.request())
    at_fence = replace(
        minted.credential, public={**minted.credential.public, "database": harness.orders.fence}
    )
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await connect_with(at_fence)


async def test_a_leased_login_cannot_give_itself_more_life(harness: PostgresHarness) -> None:
    session = await harness.open_session((await mint(harness.adapter, harness.request())).credential)
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await session.connection.execute("ALTER ROLE CURRENT_USER VALID UNTIL 'infinity'")


def test_the_longest_ttl_fits_what_the_server_accepts(harness_config: PostgresConfig) -> None:
    declared = PostgresAdapter(harness_config).capabilities
    assert declared.ttl_seconds_max * 1000 + MINT_AGE_MS_MAX <= TTL_MS_MAX


# --- batches, pages, pools -----------------------------------------------------------------------


async def test_a_bad_item_of_a_batch_fails_alone(harness: PostgresHarness) -> None:
    good = [harness.request() for _ in range(5)]
    minted = [await mint(harness.adapter, request) for request in good]
    lease = LeaseId.new()
    alien = replace(harness.request(lease), backend_name=backend_name(harness.neighbour_tag, lease))
    results = await asyncio.gather(
        *(harness.adapter.revoke(target_of(request)) for request in [alien, *good]), return_exceptions=True
    )
    assert [type(result).__name__ for result in results[1:]] == ["NoneType"] * 5
    assert getattr(results[0], "sqlstate", None) == "NHI04"
    for request, one in zip(good, minted, strict=True):
        await assert_dead(harness, request, one)


async def test_a_scan_goes_on_after_its_first_page(
    harness: PostgresHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_module, "_PAGE", 2)
    requests = [harness.request() for _ in range(5)]
    for request in requests:
        await mint(harness.adapter, request)
    found = {one.backend_name: one.created_ms async for one in harness.adapter.scan([])}
    assert found.keys() == {request.backend_name for request in requests}
    for request in requests:
        created_ms = found[request.backend_name]
        assert created_ms is not None
        assert abs(created_ms - request.now_ms) < MINT_AGE_MS_MAX


async def test_mints_that_hang_do_not_keep_a_revocation_waiting(harness: PostgresHarness) -> None:
    patient = PostgresAdapter(harness.config(statement_timeout_seconds=40, lock_timeout_seconds=10))
    alive = harness.request()
    await mint(patient, alive)
    requests = [harness.request() for _ in range(12)]
    async with admin_of(harness) as admin, admin_of(harness) as watcher:
        blocker = admin.transaction()
        await blocker.start()
        for request in requests:
            await admin.execute(f'CREATE ROLE "{request.backend_name}"')
        mints = [asyncio.create_task(error_of(mint(patient, request))) for request in requests]
        await until(
            watcher,
            "count(*) = 5 FROM pg_stat_activity WHERE usename = $1 AND wait_event_type = 'Lock'",
            harness.login,
        )
        await patient.revoke(target_of(alive))
        assert not any(one.done() for one in mints)
        for one in mints:
            one.cancel()
        await asyncio.gather(*mints, return_exceptions=True)
        await blocker.rollback()
    await patient.close()
    await assert_dead(harness, alive, None)
    for request in requests:
        await harness.adapter.revoke(target_of(request))


async def test_a_restarted_server_is_survived(harness: PostgresHarness) -> None:
    request = harness.request()
    await mint(harness.adapter, request)
    async with admin_of(harness) as admin:
        await admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = $1", harness.login
        )
    try:
        await harness.adapter.revoke(target_of(request))
    except Exception as error:  # noqa: BLE001  it may find the dead connection before its end is known
        assert harness.adapter.classify(error) is ErrorClass.RETRY  # noqa: PT017  either way is right
    await harness.adapter.revoke(target_of(request))
    await assert_dead(harness, request, None)


# --- check and install ---------------------------------------------------------------------------


async def missing(harness: PostgresHarness) -> list[Check]:
    return [check for check in await harness.adapter.check([harness.recipe]) if not check.ok]


@pytest.mark.parametrize(
    ("broken_by", "mended_by", "remedy"),
    [
        ("REVOKE EXECUTE ON FUNCTION nhi.mint FROM {login}", "", "install"),
        ("REVOKE EXECUTE ON FUNCTION nhi.revoke FROM {login}", "", "install"),
        ("DELETE FROM nhi.broker WHERE login = '{login}'", "", "install"),
        ("DELETE FROM nhi.allowed_group WHERE tag = '{tag}'", "", "install"),
        (
            "CREATE OR REPLACE FUNCTION nhi.version() RETURNS integer LANGUAGE sql AS 'SELECT 0'",
            "",
            "install",
        ),
        ("ALTER ROLE {login} CREATEROLE", "ALTER ROLE {login} NOCREATEROLE", "NOCREATEROLE"),
        ("GRANT CONNECT ON DATABASE {fence} TO PUBLIC", "", "REVOKE ALL ON DATABASE"),
        (
            "GRANT CONNECT ON DATABASE {fence} TO orders_reader",
            "REVOKE CONNECT ON DATABASE {fence} FROM orders_reader",
            "REVOKE ALL ON DATABASE",
        ),
        ("ALTER ROLE orders_reader CREATEDB", "ALTER ROLE orders_reader NOCREATEDB", "NOCREATEDB"),
    ],
)
async def test_check_names_what_is_missing_and_the_statement_that_mends_it(
    harness: PostgresHarness, broken_by: str, mended_by: str, remedy: str
) -> None:
    names = {"login": harness.login, "tag": harness.instance, "fence": f'"{harness.orders.fence}"'}
    assert await missing(harness) == []
    async with admin_of(harness) as admin:
        await admin.execute(broken_by.format(**names))
        try:
            found = await missing(harness)
        finally:
            await admin.execute(mended_by.format(**names) or "SELECT 1")
            await harness.install(harness.config())
    assert found
    assert all(check.remedy for check in found)
    assert any(remedy in check.remedy for check in found)
    assert await missing(harness) == []


@pytest.mark.parametrize(
    ("recipe", "remedy"),
    [
        ({"group": "no_such_group"}, 'CREATE ROLE "no_such_group"'),
        ({"group": "orders_writer"}, "lists the groups of the catalog"),
        ({"database": "no_such_database"}, 'CREATE DATABASE "no_such_database"'),
        ({"database": "template1"}, 'in database "template1"'),
    ],
)
async def test_check_looks_at_every_recipe(
    harness: PostgresHarness, recipe: dict[str, object], remedy: str
) -> None:
    checks = await harness.adapter.check([harness.recipe, {**harness.recipe, **recipe}])
    assert any(remedy in check.remedy for check in checks if not check.ok)


async def test_check_of_a_wrong_password_says_so_without_showing_it(harness: PostgresHarness) -> None:
    adapter = PostgresAdapter(harness.config(broker_password=Secret("not the right one")))
    checks = await adapter.check([harness.recipe])
    await adapter.close()
    assert [check.ok for check in checks] == [False]
    assert "28P01" in checks[0].remedy
    assert "not the right one" not in repr(checks)


async def test_psql_runs_the_install_script_on_an_empty_server_twice(
    orders_database: OrdersDatabase,
) -> None:
    server = orders_database.server
    async with postgres_harness(orders_database) as harness:
        fence = f"fence_{harness.instance}"
        config = harness.config(fence_database=fence)
        script = install_sql(config, [harness.recipe], set_password=True)
        assert harness.password.reveal() not in script
        for _ in range(2):
            psql = await asyncio.create_subprocess_exec(
                str(find_postgres(None).directory / "psql"),
                *("-X", "-q", "-h", server.host, "-p", str(server.port), "-U", server.superuser, "postgres"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env={"PGPASSWORD": server.password.reveal(), "PGSSLMODE": "disable"},
            )
            _, errors = await psql.communicate(script.encode())
            assert (psql.returncode, errors) == (0, b"")
        adapter = PostgresAdapter(config)
        assert [check for check in await adapter.check([harness.recipe]) if not check.ok] == []
        await adapter.close()
        async with admin_of(harness) as admin:
            await admin.execute(f"DROP DATABASE {fence} WITH (FORCE)")


# --- settings ------------------------------------------------------------------------------------


@pytest.fixture
def settings() -> dict[str, object]:
    return {"name": "pg", "instance": "abcdef", "host": "db.example", "broker_password": Secret("s3cret")}


@pytest.fixture
def harness_config(settings: dict[str, object]) -> PostgresConfig:
    return PostgresConfig.model_validate(settings)


def test_what_may_be_in_flight_is_computed_from_the_timeouts(settings: dict[str, object]) -> None:
    config = PostgresConfig.model_validate(
        {
            **settings,
            "connect_timeout_seconds": 3,
            "statement_timeout_seconds": 7,
            "lock_timeout_seconds": 1.5,
        }
    )
    assert PostgresAdapter(config).capabilities.t_inflight_seconds == 12 + 5


def test_the_settings_never_show_the_password(harness_config: PostgresConfig) -> None:
    assert "s3cret" not in repr(harness_config)
    assert "s3cret" not in str(harness_config.model_dump())


@pytest.mark.parametrize(
    "change",
    [
        {"broker_password": None},
        {"password_file": "/run/secrets/pg"},
        {"broker_password": "in clear"},  # pragma: allowlist secret  refused for not being a Secret
        {"instance": "UPPER1"},
        {"name": "two\nlines"},
        {"sslmode": "prefer"},
        {"port": 0},
        {"pool_size": 1},
        {"lock_timeout_seconds": 2.6},
        {"hots": "typo"},
    ],
)
def test_bad_settings_are_refused_in_words_and_without_values(
    settings: dict[str, object], change: dict[str, object]
) -> None:
    merged = {**settings, **change}
    instance = merged.pop("instance")
    with pytest.raises(ValueError, match=r".+: .+") as refused:
        postgres_module.from_settings(instance=instance, **merged)
    assert "in clear" not in str(refused.value)
    assert "s3cret" not in str(refused.value)
