"""PostgreSQL: one login role per lease.

A mint is one call of a function that an administrator installed (``adapters/sql``): a role
with a SCRAM verifier computed here, member of the recipe's group, VALID UNTIL a little after
the lease. A revocation writes a tombstone that no later mint gets past, ends the role's
sessions by OID and drops it: neither VALID UNTIL nor NOLOGIN nor DROP ROLE ends a session by
itself. ``docs/adapters/postgres.md`` has the whole story.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import asyncpg
from pydantic import ValidationError

from adapters import postgres_sql as sql
from adapters.batching import Batcher
from adapters.postgres_check import Findings, check_installation
from adapters.postgres_config import PostgresConfig, PostgresRecipe, RecipeError, faults
from adapters.postgres_scram import PasswordStock
from adapters.postgres_sql import install_scripts, install_sql
from broker.core.ports import (
    Capabilities,
    Check,
    Credential,
    Effect,
    ErrorClass,
    Fence,
    Found,
    Liveness,
    Minted,
    Naming,
    Presence,
    Revocability,
    Verification,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from broker.core.ids import InstanceTag
    from broker.core.ports import MintRequest, Target
    from broker.core.secret import Secret

__all__ = [
    "PostgresAdapter",
    "PostgresConfig",
    "RevocationBlockedError",
    "SessionsRemainError",
    "from_settings",
    "install_scripts",
    "install_sql",
]

_RESERVED_CONNECTIONS: Final = 3
"""Mints never take the last connections: a burst of them must not hold up a revocation."""

_PASSWORDS_AHEAD: Final = 16
_PAGE: Final = 500
_DATABASES_MAX: Final = 8

_NOTHING_MINTED: Final = frozenset(
    {
        "NHI01",  # the lease was revoked before
        "NHI02",  # the group is not allowed, or does not exist
        "NHI03",  # an argument the functions refuse
        "NHI04",  # the login does not act for this instance
        "NHI06",  # the call is too old, or the clocks disagree
        "42501",  # no EXECUTE
        "42883",  # the functions are not installed
        "3F000",  # the schema is not installed
        "3D000",  # the fence database does not exist: no connection was made
        "28P01",  # our own login was refused: no connection was made
        "28000",
    }
)
"""SQLSTATEs that only ever come back before a role was created, or with it rolled back."""

_CONNECTION_TROUBLE: Final = (asyncpg.InterfaceError, asyncpg.InternalClientError, OSError)
"""What asyncpg raises where no server answered; TimeoutError is an OSError."""

_LOGIN_REFUSED: Final = frozenset({"28P01", "28000"})
_OBJECTS_OWNED: Final = "2BP01"


class RevocationBlockedError(Exception):
    """The login lost its sessions and groups, but its role could not be dropped.

    Attributes:
        sqlstate: what PostgreSQL said.
        databases: where the role still owns something.

    """

    def __init__(self, role: str, sqlstate: str, databases: Sequence[str]) -> None:
        if databases:
            where = f" It owns objects in: {', '.join(databases)}."
            mend = "Run the script of `nhi adapter postgres install` in each of those databases."
        else:
            where = ""
            mend = "Look in pg_locks and pg_prepared_xacts for who holds a lock on it."
        super().__init__(
            f"role {role} lost its sessions and groups, but could not be dropped ({sqlstate}).{where} {mend}"
        )
        self.sqlstate = sqlstate
        self.databases = tuple(databases)


class SessionsRemainError(Exception):
    """Sessions of revoked logins did not end in time; revoking again goes on with it."""


@dataclass(frozen=True, slots=True)
class _Revoked:
    outcome: str
    databases: tuple[str, ...]

    @property
    def done(self) -> bool:
        return self.outcome in {"dropped", "absent"}


class PostgresAdapter:
    """Mints and kills login roles in one PostgreSQL cluster (14 or later)."""

    def __init__(self, config: PostgresConfig) -> None:
        self._config = config
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None
        self._passwords = PasswordStock(_PASSWORDS_AHEAD)
        self._mints = asyncio.Semaphore(config.pool_size - _RESERVED_CONNECTIONS)
        batches = {"size_max": config.batch_max, "parallel": 2}
        self._revocations = Batcher(self._revoke_batch, _of_one_item, **batches)
        self._inspections = Batcher(self._inspect_batch, _of_one_item, **batches)
        self._capabilities = Capabilities(
            external_effect=True,
            naming=Naming.DETERMINISTIC,
            fence=Fence.STRONG,
            revocability=Revocability(Effect.IMMEDIATE),
            cuts_sessions=True,
            listable=True,
            needs_secret_to_revoke=False,
            expiry_ends_sessions=False,
            ttl_seconds_min=1,
            ttl_seconds_max=sql.TTL_MS_MAX // 1000 - sql.MINT_AGE_MS_MAX // 1000,
            t_inflight_seconds=config.t_inflight_seconds,
        )

    @property
    def name(self) -> str:
        """The configured backend's name."""
        return self._config.name

    @property
    def capabilities(self) -> Capabilities:
        """What this adapter declares."""
        return self._capabilities

    def validate_recipe(self, recipe: Mapping[str, object]) -> list[str]:
        """Return what is wrong with ``{database, group, connection_limit?}``."""
        try:
            self._parse(recipe)
        except RecipeError as error:
            return str(error).split("; ")
        return []

    async def prepare(self, request: MintRequest) -> str | None:  # noqa: ARG002  the name is the handle
        """Nothing to prepare: the role's name is enough to kill it."""
        return None

    async def mint(self, request: MintRequest) -> Minted:
        """Create the login role, in one round trip.

        Raises:
            RecipeError: the recipe is not valid; nothing was sent.
            asyncpg.PostgresError: the server refused; see `classify`.
            TimeoutError, OSError: unreachable or too slow; the role may exist.

        """
        recipe = self._parse(request.recipe)
        async with asyncio.timeout(self._config.call_seconds), self._mints:
            prepared = await self._passwords.take()
            async with self._connection() as connection:
                await connection.execute(
                    sql.MINT,
                    request.backend_name,
                    recipe.group,
                    prepared.verifier,
                    request.now_ms,
                    request.not_after_ms,
                    recipe.connection_limit,
                )
        return Minted(credential=self._credential(request.backend_name, recipe, prepared.password))

    async def revoke(self, target: Target) -> None:
        """Fence, end sessions, drop; concurrent calls share round trips.

        Raises:
            RevocationBlockedError: disarmed, but something keeps the role from being dropped.
            SessionsRemainError: sessions did not end in time.
            asyncpg.PostgresError, TimeoutError, OSError: nothing is known; call again.

        """
        async with asyncio.timeout(2 * self._config.call_seconds):
            revoked = await self._revocations.submit(target.backend_name)
            if revoked.outcome == _OBJECTS_OWNED:
                await self._disown(target.backend_name, revoked.databases)
                revoked = await self._revocations.submit(target.backend_name)
        if not revoked.done:
            raise RevocationBlockedError(target.backend_name, revoked.outcome, revoked.databases)

    async def verify(self, target: Target) -> Verification:
        """Look for role, sessions and tombstone; concurrent calls share round trips.

        ABSENT takes all three: no role, no session in any database, and the tombstone without
        which a mint might still be on its way.
        """
        async with asyncio.timeout(self._config.call_seconds):
            return await self._inspections.submit(target.backend_name)

    async def scan(self, recipes: Sequence[Mapping[str, object]]) -> AsyncIterator[Found]:  # noqa: ARG002  roles belong to the cluster
        """Yield every role with our tag; forgets tombstones that have served their time."""
        await self._fetch(sql.REAP, self._config.instance)
        after = ""
        while True:
            page = await self._fetch(sql.LIST, self._config.instance, after, _PAGE)
            for row in page:
                yield Found(backend_name=row["role"], created_ms=row["created_ms"])
            if len(page) < _PAGE:
                return
            after = page[-1]["role"]

    def classify(self, error: Exception) -> ErrorClass:
        """Say what an error means: PERMANENT only where surely nothing was minted."""
        if isinstance(error, RecipeError):
            return ErrorClass.PERMANENT
        if isinstance(error, asyncpg.PostgresError) and error.sqlstate in _NOTHING_MINTED:
            return ErrorClass.PERMANENT
        return ErrorClass.RETRY

    async def check(self, recipes: Sequence[Mapping[str, object]]) -> list[Check]:
        """Check connection, installation, rights and the recipes' groups and databases."""
        findings = Findings(self._config)
        parsed = []
        for recipe in recipes:
            faults = self.validate_recipe(recipe)
            if faults:
                findings.add("recipes are valid", ok=False, remedy="; ".join(faults))
            else:
                parsed.append(self._parse(recipe))
        try:
            async with asyncio.timeout(self._config.call_seconds), self._connection() as connection:
                await check_installation(connection, parsed, findings)
        except (asyncpg.PostgresError, *_CONNECTION_TROUBLE) as error:
            findings.unreachable(error)
            return findings.checks
        for database in sorted({recipe.database for recipe in parsed})[:_DATABASES_MAX]:
            findings.disown_installed(database, ok=await self._can_disown(database))
        return findings.checks

    async def probe(self, credential: Credential) -> Liveness:
        """Log in with the credential and run one query."""
        try:
            async with asyncio.timeout(self._config.call_seconds):
                connection = await asyncpg.connect(
                    host=str(credential.public["host"]),
                    port=int(credential.public["port"]),
                    database=str(credential.public["database"]),
                    user=str(credential.public["username"]),
                    password=credential.secret["password"].reveal(),
                    ssl=self._config.ssl_context(),
                    timeout=self._config.connect_timeout_seconds,
                )
                try:
                    await connection.fetchval("SELECT 1")
                finally:
                    connection.terminate()
        except asyncpg.PostgresError as error:
            return Liveness.DEAD if error.sqlstate in _LOGIN_REFUSED else Liveness.UNKNOWN
        except _CONNECTION_TROUBLE:
            return Liveness.UNKNOWN
        return Liveness.ALIVE

    async def close(self) -> None:
        """Close every connection hard; calls under way fail."""
        await self._revocations.close()
        await self._inspections.close()
        await self._passwords.close()
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.terminate()

    def _parse(self, recipe: Mapping[str, object]) -> PostgresRecipe:
        parsed = PostgresRecipe.parse(recipe)
        if parsed.database == self._config.fence_database:
            raise RecipeError("database: leased logins must not reach the fence database; name another one")
        return parsed

    def _credential(self, role: str, recipe: PostgresRecipe, password: Secret[str]) -> Credential:
        config = self._config
        return Credential(
            kind="postgresql_login",
            public={
                "host": config.client_host or config.host,
                "port": config.client_port or config.port,
                "database": recipe.database,
                "username": role,
                "sslmode": config.client_sslmode or config.sslmode,
            },
            secret={"password": password},
        )

    async def _revoke_batch(self, roles: Sequence[str]) -> dict[str, _Revoked]:
        async with asyncio.timeout(self._config.call_seconds), self._connection() as connection:
            rows = await connection.fetch(sql.REVOKE, roles)
            # A client that reconnected while that transaction ran got in before its commit.
            remaining = await connection.fetchval(sql.CUT, roles)
        if remaining:
            raise SessionsRemainError("sessions of revoked logins have not ended yet; revoke again")
        return {row["role"]: _Revoked(row["outcome"], tuple(row["databases"])) for row in rows}

    async def _inspect_batch(self, roles: Sequence[str]) -> dict[str, Verification]:
        return {row["role"]: _verification(row) for row in await self._fetch(sql.INSPECT, roles)}

    async def _fetch(self, query: str, *arguments: object) -> list[asyncpg.Record]:
        async with asyncio.timeout(self._config.call_seconds), self._connection() as connection:
            return await connection.fetch(query, *arguments)

    async def _disown(self, role: str, databases: Sequence[str]) -> None:
        """Take from a disarmed role what it owns, where the installed function lets us."""
        for database in databases[:_DATABASES_MAX]:
            connection = await self._connect(database)
            try:
                await connection.execute(sql.DISOWN, role)
            except asyncpg.PostgresError as error:
                raise RevocationBlockedError(role, error.sqlstate or _OBJECTS_OWNED, [database]) from None
            finally:
                connection.terminate()

    async def _can_disown(self, database: str) -> bool:
        try:
            async with asyncio.timeout(self._config.call_seconds):
                connection = await self._connect(database)
                try:
                    allowed = await connection.fetchval(
                        "SELECT pg_catalog.has_function_privilege('nhi.disown(text)', 'EXECUTE')"
                    )
                finally:
                    connection.terminate()
        except (asyncpg.PostgresError, *_CONNECTION_TROUBLE):
            return False
        return allowed is True

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[asyncpg.pool.PoolConnectionProxy[asyncpg.Record]]:
        pool = await self._opened_pool()
        connection = await pool.acquire()
        try:
            yield connection
        except asyncpg.PostgresError:
            raise  # the server answered: the connection is in step and may be used again
        except BaseException:
            # Timed out, cancelled or broken: what it still carries is unknown. Never reused.
            connection.terminate()
            raise
        finally:
            await pool.release(connection)

    async def _opened_pool(self) -> asyncpg.Pool[asyncpg.Record]:
        if self._pool is None:
            config = self._config
            # No connection is made here, so no other call runs between test and assignment.
            self._pool = asyncpg.create_pool(
                host=config.host,
                port=config.port,
                database=config.fence_database,
                user=config.broker_user,
                password=config.password,
                ssl=config.ssl_context(),
                timeout=config.connect_timeout_seconds,
                server_settings=_session_settings(config),
                min_size=0,
                max_size=config.pool_size,
                reset=_keep_as_it_is,
            )
        return await self._pool

    async def _connect(self, database: str) -> asyncpg.Connection[asyncpg.Record]:
        config = self._config
        return await asyncpg.connect(
            host=config.host,
            port=config.port,
            database=database,
            user=config.broker_user,
            password=config.password,
            ssl=config.ssl_context(),
            timeout=config.connect_timeout_seconds,
            server_settings=_session_settings(config),
        )


def from_settings(*, instance: InstanceTag, **settings: object) -> PostgresAdapter:
    """Build the adapter from configuration.

    Raises:
        ValueError: naming every setting that is wrong, never its value.

    """
    try:
        config = PostgresConfig.model_validate({"instance": instance, **settings})
    except ValidationError as error:
        raise ValueError("; ".join(faults(error))) from None
    return PostgresAdapter(config)


def _session_settings(config: PostgresConfig) -> dict[str, str]:
    """What bounds every statement on the server's side, whatever becomes of us."""
    return {
        "application_name": f"nhi-broker {config.instance}",
        "statement_timeout": f"{int(config.statement_timeout_seconds * 1000)}ms",
        "lock_timeout": f"{int(config.lock_timeout_seconds * 1000)}ms",
        "idle_in_transaction_session_timeout": f"{int(config.statement_timeout_seconds * 1000)}ms",
        "default_transaction_isolation": "read committed",
        "client_min_messages": "error",
    }


async def _keep_as_it_is(_connection: object) -> None:
    """Instead of asyncpg's reset query: our statements leave no session state, so it would only cost."""


def _of_one_item(error: Exception) -> bool:
    """Whether a batch may have failed for one of its items; a lost connection fails them all."""
    return isinstance(error, asyncpg.PostgresError | SessionsRemainError)


def _verification(row: asyncpg.Record) -> Verification:
    sessions = row["sessions"]
    alive = row["role_exists"] is True or sessions != 0
    fenced = row["tombstone_ms"] is not None
    evidence: dict[str, str | int | bool] = {
        "role": str(row["role"]),
        "role_exists": row["role_exists"] is True,
        "can_login": row["can_login"] is True,
        "sessions": int(str(sessions)),
        "fenced": fenced,
        "checked_at": _rfc3339(row["checked_ms"]),
    }
    if fenced:
        evidence["tombstone_at"] = _rfc3339(row["tombstone_ms"])
    if alive:
        return Verification(presence=Presence.PRESENT, evidence=evidence)
    return Verification(presence=Presence.ABSENT if fenced else Presence.UNKNOWN, evidence=evidence)


def _rfc3339(at_ms: object) -> str:
    at = datetime.fromtimestamp(int(str(at_ms)) / 1000, tz=UTC)
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
