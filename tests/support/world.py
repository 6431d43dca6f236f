"""A whole broker without HTTP: real ledger, real policy, real keys, a backend with faults on demand."""

from __future__ import annotations

import shutil
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import yaml

from adapters.fake import FakeAdapter, FakeServer
from adapters.jwt_issuer import JwtIssuer
from broker.core.caller import AuthMethod, Caller
from broker.core.clock import ManualClock
from broker.core.facts import Intent
from broker.core.spiffe_id import SpiffeId
from broker.core.telemetry import SilentTelemetry
from broker.keys.file_store import FileKeyStore
from broker.policy.catalog import Catalog
from broker.policy.engine import PolicyEngine
from broker.policy.registrations import Registrations
from broker.service.backends import Backend, Backends
from broker.service.context import Context
from broker.service.issue import CredentialRequest, Issued
from broker.service.known import KnownFacts
from broker.service.limits import Limits
from broker.service.services import Services
from broker.service.tasks import TaskSpec
from inventory.idempotency import IdempotencyKey
from inventory.store.store import Store

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from broker.core.task import Task

POLICIES = Path(__file__).parents[2] / "policies"
ISSUER = "https://broker.test"
CHURN = SpiffeId("spiffe://dev.nhi.internal/agent/churn-report")
SUPPORT = SpiffeId("spiffe://dev.nhi.internal/agent/support-bot")
STRANGER = SpiffeId("spiffe://dev.nhi.internal/agent/unheard-of")
REPORTS_API = SpiffeId("spiffe://dev.nhi.internal/tool/reports-api")
CHURN_OWNER = "mara.lindqvist@example.com"


def policies_for_fakes(directory: Path) -> Path:
    """Copy the shipped policies, with recipes that the backend in memory takes."""
    copy = directory / "policies"
    shutil.copytree(POLICIES, copy, dirs_exist_ok=True)
    catalog = yaml.safe_load((copy / "catalog.yaml").read_text())
    for resource in catalog["resources"].values():
        for name, action in resource["actions"].items():
            if action["adapter"] != "tokens":
                action["recipe"] = {"scope": name}
    (copy / "catalog.yaml").write_text(yaml.safe_dump(catalog))
    return copy


def caller(spiffe_id: SpiffeId) -> Caller:
    return Caller(
        spiffe_id=spiffe_id,
        method=AuthMethod.JWT_SVID,
        not_after_ms=2**50,
        bundle_generation=1,
        svid_digest="00" * 32,
    )


@dataclass
class World:
    directory: Path
    clock: ManualClock
    store: Store
    services: Services
    server: FakeServer
    keys: FileKeyStore

    @property
    def ctx(self) -> Context:
        return self.services.ctx

    @classmethod
    def build(
        cls,
        directory: Path,
        *,
        clock: ManualClock | None = None,
        server: FakeServer | None = None,
        limits: Limits | None = None,
        two_step: bool = False,
    ) -> Self:
        """Open a broker on `directory`; the same directory and server again is a restart."""
        clock = clock or ManualClock()
        server = server or FakeServer(clock)
        limits = limits or Limits(require_owner=True, mint_deadline_seconds=20)
        keys = FileKeyStore(directory / "keys.json", clock)
        store = Store.open(directory / "ledger" / "ledger.db", keys)
        policies = policies_for_fakes(directory)
        catalog = Catalog.load(policies / "catalog.yaml")
        recipes = catalog.recipes_by_adapter()
        backends = [
            Backend(
                FakeAdapter(name=name, instance=store.instance, server=server, two_step=two_step),
                "fake",
                recipes[name],
                clock,
                limits,
            )
            for name in recipes
            if name != "tokens"
        ]
        tokens = JwtIssuer(name="tokens", issuer=ISSUER, keys=keys, status_lists=f"{ISSUER}/statuslists")
        backends.append(Backend(tokens, "jwt_issuer", recipes["tokens"], clock, limits))
        ctx = Context(
            store=store,
            clock=clock,
            keys=keys,
            policy=PolicyEngine.load(
                policies, catalog, revocability={backend.name: "immediate" for backend in backends}
            ),
            catalog=catalog,
            backends=Backends(backends),
            telemetry=SilentTelemetry(),
            limits=limits,
            known=KnownFacts(store),
            registrations=Registrations.load(policies / "identities.yaml"),
        )
        services = Services.build(ctx, issuer=ISSUER, token_algorithm="ES256")
        return cls(directory, clock, store, services, server, keys)

    async def close(self) -> None:
        await self.services.sweeper.close()
        await self.store.close()

    # --- what a test says -----------------------------------------------------------------------

    async def open_task(
        self, who: SpiffeId = CHURN, *, purpose: str = "churn-report", **more: object
    ) -> Task:
        me = caller(who)
        facts = await self.services.admission.admit(me)
        return await self.services.tasks.open(me, facts, TaskSpec(purpose=purpose, **more))  # type: ignore[arg-type]  # test shorthand

    async def ask(
        self,
        task: Task | TaskSpec,
        resource: str = "orders-db",
        action: str = "read",
        *,
        who: SpiffeId = CHURN,
        ttl_seconds: int | None = None,
        key: str | None = None,
        request_hash: str = "h1",
        reason: str = "churn by plan",
    ) -> Issued:
        me = caller(who)
        facts = await self.services.admission.admit(me)
        request = CredentialRequest(
            task=task if isinstance(task, TaskSpec) else task.id,
            resource=resource,
            action=action,
            intent=Intent(tool="sql.query", reason=reason),
            ttl_seconds=ttl_seconds,
        )
        presented = None
        if key is not None:
            presented = IdempotencyKey(me.spiffe_id, "credentials/request", key, request_hash)
        return await self.services.issue.request(me, facts, request, presented)

    async def end(self, task: Task, who: SpiffeId = CHURN) -> None:
        await self.services.tasks.end(caller(who), task.id)

    async def drain(self) -> None:
        await self.services.sweeper.drain()


@asynccontextmanager
async def opened(directory: Path, **how: object) -> AsyncIterator[World]:
    world = World.build(directory, **how)  # type: ignore[arg-type]  # test shorthand
    try:
        yield world
    finally:
        await world.close()
