"""Everything one machine needs to try the broker for real, started together and stopped together.

The embedded trust domain with its Workload API sockets, a PostgreSQL server as the target,
and a broker on SQLite. Agents, SDK and CLI take the same code paths here as with SPIRE.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from adapters.postgres import PostgresConfig, install_scripts
from broker.app import BrokerProcess
from broker.core.secret import Secret
from broker.dev.orders_db import FENCE, seed_orders
from broker.dev.postgres_server import PostgresServer
from broker.dev.trust_domain import TRUST_DOMAIN_DEFAULT, EmbeddedTrustDomain
from broker.policy.catalog import Catalog
from broker.policy.registrations import Registrations
from broker.settings import Settings
from inventory.store import engine

if TYPE_CHECKING:
    from types import TracebackType

    from broker.api.logs import AccessLog

BROKER_ID: Final = f"spiffe://{TRUST_DOMAIN_DEFAULT}/broker"
POLICIES: Final = Path(__file__).parents[2] / "policies"
BROKER_LOGIN: Final = "nhi_broker"
TARGET: Final = "orders-postgres"
_PASSWORD_BYTES: Final = 24


class DevParts:
    """The real parts around a broker, on loopback, and the settings of a broker among them.

    Args:
        state_directory: where everything lives and survives a restart; None takes a temporary
            one that is gone afterwards.
        workload_port, ops_port: 0 for free ones.
        durable: False turns off fsync in the target database only.

    """

    def __init__(
        self,
        state_directory: Path | None = None,
        *,
        workload_port: int = 0,
        ops_port: int = 0,
        durable: bool = False,
    ) -> None:
        self._given = state_directory
        self._workload_port = workload_port
        self._ops_port = ops_port
        self._durable = durable
        self._stack = AsyncExitStack()
        self.directory = Path()
        self.trust_domain: EmbeddedTrustDomain
        self.postgres: PostgresServer
        self.settings: Settings

    # --- what an agent needs ---------------------------------------------------------------------

    @property
    def broker_url(self) -> str:
        """Where agents reach the broker."""
        return self.settings.workload.issuer

    @property
    def operator_socket(self) -> Path:
        """Where operator commands reach the broker."""
        return self.settings.operator.socket

    def agent_environment(self, spiffe_id: str) -> dict[str, str]:
        """Return the variables that make the SDK and CLI work as this identity."""
        return {
            "NHI_BROKER_URL": self.broker_url,
            "NHI_AUDIENCE": self.settings.identity.audience,
            "SPIFFE_ENDPOINT_SOCKET": f"unix://{self.trust_domain.socket_for(spiffe_id)}",
        }

    # --- life ------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def _start(self) -> None:
        self.directory = self._state_directory()
        await self._start_trust_domain()
        await self._start_postgres()
        self.settings = await self._prepare_settings()

    def _state_directory(self) -> Path:
        if self._given is not None:
            directory = self._given.absolute()
            directory.mkdir(mode=0o711, parents=True, exist_ok=True)
            return directory
        directory = Path(tempfile.mkdtemp(prefix="nhi-"))
        self._stack.callback(shutil.rmtree, directory, ignore_errors=True)
        # Traversable, so that a PostgreSQL that must not be root can reach its own directory.
        directory.chmod(0o711)
        return directory

    async def _start_trust_domain(self) -> None:
        directory = self.directory / "td"
        self.trust_domain = EmbeddedTrustDomain(directory)
        self.trust_domain.register(BROKER_ID, dns_names=["localhost"], ip_addresses=["127.0.0.1"])
        catalog = Catalog.load(POLICIES / "catalog.yaml")
        for registration in Registrations.load(POLICIES / "identities.yaml", catalog=catalog):
            if registration.spiffe_id.trust_domain == TRUST_DOMAIN_DEFAULT:
                self.trust_domain.register(registration.spiffe_id)
        await self._stack.enter_async_context(self.trust_domain)

    async def _start_postgres(self) -> None:
        self.postgres = PostgresServer(self.directory / "postgres", durable=self._durable)
        await self._stack.enter_async_context(self.postgres)
        await seed_orders(self.postgres)

    async def _prepare_settings(self) -> Settings:
        """Install the adapter's functions in the target, and write down how to reach it all."""
        ledger = self.directory / "ledger" / "ledger.db"
        password_file = self.directory / "broker-password"
        if not password_file.exists():
            password_file.touch(mode=0o600)
            password_file.write_text(secrets.token_urlsafe(_PASSWORD_BYTES))
        target: dict[str, Any] = {
            "name": TARGET,
            "host": self.postgres.host,
            "port": self.postgres.port,
            "sslmode": "disable",
            "fence_database": FENCE,
            "broker_user": BROKER_LOGIN,
        }
        config = PostgresConfig(
            **target, instance=engine.prepare(ledger), broker_password=Secret(password_file.read_text())
        )
        recipes = Catalog.load(POLICIES / "catalog.yaml").recipes_by_adapter()[TARGET]
        for database, script in install_scripts(config, recipes, set_password=True).items():
            connection = await self.postgres.connect(database)
            try:
                await connection.execute(script)
            finally:
                await connection.close()
        return self._settings(ledger, {**target, "kind": "postgres", "password_file": str(password_file)})

    def _settings(self, ledger: Path, target: dict[str, Any]) -> Settings:
        sockets = self.directory / "run"
        sockets.mkdir(mode=0o700, exist_ok=True)
        port = self._workload_port or _free_port()
        return Settings.model_validate(
            {
                "mode": "development",
                "ledger": {"path": ledger},
                "keys": {"path": self.directory / "keys" / "keys.json"},
                "audit": {"copy_directory": self.directory / "audit-copy"},
                "policy": {"directory": POLICIES},
                "identity": {
                    "workload_api_socket": f"unix://{self.trust_domain.socket_for(BROKER_ID)}",
                    "spiffe_id": BROKER_ID,
                    "audience": BROKER_ID,
                },
                "workload": {"port": port, "issuer": f"https://localhost:{port}"},
                "operator": {"socket": sockets / "operator.sock"},
                "ops": {"port": self._ops_port or _free_port()},
                "backends": [target, {"kind": "jwt_issuer", "name": "tokens"}],
            }
        )


class DevEnvironment(DevParts):
    """The parts with a broker running among them, in this process."""

    def __init__(self, *arguments: Any, access_log: AccessLog | None = None, **more: Any) -> None:  # noqa: ANN401  as DevParts
        super().__init__(*arguments, **more)
        self._access_log = access_log
        self.broker: BrokerProcess

    async def _start(self) -> None:
        await super()._start()
        self.broker = BrokerProcess(self.settings, access_log=self._access_log)
        await self.broker.start()
        self._stack.push_async_callback(self.broker.stop)


def write_settings(settings: Settings, path: Path) -> None:
    """Write settings as the TOML file that `nhi serve --config` reads."""
    document = settings.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    lines = [f"mode = {json.dumps(settings.mode)}"]
    for name, section in document.items():
        if isinstance(section, dict):
            lines += [f"[{name}]", *_toml_members(section)]
    for backend in settings.backends:
        lines += ["[[backends]]", *_toml_members(backend)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _toml_members(section: dict[str, Any]) -> list[str]:
    # A JSON string, number or boolean is written the same way in TOML.
    return [
        f"{key} = {json.dumps(value)}" for key, value in section.items() if not isinstance(value, dict | list)
    ]


def _free_port() -> int:
    """Return a free loopback port: the issuer's URL must be known before the listener is bound."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def default_state_directory() -> Path:
    """Return where `nhi dev` keeps its state: below the user's runtime or cache directory."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "nhi-broker"
