"""Settings of one PostgreSQL backend, and the recipe the catalog gives it."""

from __future__ import annotations

import math
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    ValidationError,
    model_validator,
)

from broker.core.ids import InstanceTag, MalformedIdError
from broker.core.secret import Secret

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

MARGIN_SECONDS: Final = 5
"""Added to the timeouts where a bound on what may still be in flight is computed."""

SslMode = Literal["disable", "require", "verify-full"]
PositiveSeconds = Annotated[float, Field(gt=0, le=120)]
Port = Annotated[int, Field(ge=1, le=65535)]
# 63 bytes is NAMEDATALEN - 1; a control character in a name serves nobody but an attacker of logs.
Name = Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[^\x00-\x1f\x7f]+$")]


def _parse_tag(value: object) -> InstanceTag:
    if isinstance(value, str):
        try:
            return InstanceTag.parse(value)
        except MalformedIdError as error:
            raise ValueError(str(error)) from None
    raise ValueError("an instance tag is a text")


class PostgresConfig(BaseModel):
    """One PostgreSQL cluster in which logins are minted.

    Attributes:
        name: the backend's name, as the catalog refers to it.
        instance: the tag in the names of our roles.
        host, port: where the broker connects; directly, never through a pooler.
        client_host, client_port, client_sslmode: what the credential tells its user, where that
            differs from the broker's own way in.
        sslmode: ``disable`` only for a server on the same host or in tests.
        ca_file: PEM file the server's certificate is checked with; None takes the system's.
        fence_database: the database with the installed functions, closed to everyone else.
        broker_user: the login that may execute them.
        broker_password, password_file: exactly one of both; the file is read at every connect,
            so a rotated password needs no restart.
        connect_timeout_seconds, statement_timeout_seconds, lock_timeout_seconds: the bounds that
            `Capabilities.t_inflight_seconds` is computed from.
        pool_size: connections of this process at most.
        batch_max: leases revoked or inspected in one call at most.

    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    instance: Annotated[InstanceOf[InstanceTag], BeforeValidator(_parse_tag)]
    host: Annotated[str, Field(min_length=1, max_length=253)]
    port: Port = 5432
    client_host: Annotated[str, Field(min_length=1, max_length=253)] | None = None
    client_port: Port | None = None
    client_sslmode: SslMode | None = None
    sslmode: SslMode = "verify-full"
    ca_file: Path | None = None
    fence_database: Name = "nhi_fence"
    broker_user: Name = "nhi_broker"
    broker_password: InstanceOf[Secret] | None = None  # type: ignore[type-arg]  # isinstance takes no parameter
    password_file: Path | None = None
    connect_timeout_seconds: PositiveSeconds = 5
    statement_timeout_seconds: PositiveSeconds = 10
    lock_timeout_seconds: PositiveSeconds = 2
    pool_size: Annotated[int, Field(ge=4, le=200)] = 8
    batch_max: Annotated[int, Field(ge=1, le=100)] = 50

    @model_validator(mode="after")
    def _one_password(self) -> Self:
        if (self.broker_password is None) == (self.password_file is None):
            raise ValueError("give either broker_password or password_file")
        # One revocation may meet three locks and must still have time to say which it met.
        if self.lock_timeout_seconds * 4 > self.statement_timeout_seconds:
            raise ValueError("lock_timeout_seconds must be at most a quarter of statement_timeout_seconds")
        return self

    def password(self) -> str:
        """Return the broker's own password; raises OSError where its file cannot be read."""
        if self.broker_password is not None:
            return str(self.broker_password.reveal())
        assert self.password_file is not None  # noqa: S101  the validator above saw to it
        return self.password_file.read_text("utf-8").rstrip("\r\n")

    def ssl_context(self) -> ssl.SSLContext | Literal[False]:
        """Return what a connection to this server is secured with."""
        if self.sslmode == "disable":
            return False
        context = ssl.create_default_context(cafile=self.ca_file)
        if self.sslmode == "require":
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context

    @property
    def call_seconds(self) -> float:
        """Total deadline of one call: connect, run one statement, and one second for ourselves."""
        return self.connect_timeout_seconds + self.statement_timeout_seconds + 1

    @property
    def t_inflight_seconds(self) -> int:
        """The longest a mint can take effect after its call was given up."""
        bounds = self.connect_timeout_seconds + self.statement_timeout_seconds + self.lock_timeout_seconds
        return math.ceil(bounds) + MARGIN_SECONDS


class RecipeError(ValueError):
    """A catalog recipe this adapter cannot follow; nothing was asked of the backend."""


class PostgresRecipe(BaseModel):
    """What the catalog says of one action.

    Attributes:
        database: where the login works.
        group: the role whose rights it gets, by membership.
        connection_limit: connections the login may hold at once.

    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    database: Name
    group: Name
    connection_limit: Annotated[int, Field(ge=1, le=100)] = 2

    @classmethod
    def parse(cls, recipe: Mapping[str, object]) -> Self:
        """Return the recipe, or raise `RecipeError` with every fault in it."""
        try:
            return cls.model_validate(dict(recipe))
        except ValidationError as error:
            raise RecipeError("; ".join(faults(error))) from None


def faults(error: ValidationError) -> list[str]:
    """Return one sentence per fault, without the values."""
    return [
        f"{'.'.join(str(part) for part in fault['loc']) or 'all'}: {fault['msg']}"
        for fault in error.errors(include_url=False, include_input=False, include_context=False)
    ]
