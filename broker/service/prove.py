"""Proving a backend: one credential minted, used, killed and used again, on the operator's own system.

It goes through the ledger like every other mint: INTENT is durable before the backend is
called, the sweeper ends it, and if this process dies at the worst moment the next one that
opens the ledger revokes what is left. Nothing ever minted is missing from the ledger.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from broker.core.clock import MS_PER_SECOND
from broker.core.errors import BackendUnavailable, IdentityRefused, InvalidRequest, MintFailed
from broker.core.ids import LeaseId, TaskId, backend_name
from broker.core.lease import TERMINAL, Cause, Lease, LeaseState, Urgency
from broker.core.ports import (
    NATIVE_EXPIRY_MARGIN_SECONDS,
    Credential,
    ErrorClass,
    Liveness,
    MintRequest,
    Presence,
    Target,
)
from broker.core.secret import Secret
from broker.core.spiffe_id import SpiffeId
from broker.service import moves
from inventory import kills, ledger

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from broker.core.audit import JsonValue
    from broker.core.ports import Check, Minted
    from broker.policy.catalog import CatalogAction
    from broker.service.backends import Backend
    from broker.service.context import Context
    from inventory.store.writer import Transaction

TTL_SECONDS: Final = 120
DEATH_SECONDS_MAX: Final = 30
HOLDER: Final = SpiffeId("spiffe://nhi-broker/prove")
"""Whom the credential is minted for: nobody who could ask for one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One thing that was tried.

    Attributes:
        name: what had to hold.
        ok: whether it did.
        milliseconds: how long it took.
        detail: what was seen.

    """

    name: str
    ok: bool
    milliseconds: int
    detail: Mapping[str, JsonValue] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Proof:
    """What came of it.

    Attributes:
        checks: what the adapter says of the broker's own rights; one that fails stops the proof.
        lease_id: the credential's lease; None where nothing was minted.

    """

    backend: str
    resource: str
    action: str
    checks: Sequence[Check] = ()
    lease_id: LeaseId | None = None
    steps: list[Step] = field(default_factory=list)

    @property
    def proven(self) -> bool:
        """Whether every right is there and every step held."""
        right = all(check.ok for check in self.checks)
        return right and bool(self.steps) and all(step.ok for step in self.steps)


class Prove:
    """Proves one resource's backend. The sweeper must be running: it does the killing."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx

    async def run(self, resource: str, action: str | None, *, actor: str) -> Proof:
        """Mint, use, kill, use again, kill again.

        However it ends, cancelled too, the lease it made is being ended when it returns.

        Raises:
            InvalidRequest: no such resource or action, or nothing that a backend could prove.
            IdentityRefused: the resource is killed.
            BackendUnavailable, MintFailed, LedgerUnavailable: as for any credential.

        """
        granted = self._granted(resource, action)
        backend = self._ctx.backends.of(granted.adapter)
        if not backend.has_external_effect:
            raise InvalidRequest(
                "These credentials are the broker's own tokens: no backend is involved, so there is none to "
                "prove. Introspection answers inactive from the commit that ends them."
            )
        proof = Proof(backend=backend.name, resource=resource, action=granted.name)
        proof.checks = await self._checks(backend)
        if not all(check.ok for check in proof.checks):
            return proof  # what could not be revoked must not be minted
        backend.check_available()
        lease = self._lease(granted, backend)
        proof.lease_id = lease.id
        minting = asyncio.ensure_future(self._mint(lease, granted, backend, actor))
        try:
            await self._live_and_die(proof, lease, backend, asyncio.shield(minting), actor)
        finally:
            await asyncio.shield(asyncio.ensure_future(self._end(lease.id, minting, actor)))
        return proof

    # --- before ----------------------------------------------------------------------------------

    def _granted(self, resource: str, action: str | None) -> CatalogAction:
        known = self._ctx.catalog.actions_of(resource)
        if not known:
            raise InvalidRequest("There is no such resource in the catalog.")
        for granted in known:
            if action in {None, granted.name}:
                return granted
        names = ", ".join(sorted(granted.name for granted in known))
        raise InvalidRequest(f"The catalog has no such action for this resource; it has: {names}.")

    async def _checks(self, backend: Backend) -> Sequence[Check]:
        try:
            return await backend.adapter.check(backend.recipes)
        except Exception as error:
            raise BackendUnavailable(
                f"The backend did not answer the check of our rights ({type(error).__name__}). Check host, "
                "port and network.",
                retry_after_seconds=5,
            ) from error

    def _lease(self, granted: CatalogAction, backend: Backend) -> Lease:
        """Build the lease: of no task and no identity, as an orphan's is."""
        now_ms = self._ctx.clock.now_ms()
        lease_id = LeaseId.new()
        low, high = backend.capabilities.ttl_seconds_min, backend.capabilities.ttl_seconds_max
        expires_ms = now_ms + min(max(TTL_SECONDS, low), high) * MS_PER_SECOND
        deadline_ms = now_ms + (self._ctx.limits.mint_deadline_seconds + 1) * MS_PER_SECOND
        return Lease(
            id=lease_id,
            task_id=TaskId(""),
            identity="",
            adapter=backend.name,
            resource=granted.resource.id,
            action=granted.name,
            backend_name=backend_name(self._ctx.store.instance, lease_id),
            state=LeaseState.INTENT,
            epoch=0,
            revocability=str(backend.capabilities.revocability),
            created_ms=now_ms,
            expires_ms=expires_ms,
            not_after_ms=expires_ms + NATIVE_EXPIRY_MARGIN_SECONDS * MS_PER_SECOND,
            mint_deadline_ms=deadline_ms,
            cause=Cause.REQUESTED,
            urgency=Urgency.EXPIRY,
            next_action_ms=deadline_ms,
        )

    # --- minting ---------------------------------------------------------------------------------

    async def _mint(self, lease: Lease, granted: CatalogAction, backend: Backend, actor: str) -> Credential:
        """Record the intent, mint, record the success. Only what this returns may be used."""

        def intend(tx: Transaction) -> None:
            kill = kills.find(tx, identity="", owner="", resource=lease.resource)
            if kill is not None:
                raise IdentityRefused(
                    "This resource is killed: nothing is minted for it until that is lifted."
                )
            moves.created(self._ctx, tx, lease, actor=actor, fields={"purpose": "prove"})

        await self._ctx.store.writer.run(intend)
        try:
            async with backend.minting(lease):
                lease, minted = await self._call(lease, granted, backend, actor)
        except Exception as error:
            await self._mint_failed(lease, backend, error)
            raise MintFailed(
                f"The backend did not mint ({type(error).__name__}); whatever it made is being revoked.",
                lease_id=lease.id,
            ) from error
        active = await self._ctx.store.writer.run(lambda tx: self._activate(tx, lease, minted, actor))
        if active is None:
            raise MintFailed("The lease was ended while it was being minted.", lease_id=lease.id)
        return minted.credential

    async def _call(
        self, lease: Lease, granted: CatalogAction, backend: Backend, actor: str
    ) -> tuple[Lease, Minted]:
        handle = await backend.adapter.prepare(_request(lease, granted))
        if handle is not None:
            prepared = await self._ctx.store.writer.run(
                lambda tx: moves.move(
                    self._ctx, tx, lease, LeaseState.PREPARED, Cause.REQUESTED, actor=actor, handle=handle
                )
            )
            if prepared is None:
                raise MintFailed("The lease was ended while it was being prepared.", lease_id=lease.id)
            lease = prepared
        return lease, await backend.adapter.mint(_request(lease, granted))

    def _activate(self, tx: Transaction, lease: Lease, minted: Minted, actor: str) -> Lease | None:
        sealed = None
        if minted.keep is not None:
            sealed = self._ctx.keys.seal(minted.keep.reveal(), lease.id.encode())
        return moves.move(
            self._ctx,
            tx,
            lease,
            LeaseState.ACTIVE,
            Cause.MINTED,
            actor=actor,
            handle=minted.handle if minted.handle is not None else lease.handle,
            sealed=sealed,
            activated_ms=self._ctx.clock.now_ms(),
            next_action_ms=lease.expires_ms,
        )

    async def _mint_failed(self, lease: Lease, backend: Backend, error: Exception) -> None:
        certain = backend.adapter.classify(error) is ErrorClass.PERMANENT
        target = LeaseState.FAILED if certain else LeaseState.REVOKE_PENDING
        cause = Cause.MINT_REFUSED if certain else Cause.MINT_AMBIGUOUS
        due_ms = None if certain else self._ctx.clock.now_ms()
        await self._ctx.store.writer.run(
            lambda tx: moves.move(
                self._ctx, tx, lease, target, cause, actor="broker", last_error=type(error).__name__,
                next_action_ms=due_ms,
            )
        )  # fmt: skip

    # --- using, killing, and again ---------------------------------------------------------------

    async def _live_and_die(
        self, proof: Proof, lease: Lease, backend: Backend, minting: asyncio.Future[Credential], actor: str
    ) -> None:
        watch = _Stopwatch()
        credential = await minting
        proof.steps.append(watch.step("minted", ok=True, backend_name=lease.backend_name))
        seen = await backend.adapter.probe(credential)
        proof.steps.append(watch.step("it works", ok=seen is Liveness.ALIVE, seen=seen.value))
        ended = await self._kill(lease.id, actor)
        evidence = dict(ended.evidence or {})
        dead = ended.state is LeaseState.REVOKED
        proof.steps.append(
            watch.step("revoked and verified dead", ok=dead, state=ended.state.value, evidence=evidence)
        )
        seen = await backend.adapter.probe(credential)
        proof.steps.append(watch.step("it no longer works", ok=seen is Liveness.DEAD, seen=seen.value))
        proof.steps.append(await self._again(ended, lease, backend, watch))

    async def _again(self, ended: Lease, minted: Lease, backend: Backend, watch: _Stopwatch) -> Step:
        target = self._target(ended, minted)
        try:
            await backend.adapter.revoke(target)
            seen = (await backend.adapter.verify(target)).presence
        except Exception as error:  # noqa: BLE001  any vendor's exception: it is what the step saw
            return watch.step("revoking it again is harmless", ok=False, error=type(error).__name__)
        return watch.step("revoking it again is harmless", ok=seen is Presence.ABSENT, seen=seen.value)

    async def _kill(self, lease_id: LeaseId, actor: str) -> Lease:
        await self._order_end(lease_id, actor)
        if self._read(lease_id).state not in TERMINAL:
            await self._ctx.watch.wait([lease_id], seconds=DEATH_SECONDS_MAX)
        return self._read(lease_id)

    def _target(self, ended: Lease, minted: Lease) -> Target:
        granted = self._ctx.catalog.action(minted.resource, minted.action)
        sealed = ended.sealed
        return Target(
            lease_id=ended.id,
            backend_name=ended.backend_name,
            recipe={} if granted is None else granted.recipe,
            handle=ended.handle,
            kept=None if sealed is None else Secret(self._ctx.keys.unseal(sealed, ended.id.encode())),
        )

    # --- whatever happened -----------------------------------------------------------------------

    async def _end(self, lease_id: LeaseId, minting: asyncio.Future[Credential], actor: str) -> None:
        """See to it that the lease is being ended, and give the sweeper the time to prove it."""
        await asyncio.wait({minting})
        if not minting.cancelled():
            minting.exception()  # it was raised to the caller already, or the caller has left
        lease = ledger.get(self._ctx.store.reader, lease_id)
        if lease is not None and lease.state not in TERMINAL:
            await self._kill(lease_id, actor)

    async def _order_end(self, lease_id: LeaseId, actor: str) -> None:
        def end(tx: Transaction) -> None:
            lease = ledger.get(tx, lease_id)
            if lease is not None and lease.ended_ms is None:
                moves.end(self._ctx, tx, lease, Cause.RELEASED, actor=actor)

        await self._ctx.store.writer.run(end)

    def _read(self, lease_id: LeaseId) -> Lease:
        lease = ledger.get(self._ctx.store.reader, lease_id)
        if lease is None:
            raise RuntimeError("a lease that was recorded is gone from the ledger")
        return lease


class _Stopwatch:
    def __init__(self) -> None:
        self._last = time.monotonic()

    def step(self, name: str, *, ok: bool, **detail: JsonValue) -> Step:
        now = time.monotonic()
        took_ms, self._last = int((now - self._last) * MS_PER_SECOND), now
        return Step(name=name, ok=ok, milliseconds=took_ms, detail=detail)


def _request(lease: Lease, granted: CatalogAction) -> MintRequest:
    return MintRequest(
        lease_id=lease.id,
        task_id=lease.task_id,
        identity=HOLDER,
        backend_name=lease.backend_name,
        resource=lease.resource,
        action=lease.action,
        recipe=granted.recipe,
        now_ms=lease.created_ms,
        expires_ms=lease.expires_ms,
        not_after_ms=lease.not_after_ms,
        handle=lease.handle,
    )
