"""Periodic work. APScheduler only ticks; what is due lives in the ledger (DESIGN 4).

Every process ticks every job; a claimed row lets each run once per deployment. Lease
expiry is never one of these: the sweeper owns it.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import structlog
from apscheduler.schedulers.asyncio import AsyncIOScheduler

from broker.core.audit import AuditKind, AuditRecord
from broker.core.clock import MS_PER_SECOND
from broker.core.errors import BrokerError
from inventory import idempotency, meta

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from broker.service.audit_heads import AuditHeads
    from broker.service.services import Services

log = structlog.get_logger(__name__)

TICK_SECONDS: Final = 15
"""How often it is asked whether a job is due. Ticking once a period would come a moment too early
for the row every other time, and a broker restarted within the hour would never scan."""

KEY_ROTATION_SECONDS: Final = 60
PURGE_SECONDS: Final = 300


class Jobs:
    """Ticks the periodic jobs of one process."""

    def __init__(
        self, services: Services, heads: AuditHeads, *, scan_seconds: int, sign_seconds: float
    ) -> None:
        self._services = services
        self._ctx = services.ctx
        self._scheduler = AsyncIOScheduler(
            job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": None}
        )
        self._scheduler.add_job(self._tick_heads(heads), "interval", seconds=sign_seconds)
        self._every("scan", scan_seconds, self._scan)
        self._every("token-keys", KEY_ROTATION_SECONDS, self._rotate_token_keys)
        self._every("idempotency-purge", PURGE_SECONDS, self._purge)

    def start(self) -> None:
        """Begin to tick on the running loop."""
        self._scheduler.start()

    def close(self) -> None:
        """Stop ticking."""
        if self._scheduler.running:
            self._scheduler.shutdown(wait=False)

    def _every(self, name: str, seconds: int, job: Callable[[], Awaitable[None]]) -> None:
        async def run() -> None:
            now_ms = self._ctx.clock.now_ms()
            every_ms = seconds * MS_PER_SECOND
            try:
                if not meta.is_due(self._ctx.store.reader, name, now_ms=now_ms, every_ms=every_ms):
                    return
                if await self._ctx.store.writer.run(
                    lambda tx: meta.claim_job(tx, name, now_ms=now_ms, every_ms=every_ms)
                ):
                    await job()
            except BrokerError as error:
                log.warning("job.postponed", job=name, code=error.code)

        self._scheduler.add_job(run, "interval", seconds=min(seconds, TICK_SECONDS), id=name)

    @staticmethod
    def _tick_heads(heads: AuditHeads) -> Callable[[], Awaitable[None]]:
        return heads.tick

    async def _scan(self) -> None:
        await self._services.reconcile.scan_all()

    async def _rotate_token_keys(self) -> None:
        now_ms = self._ctx.clock.now_ms()
        # It writes a file and may make an RSA key: neither may hold up a request.
        if await asyncio.to_thread(self._ctx.keys.rotate_token_keys, now_ms):
            kids = tuple(key.kid for key in self._ctx.keys.token_keys())
            record = AuditRecord(
                kind=AuditKind.KEY_ROTATED, at_ms=now_ms, actor="broker", fields={"published": kids}
            )
            await self._ctx.store.writer.run(lambda tx: tx.audit(record))

    async def _purge(self) -> None:
        now_ms = self._ctx.clock.now_ms()
        while await self._ctx.store.writer.run(lambda tx: idempotency.purge(tx, now_ms=now_ms)):
            log.info("idempotency.purged")
