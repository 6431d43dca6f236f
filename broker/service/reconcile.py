"""Reconciling ledger and backends, both ways (DESIGN 4, rule 9).

Forward: a live object that carries our tag but has no live row becomes a lease in
REVOKE_PENDING. Reverse: an ACTIVE row whose object is gone is a finding, and closes with
evidence.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

import structlog

from broker.core.clock import MS_PER_SECOND
from broker.core.ids import LeaseId, TaskId, lease_of_backend_name
from broker.core.lease import MAYBE_ALIVE, Cause, Lease, LeaseState, Urgency
from broker.service import moves
from inventory import findings, ledger
from inventory.findings import Finding

if TYPE_CHECKING:
    from broker.core.ports import Found
    from broker.service.backends import Backend
    from broker.service.context import Context
    from inventory.store.writer import Transaction

log = structlog.get_logger(__name__)

ACTOR: Final = "scan"
FOUND_MAX: Final = 1_000_000
"""Bound on one scan's memory: names of live objects of ours in one backend."""

PAGE: Final = 200
FINDING_ORPHAN: Final = "orphan-credential"
FINDING_GONE: Final = "credential-gone"


@dataclass(frozen=True, slots=True)
class Reconciled:
    """What one scan of one backend found."""

    backend: str
    seen: int
    orphans: int
    gone: int


class Reconcile:
    """Scans backends that can list what is alive."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx

    async def scan_all(self) -> list[Reconciled]:
        """Scan every listable backend; one that fails does not stop the others."""
        results = []
        for backend in self._ctx.backends:
            if backend.capabilities.listable:
                try:
                    results.append(await self.scan(backend))
                except Exception as error:  # noqa: BLE001  any vendor's exception: logged, scanned again in an hour
                    log.warning("scan.failed", backend=backend.name, error=type(error).__name__)
        return results

    async def scan(self, backend: Backend) -> Reconciled:
        """Compare one backend with the ledger."""
        started_ms = self._ctx.clock.now_ms()
        names: set[str] = set()
        orphans = 0
        async for found in backend.adapter.scan(backend.recipes):
            names.add(found.backend_name)
            if len(names) > FOUND_MAX:
                raise RuntimeError(f"more than {FOUND_MAX} live objects of ours in {backend.name}")
            if await self._adopt(backend, found, started_ms):
                orphans += 1
        gone = await self._close_gone(backend, names, started_ms)
        log.info("scan.done", backend=backend.name, seen=len(names), orphans=orphans, gone=gone)
        return Reconciled(backend.name, len(names), orphans, gone)

    async def _adopt(self, backend: Backend, found: Found, now_ms: int) -> bool:
        """Make an orphan of an object that no live row accounts for."""
        named_after = lease_of_backend_name(self._ctx.store.instance, found.backend_name)
        if named_after is None:
            return False
        young_ms = backend.capabilities.t_inflight_seconds * MS_PER_SECOND
        if found.created_ms is not None and now_ms - found.created_ms < young_ms:
            return False  # a mint or revocation in flight may account for it; the next scan will tell

        def record(tx: Transaction) -> bool:
            rows = ledger.of_backend_object(tx, backend.name, found.backend_name, named_after)
            if any(row.state in MAYBE_ALIVE for row in rows):
                return False
            lease_id = named_after if not rows else LeaseId.new()
            orphan = _orphan(lease_id, backend, found, rows, self._ctx.clock.now_ms())
            moves.created(self._ctx, tx, orphan, actor=ACTOR, fields={"backend_name": found.backend_name})
            evidence = {"adapter": backend.name, "backend_name": found.backend_name}
            findings.open_finding(
                tx, Finding(FINDING_ORPHAN, lease_id, evidence, orphan.created_ms), actor=ACTOR
            )
            return True

        return await self._ctx.store.writer.run(record)

    async def _close_gone(self, backend: Backend, names: set[str], started_ms: int) -> int:
        """Send ACTIVE leases whose object is gone towards their end."""
        before_ms = started_ms - backend.capabilities.t_inflight_seconds * MS_PER_SECOND
        gone, after = 0, ""
        while True:
            page = ledger.active_page(
                self._ctx.store.reader,
                backend.name,
                activated_before_ms=before_ms,
                after=after,
                limit=PAGE,
            )
            if not page:
                return gone
            after = page[-1].id
            missing = [lease for lease in page if lease.backend_name not in names]
            if missing:
                await self._ctx.store.writer.run(partial(self._end_gone, leases=missing))
            gone += len(missing)

    def _end_gone(self, tx: Transaction, leases: list[Lease]) -> None:
        for lease in leases:
            if moves.end(self._ctx, tx, lease, Cause.OBJECT_GONE, actor=ACTOR) is not None:
                evidence = {"adapter": lease.adapter, "backend_name": lease.backend_name}
                finding = Finding(FINDING_GONE, lease.id, evidence, self._ctx.clock.now_ms())
                findings.open_finding(tx, finding, actor=ACTOR)


def _orphan(lease_id: LeaseId, backend: Backend, found: Found, rows: list[Lease], now_ms: int) -> Lease:
    """Build the row of an orphan; what an ended lease of that name knew of it is taken over."""
    before = rows[0] if rows else None
    # Without a row nobody knows when the backend ends it: not before the longest it was ever told.
    longest_ms = now_ms + backend.capabilities.ttl_seconds_max * MS_PER_SECOND
    return Lease(
        id=lease_id,
        task_id=TaskId(""),
        identity="" if before is None else before.identity,
        adapter=backend.name,
        resource="" if before is None else before.resource,
        action="" if before is None else before.action,
        backend_name=found.backend_name,
        state=LeaseState.REVOKE_PENDING,
        epoch=0,
        revocability=str(backend.capabilities.revocability),
        created_ms=now_ms,
        expires_ms=now_ms,
        not_after_ms=longest_ms,
        mint_deadline_ms=now_ms,
        cause=Cause.ORPHAN,
        urgency=Urgency.COMPROMISE,
        next_action_ms=now_ms,
        handle=found.handle,
        activated_ms=now_ms,
        ended_ms=now_ms,
    )
