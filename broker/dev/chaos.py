"""Killing the broker over and over under load, then using every credential it ever gave out.

The invariants, checked by use and not by reading catalogs: every credential that a caller
received, and every login that exists in the target, has a row in the ledger; and once the
kills are over and its task has ended, none of them works.
"""

from __future__ import annotations

import asyncio
import random
import ssl
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import asyncpg
import httpx

from broker.core.lease import TERMINAL, LeaseState
from broker.dev.broker_child import BrokerChild
from broker.dev.environment import DevParts, write_settings
from broker.dev.reports_api import REPORTS_API
from inventory.store import engine
from nhi_sdk import AsyncBroker, NhiError, RetryPolicy

if TYPE_CHECKING:
    from collections.abc import Callable

    from nhi_sdk import Credential

AGENTS: Final = (
    "spiffe://dev.nhi.internal/agent/churn-report",
    "spiffe://dev.nhi.internal/agent/churn-report",
    "spiffe://dev.nhi.internal/agent/churn-report",
    "spiffe://dev.nhi.internal/agent/churn-report",
)
DRAIN_SECONDS_MAX: Final = 180
LOGINS_AT_ONCE: Final = 8
TASK_LEASES: Final = 6


@dataclass(slots=True)
class Report:
    """What a run found; all that matters is that `unknown` and `outlived` are zero."""

    mints: int = 0
    kills: int = 0
    unknown: int = 0
    outlived: int = 0
    undrained: int = 0
    details: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether nothing was lost and nothing outlived its end."""
        return self.unknown == 0 and self.outlived == 0 and self.undrained == 0 and self.mints > 0

    def summary(self) -> str:
        """Return the line that a run ends with."""
        return (
            f"chaos: mints {self.mints}, kills {self.kills}, unknown {self.unknown}, outlived {self.outlived}"
        )


class Chaos:
    """One run: load, kills, drain, and the check by use."""

    def __init__(self, parts: DevParts, *, kills: int, seed: int, tell: Callable[[str], None]) -> None:
        self._parts = parts
        self._kills = kills
        self._random = random.Random(seed)  # noqa: S311  a reproducible schedule, not a secret
        self._tell = tell
        self._held: list[Credential] = []
        self._stopping = asyncio.Event()
        self._client: httpx.AsyncClient | None = None
        self._config = parts.directory / "broker.toml"
        self.report = Report()

    async def run(self) -> Report:
        """Run it and return what was found."""
        write_settings(self._parts.settings, self._config)
        child = BrokerChild(self._parts.settings, self._config, self._parts.directory / "broker.log")
        await child.start()
        agents = [asyncio.create_task(self._agent(spiffe_id)) for spiffe_id in AGENTS]
        try:
            await self._kill_over_and_over(child)
            self._stopping.set()
            await asyncio.gather(*agents)
            await self._drain()
            await self._check_by_use()
        finally:
            self._stopping.set()
            for agent in agents:
                agent.cancel()
            await asyncio.gather(*agents, return_exceptions=True)
            await self.close()
            await child.stop()
        self._check_ledger_knows_all()
        return self.report

    async def _kill_over_and_over(self, child: BrokerChild) -> None:
        for number in range(1, self._kills + 1):
            await asyncio.sleep(self._random.uniform(0.05, 0.6))
            await child.kill()
            await child.start()
            self.report.kills = number
            if number % 10 == 0:
                self._tell(f"{number} kills, {len(self._held)} credentials received")

    # --- load ----------------------------------------------------------------------------------

    async def _agent(self, spiffe_id: str) -> None:
        """Open tasks and ask for credentials until told to stop; failures are part of the run."""
        environ = self._parts.agent_environment(spiffe_id)
        retry = RetryPolicy(attempts_max=2, deadline_seconds=5)
        async with AsyncBroker.from_env(environ, retry=retry) as broker:
            while not self._stopping.is_set():
                try:
                    await self._one_task(broker)
                except NhiError:
                    await asyncio.sleep(0.02)  # the broker is being killed: try again

    async def _one_task(self, broker: AsyncBroker) -> None:
        task = await broker.open_task("churn-report")
        for _ in range(TASK_LEASES):
            if self._stopping.is_set():
                break
            resource, action = self._random.choice([("orders-db", "read"), ("reports-api", "write")])
            self._held.append(
                await task.request(resource, action, tool="chaos", reason="a credential to be killed")
            )
        if self._random.random() < 0.7:  # noqa: PLR2004  the others are left to their deadline
            await task.end(wait=0)

    # --- afterwards ----------------------------------------------------------------------------

    async def _drain(self) -> None:
        """End every task as an operator would, and wait until no lease is under way."""
        transport = httpx.AsyncHTTPTransport(uds=str(self._parts.operator_socket))
        async with httpx.AsyncClient(transport=transport, base_url="http://operator") as operator:
            for spiffe_id in sorted(set(AGENTS)):
                answer = await operator.post(
                    "/kill", json={"identity": spiffe_id, "reason": "end of the chaos run"}, timeout=60
                )
                answer.raise_for_status()
            for _ in range(DRAIN_SECONDS_MAX * 4):
                if not self._under_way():
                    return
                await asyncio.sleep(0.25)
        self.report.undrained = len(self._under_way())
        self.report.details.append(f"not drained: {self._under_way()[:5]}")

    def _under_way(self) -> list[tuple[Any, ...]]:
        marks = ", ".join("?" for _ in TERMINAL)
        return self._query(f"SELECT id, state FROM leases WHERE state NOT IN ({marks})", *sorted(TERMINAL))  # noqa: S608  marks only

    def _query(self, sql: str, *parameters: str) -> list[tuple[Any, ...]]:
        connection = engine.open_for_reading(self._parts.settings.ledger.path)
        try:
            return connection.execute(sql, parameters).fetchall()
        finally:
            connection.close()

    async def _check_by_use(self) -> None:
        """Use every credential that was ever received."""
        self.report.mints = self._query("SELECT count(*) FROM leases")[0][0]
        self._tell(f"using {len(self._held)} credentials received, of {self.report.mints} leases")
        gate = asyncio.Semaphore(LOGINS_AT_ONCE)

        async def used(credential: Credential) -> bool:
            async with gate:
                return await self.works(credential)

        alive = await asyncio.gather(*(used(credential) for credential in self._held))
        for credential, works in zip(self._held, alive, strict=True):
            if works:
                self.report.outlived += 1
                self.report.details.append(f"outlived: {credential.lease_id}")

    async def works(self, credential: Credential) -> bool:
        """Use a credential and say whether it works."""
        if credential.resource == "orders-db":
            return await _login_works(credential)
        return await self._token_works(credential)

    async def _token_works(self, credential: Credential) -> bool:
        domain = self._parts.trust_domain
        svid = domain.issue_jwt_svid(REPORTS_API, self._parts.settings.identity.audience)
        if self._client is None:
            trust = ssl.create_default_context(cadata=domain.x509_bundle())
            self._client = httpx.AsyncClient(base_url=self._parts.broker_url, verify=trust, timeout=30)
        answer = await self._client.post(
            "/oauth2/introspect",
            data={"token": credential.token.access_token},
            headers={"Authorization": f"Bearer {svid}"},
        )
        answer.raise_for_status()
        return answer.json()["active"] is True

    async def close(self) -> None:
        """Close the connections that credentials were used over."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    def _check_ledger_knows_all(self) -> None:
        """Every credential received has a row, and ended in a state that claims no more than was proven."""
        rows = dict(self._query("SELECT id, state FROM leases"))
        for credential in self._held:
            state = rows.get(credential.lease_id)
            if state is None:
                self.report.unknown += 1
                self.report.details.append(f"unknown to the ledger: {credential.lease_id}")
            elif state not in {LeaseState.REVOKED, LeaseState.EXPIRED}:
                self.report.details.append(f"ended as {state}: {credential.lease_id}")


async def count_unknown_logins(parts: DevParts) -> list[str]:
    """Return logins of ours that exist in the target without a live row in the ledger."""
    connection = await parts.postgres.connect()
    try:
        roles = await connection.fetch("SELECT rolname FROM pg_roles WHERE rolname ~ '^nhi_[a-z2-7]{6}_'")
    finally:
        await connection.close()
    return [row["rolname"] for row in roles]


async def run_chaos(*, kills: int, seed: int, tell: Callable[[str], None]) -> Report:
    """Start the parts, run the chaos, and look for logins that nothing accounts for."""
    async with DevParts() as parts:
        chaos = Chaos(parts, kills=kills, seed=seed, tell=tell)
        report = await chaos.run()
        left = await count_unknown_logins(parts)
        report.unknown += len(left)
        report.details += [f"login left in the target: {name}" for name in left]
        return report


async def _login_works(credential: Credential) -> bool:
    login = credential.login
    try:
        connection = await asyncpg.connect(
            host=login.host,
            port=login.port,
            database=login.database,
            user=login.username,
            password=login.password,
            ssl=False,
            timeout=30,
        )
    except (asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InvalidPasswordError):
        return False
    await connection.close()
    return True
