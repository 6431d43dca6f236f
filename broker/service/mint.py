"""Minting in a backend, once the intent is durable: mint, activate, release, or undo.

Whatever happens here, the ledger knows the lease and the sweeper ends it.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

import structlog

from broker.core.errors import BrokerError, LeaseLost, MintFailed
from broker.core.lease import NEVER_ACTIVE, Cause, Lease, LeaseState
from broker.core.ports import ErrorClass, Minted, Target
from broker.core.spiffe_id import SpiffeId
from broker.service import moves
from broker.service.admit import BARRED
from broker.service.issuance import Issued, mint_request, secret_digest
from inventory import identities, kills, ledger

if TYPE_CHECKING:
    from broker.policy.catalog import CatalogAction
    from broker.service.backends import Backend
    from broker.service.context import Context
    from broker.service.issuance import Plan
    from inventory.store.writer import Transaction

log = structlog.get_logger(__name__)


class Mint:
    """Mints what the ledger already intends."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx

    async def mint_and_activate(self, plan: Plan) -> Issued:
        """Mint under a lease in INTENT, and release the credential once the lease is ACTIVE.

        Raises:
            MintFailed: the backend refused or did not answer; the lease is failed or being ended.
            LeaseLost: the lease was ended meanwhile; the credential is revoked and dropped.
            LedgerUnavailable: the success could not be recorded; the credential is dropped.

        """
        lease = plan.lease
        try:
            async with plan.backend.minting(lease):
                lease, minted = await self._mint(plan.backend, lease, plan.granted)
        except BrokerError:
            raise
        except Exception as error:
            # Every vendor's exception ends here: the adapter says what it means for the lease.
            raise await self._mint_failed(plan.backend, lease, error) from error
        digest = secret_digest(self._ctx, minted.credential)
        active = await self._ctx.store.writer.run(lambda tx: self._activate(tx, lease, minted, digest))
        if active is None:
            self._ctx.telemetry.mint_failed(lease.adapter, "lost")
            await self._revoke_lost(plan, lease, minted)
            raise _lost(lease)
        return Issued(lease=active, credential=minted.credential, basis=plan.basis)

    async def _mint(self, backend: Backend, lease: Lease, granted: CatalogAction) -> tuple[Lease, Minted]:
        request = mint_request(lease, granted)
        handle = await backend.adapter.prepare(request)
        if handle is not None:
            prepared = await self._ctx.store.writer.run(
                lambda tx: moves.move(
                    self._ctx,
                    tx,
                    lease,
                    LeaseState.PREPARED,
                    Cause.REQUESTED,
                    actor=lease.identity,
                    handle=handle,
                )
            )
            if prepared is None:
                raise _lost(lease)
            lease, request = prepared, replace(request, handle=handle)
        return lease, await backend.adapter.mint(request)

    async def _revoke_lost(self, plan: Plan, lease: Lease, minted: Minted) -> None:
        """Undo a mint whose lease was ended meanwhile (rule 2).

        The sweeper proves the end; but only here the handle is known that the backend gave it.
        """
        target = Target(
            lease_id=lease.id,
            backend_name=lease.backend_name,
            recipe=plan.granted.recipe,
            handle=minted.handle if minted.handle is not None else lease.handle,
            kept=minted.keep,
        )
        try:
            with plan.backend.observed():
                async with asyncio.timeout(self._ctx.limits.claim_visibility_seconds):
                    await plan.backend.adapter.revoke(target)
        except Exception as error:  # noqa: BLE001  any vendor's exception: the sweeper goes on trying
            log.warning("issue.lost_mint_not_revoked", lease_id=lease.id, error=type(error).__name__)

    def _activate(self, tx: Transaction, lease: Lease, minted: Minted, digest: str) -> Lease | None:
        """Move to ACTIVE. Only whoever gets a lease back here may release the secret (rule 2).

        A task that ended meanwhile moved the lease in its own transaction, so the guard sees it;
        a kill and a suspension close their scope first and move its leases afterwards.
        """
        overtaken = self._overtaken_by(tx, lease)
        if overtaken is not None:
            moves.end(self._ctx, tx, lease, overtaken, actor="broker")
            return None
        sealed = None
        if minted.keep is not None:
            sealed = self._ctx.keys.seal(minted.keep.reveal(), lease.id.encode())
        return moves.move(
            self._ctx,
            tx,
            lease,
            LeaseState.ACTIVE,
            Cause.MINTED,
            actor=lease.identity,
            fields={"secret_digest": digest},
            handle=minted.handle if minted.handle is not None else lease.handle,
            sealed=sealed,
            activated_ms=self._ctx.clock.now_ms(),
            next_action_ms=lease.expires_ms,
        )

    def _overtaken_by(self, tx: Transaction, lease: Lease) -> Cause | None:
        """Return why a credential minted a moment ago must not be released any more."""
        holder = identities.facts(tx, SpiffeId(lease.identity))
        if holder is None or holder.lifecycle in BARRED:
            return Cause.SUSPENDED
        if kills.find(tx, identity=lease.identity, owner=holder.owner, resource=lease.resource) is not None:
            return Cause.KILL
        return Cause.EXPIRY if lease.expires_ms <= self._ctx.clock.now_ms() else None

    async def _mint_failed(self, backend: Backend, lease: Lease, error: Exception) -> MintFailed:
        """Move the lease where the error says it belongs, and return what to tell the caller."""
        certain = backend.adapter.classify(error) is ErrorClass.PERMANENT
        self._ctx.telemetry.mint_failed(lease.adapter, "refused" if certain else "ambiguous")

        def record(tx: Transaction) -> None:
            # Read anew: a two-step mint that fails has a handle on record already.
            now = ledger.get(tx, lease.id)
            if now is None or now.state not in NEVER_ACTIVE:
                return
            nothing_made = certain and now.state is LeaseState.INTENT
            moves.move(
                self._ctx,
                tx,
                now,
                LeaseState.FAILED if nothing_made else LeaseState.REVOKE_PENDING,
                Cause.MINT_REFUSED if certain else Cause.MINT_AMBIGUOUS,
                actor="broker",
                last_error=type(error).__name__,
                next_action_ms=None if nothing_made else self._ctx.clock.now_ms(),
            )

        await self._ctx.store.writer.run(record)
        detail = (
            "The backend refused to mint this credential; nothing was made. Tell the resource's owner."
            if certain
            else "The backend did not confirm the mint; whatever it made is being revoked. Retry later."
        )
        return MintFailed(detail, retry_after_seconds=5, lease_id=lease.id, task_id=lease.task_id)


def _lost(lease: Lease) -> LeaseLost:
    return LeaseLost(
        "The lease was ended while its credential was being minted; nothing was released. "
        "If the task is still open, retry.",
        retry_after_seconds=1,
        lease_id=lease.id,
        task_id=lease.task_id,
    )
