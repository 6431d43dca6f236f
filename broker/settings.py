"""One frozen settings object, from a TOML file and the environment.

Precedence: environment (``NHI_<SECTION>__<NAME>``), then the file. Unknown keys are
refused. No default is insecure: what only development may do has to be asked for with
``mode = "development"``, and production refuses it (`production_problems`).
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

Port = Annotated[int, Field(ge=0, le=65535)]
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


class SettingsError(ValueError):
    """The settings cannot be used; `problems` says everything that is wrong, a sentence each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Ledger(_Section):
    """Where the ledger lives: one SQLite file, whose directory only the broker may read."""

    path: Path


class Keys(_Section):
    """The key store: one file with mode 0600, outside the ledger's database."""

    path: Path


class Audit(_Section):
    """Where signed heads are copied to: another disk, or better another machine's mount."""

    copy_directory: Path
    sign_every_seconds: Annotated[float, Field(gt=0, le=60)] = 1.0


class Policy(_Section):
    """Policies, schema, catalog, identities and cases."""

    directory: Path


class Identity(_Section):
    """The broker's own SVID, and whose SVIDs it accepts.

    Attributes:
        workload_api_socket: SPIRE's (or the embedded) Workload API, ``unix:///…``; gives
            the server certificate and the bundles.
        spiffe_id: which SVID to take where the socket offers several.
        bundles: trust domain to SPIFFE bundle file, beside or instead of the socket.
        certificate, key: PEM files of the server certificate, where there is no socket.
        audience: what a JWT-SVID for this broker must name as its only audience.

    """

    workload_api_socket: str | None = None
    spiffe_id: str | None = None
    bundles: dict[str, Path] = Field(default_factory=dict)
    certificate: Path | None = None
    key: Path | None = None
    audience: Annotated[str, Field(min_length=1, max_length=2048)]

    @model_validator(mode="after")
    def _has_a_certificate(self) -> Self:
        if self.workload_api_socket is None and (self.certificate is None or self.key is None):
            raise ValueError("set workload_api_socket, or certificate and key")
        if self.workload_api_socket is None and not self.bundles:
            raise ValueError("set workload_api_socket, or bundles: without one nobody can authenticate")
        return self


class Workload(_Section):
    """The listener for agents, OAuth clients and resource servers."""

    host: str = "127.0.0.1"
    port: Port = 8443
    issuer: Annotated[str, Field(pattern=r"^https://[^?#\s]+[^/?#\s]$", max_length=512)]
    token_algorithm: Literal["ES256", "EdDSA", "RS256"] = "ES256"  # noqa: S105  a name, not a password
    token_ttl_seconds_max: Annotated[int, Field(ge=1, le=3600)] = 3600


class Operator(_Section):
    """The operators' Unix socket; who may open the file may operate."""

    socket: Path


class Ops(_Section):
    """Probes and metrics."""

    host: str = "127.0.0.1"
    port: Port = 8444


class Limits(_Section):
    """Bounds an operator may tune."""

    require_owner: bool = True
    history_window_seconds: Annotated[int, Field(ge=60, le=30 * 86400)] = 86400
    mint_deadline_seconds: Annotated[int, Field(ge=1, le=120)] = 20
    open_tasks_max: Annotated[int, Field(ge=1, le=100_000)] = 1000
    requests_per_second: Annotated[float, Field(gt=0, le=1_000_000)] = 500
    request_burst: Annotated[int, Field(ge=1, le=1_000_000)] = 1000
    concurrent_per_identity: Annotated[int, Field(ge=1, le=10_000)] = 64
    concurrent_total: Annotated[int, Field(ge=1, le=10_000)] = 512
    sweep_tick_seconds: Annotated[float, Field(gt=0, le=60)] = 1.0
    shutdown_seconds: Annotated[int, Field(ge=1, le=300)] = 20


class Jobs(_Section):
    """Periodic work."""

    scan_every_seconds: Annotated[int, Field(ge=10, le=86400)] = 3600
    scan_at_start: bool = True


class Settings(BaseSettings):
    """Everything the broker is told from outside."""

    model_config = SettingsConfigDict(
        env_prefix="NHI_",
        env_nested_delimiter="__",
        frozen=True,
        extra="forbid",
        nested_model_default_partial_update=True,
    )

    mode: Literal["production", "development"] = "production"
    ledger: Ledger
    keys: Keys
    audit: Audit
    policy: Policy
    identity: Identity
    workload: Workload
    operator: Operator
    ops: Ops = Ops()
    limits: Limits = Limits()
    jobs: Jobs = Jobs()
    backends: list[dict[str, Any]] = Field(min_length=1, max_length=64)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Let the environment win over the file, which arrives as init values; read nothing else."""
        del settings_cls, dotenv_settings, file_secret_settings
        return env_settings, init_settings

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the file and the environment.

        Raises:
            SettingsError: everything that is wrong, without repeating a value.

        """
        try:
            document = tomllib.loads(path.read_text("utf-8"))
        except OSError as error:
            raise SettingsError([f"The settings file {path} cannot be read: {error.strerror}."]) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise SettingsError([f"The settings file {path} is not TOML: {error}."]) from error
        try:
            return cls(**document)
        except ValidationError as error:
            raise SettingsError(
                [f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors()]
            ) from None


def production_problems(settings: Settings) -> list[str]:
    """Return every development shortcut that production refuses, a sentence each."""
    if settings.mode == "development":
        return []
    problems = []
    ledger_directory = settings.ledger.path.resolve().parent
    copy_directory = settings.audit.copy_directory.resolve()
    if copy_directory == ledger_directory or ledger_directory in copy_directory.parents:
        problems.append(
            "audit.copy_directory lies inside the ledger's directory: whoever can cut the log's tail could "
            "cut the copy too. Put it on another disk or machine."
        )
    if settings.keys.path.resolve().parent == ledger_directory:
        problems.append(
            "keys.path lies beside the ledger: a stolen backup would hold both. Give the keys a directory "
            "of their own."
        )
    if not settings.limits.require_owner:
        problems.append(
            "limits.require_owner is off: in production an identity without an owner gets nothing."
        )
    if settings.ops.host not in LOOPBACK:
        problems.append("ops.host is not loopback: probes and metrics are not authenticated.")
    problems += [
        f"backends: kind {backend.get('kind')!r} is for tests and development only."
        for backend in settings.backends
        if backend.get("kind") == "fake"
    ]
    for backend in settings.backends:
        problems += _unverified_tls(backend)
    return problems


def _unverified_tls(backend: dict[str, Any]) -> list[str]:
    """Return what is wrong with how the broker, and those it gives logins to, reach a database."""
    return [
        f"backends: {backend.get('name')!r} has {mode} = {backend[mode]!r} for another host, which anybody "
        "on the way could impersonate. Set it to verify-full."
        for mode, host in (("sslmode", "host"), ("client_sslmode", "client_host"))
        if backend.get(mode) in {"disable", "require"}
        and backend.get(host, backend.get("host")) not in LOOPBACK
    ]
