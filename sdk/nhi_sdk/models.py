"""What the broker answers, as frozen values.

Answers may grow fields that this version does not know; they are ignored. Secrets are
in no ``repr``. Times are aware datetimes in UTC.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from nhi_sdk._psycopg import Connections
from nhi_sdk.bearer import BearerAuth

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    import psycopg


class LeaseState(StrEnum):
    """Where one credential stands between the intent to mint it and the proof of its end."""

    INTENT = "intent"
    PREPARED = "prepared"
    ACTIVE = "active"
    REVOKE_PENDING = "revoke_pending"
    VERIFYING = "verifying"
    REVOKED = "revoked"
    FAILED = "failed"
    EXPIRED = "expired"
    HANDED_OUT = "handed_out"
    ABANDONED = "abandoned"


_ENDED: Final = frozenset(
    {
        LeaseState.REVOKED,
        LeaseState.FAILED,
        LeaseState.EXPIRED,
        LeaseState.HANDED_OUT,
        LeaseState.ABANDONED,
    }
)
_PROVEN: Final = frozenset(
    {LeaseState.REVOKED, LeaseState.FAILED}
)  # EXPIRED was not seen dead, only outlived


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The policy decision behind a credential."""

    id: str
    policy_ids: tuple[str, ...]
    policy_hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PostgresLogin:
    """A PostgreSQL login that lives as long as its lease."""

    host: str
    port: int
    database: str
    username: str
    password: str = field(repr=False)
    sslmode: str

    def parameters(self) -> dict[str, str]:
        """Return libpq's connection parameters, the password among them."""
        return {
            "host": self.host,
            "port": str(self.port),
            "dbname": self.database,
            "user": self.username,
            "password": self.password,
            "sslmode": self.sslmode,
        }

    def conninfo(self) -> str:
        """Return a libpq connection string. It holds the password: keep it out of logs and argv."""
        return " ".join(f"{name}={_quoted(value)}" for name, value in self.parameters().items())

    def env(self) -> dict[str, str]:
        """Return the variables that psql and everything else on libpq reads."""
        return {
            "PGHOST": self.host,
            "PGPORT": str(self.port),
            "PGDATABASE": self.database,
            "PGUSER": self.username,
            "PGPASSWORD": self.password,
            "PGSSLMODE": self.sslmode,
        }


def _quoted(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessToken:
    """A bearer token that introspects as inactive from the moment its lease ends.

    Attributes:
        expires_in: seconds from the answer to its native expiry.

    """

    access_token: str = field(repr=False)
    token_type: str
    issuer: str
    audience: str
    expires_in: int

    def env(self) -> dict[str, str]:
        """Return the token as ``NHI_TOKEN``."""
        return {"NHI_TOKEN": self.access_token}

    def httpx_auth(self) -> BearerAuth:
        """Return an httpx authentication that sends the token."""
        return BearerAuth(self.access_token)


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherSecret:
    """A kind of credential this version of the SDK has no type for.

    Attributes:
        fields: everything the broker sent; which of them are secret is unknown, so all are treated so.

    """

    kind: str
    fields: Mapping[str, Any] = field(repr=False)


Secret: TypeAlias = PostgresLogin | AccessToken | OtherSecret


@dataclass(frozen=True, slots=True, kw_only=True)
class Credential:
    """A credential just issued: its lease and its secret.

    Attributes:
        secret: typed by what was asked for.
        revocability: how soon an end takes hold, e.g. ``immediate`` or ``expiry_only``.

    """

    lease_id: str
    task_id: str
    resource: str
    action: str
    state: str
    secret: Secret
    issued_at: datetime
    expires_at: datetime
    renewable: bool
    revocability: str
    decision: Decision
    _connections: Connections = field(default_factory=Connections, repr=False, compare=False)

    @property
    def login(self) -> PostgresLogin:
        """The PostgreSQL login.

        Raises:
            TypeError: this credential is of another kind.

        """
        if not isinstance(self.secret, PostgresLogin):
            raise self._not("a PostgreSQL login")
        return self.secret

    @property
    def token(self) -> AccessToken:
        """The access token.

        Raises:
            TypeError: this credential is of another kind.

        """
        if not isinstance(self.secret, AccessToken):
            raise self._not("an access token")
        return self.secret

    def connect(self, **options: Any) -> psycopg.Connection[Any]:  # noqa: ANN401  psycopg's own options
        """Open a psycopg connection with this login; it is closed when the credential's block ends.

        Args:
            options: passed to ``psycopg.connect``.

        Raises:
            MissingExtra: psycopg is not installed.
            TypeError: not a PostgreSQL login.

        """
        return self._connections.open(self.login.parameters(), options)

    async def aconnect(self, **options: Any) -> psycopg.AsyncConnection[Any]:  # noqa: ANN401  as above
        """Open an asyncio psycopg connection; it is closed when the credential's block ends.

        Raises:
            MissingExtra: psycopg is not installed.
            TypeError: not a PostgreSQL login.

        """
        return await self._connections.aopen(self.login.parameters(), options)

    def conninfo(self) -> str:
        """Return a libpq connection string. It holds the password: keep it out of logs and argv."""
        return self.login.conninfo()

    def env(self) -> dict[str, str]:
        """Return the variables a program reads this credential from.

        Raises:
            TypeError: this kind of credential has no customary variables.

        """
        if isinstance(self.secret, OtherSecret):
            raise self._not("something with customary variables")
        return self.secret.env()

    def httpx_auth(self) -> BearerAuth:
        """Return an httpx authentication that sends the access token."""
        return self.token.httpx_auth()

    def close(self) -> None:
        """Close connections opened by `connect`. Idempotent; does not end the lease."""
        self._connections.close()

    async def aclose(self) -> None:
        """Close connections opened by `connect` and `aconnect`. Idempotent; does not end the lease."""
        await self._connections.aclose()

    def _not(self, wanted: str) -> TypeError:
        kind = self.secret.kind if isinstance(self.secret, OtherSecret) else type(self.secret).__name__
        return TypeError(f"the credential for {self.resource} is not {wanted} (it is: {kind})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The broker's record of one credential; holds no secret.

    Attributes:
        state: one of `LeaseState`, or a word a newer broker knows.
        cause: why it last moved.
        stuck: whether its revocation keeps failing and an operator was told.
        evidence: what verification saw when the credential was proven dead.

    """

    lease_id: str
    task_id: str
    resource: str
    action: str
    adapter: str
    state: str
    cause: str | None
    issued_at: datetime | None
    expires_at: datetime | None
    ended_at: datetime | None
    revocability: str
    stuck: bool
    evidence: Mapping[str, Any] | None

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state in _ENDED

    @property
    def proven_dead(self) -> bool:
        """Whether the broker saw that the credential no longer works, or that it never did."""
        return self.state in _PROVEN


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A unit of work; everything issued under it dies with it."""

    task_id: str
    state: str
    purpose: str
    description: str
    resources: tuple[str, ...]
    actions: tuple[str, ...]
    classification_max: str | None
    budget_leases: int | None
    leases_issued: int
    inline: bool
    opened_at: datetime
    deadline_at: datetime
    ended_at: datetime | None
    end_cause: str | None

    @property
    def ended(self) -> bool:
        """Whether the task has ended."""
        return self.state == "ended"


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskEnd:
    """The end of a task, with what is known of each of its leases.

    Attributes:
        settled: whether every lease has reached its end; False means "not yet", and the
            broker goes on by itself.

    """

    task: Task
    leases: tuple[Lease, ...]
    settled: bool

    @property
    def proven(self) -> bool:
        """Whether every credential of the task is proven dead."""
        return self.settled and all(lease.proven_dead for lease in self.leases)

    @property
    def unproven(self) -> tuple[Lease, ...]:
        """The leases whose credential is not, or not yet, proven dead."""
        return tuple(lease for lease in self.leases if not lease.proven_dead)


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogItem:
    """One action on one resource that this caller may ask for."""

    resource: str
    action: str
    title: str
    effect: str
    classification: str
    environment: str
    owner: str
    kind: str
    ttl_seconds_default: int | None
    ttl_seconds_max: int | None
    revocability: str
