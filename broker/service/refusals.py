"""Auditing refused authentications, at a bounded cost.

Whoever fails to authenticate must leave a trace with the rule it broke, and must not be
able to fill the ledger: beyond a rate, refusals are counted, and the count goes into the
next record.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import structlog

from broker.core.audit import AuditKind, AuditRecord
from broker.core.clock import MS_PER_SECOND
from broker.core.errors import BrokerError

if TYPE_CHECKING:
    from broker.core.errors import Unauthenticated
    from broker.service.context import Context

log = structlog.get_logger(__name__)

RECORDS_PER_SECOND_MAX: Final = 20


class AuthenticationRefusals:
    """Records refused SVIDs with their rule id."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._second = 0
        self._in_second = 0
        self._unrecorded = 0

    async def record(self, refusal: Unauthenticated, *, peer: str, path: str, trace_id: str) -> None:
        """Audit one refusal, or count it where too many came this second. Never raises.

        The edge logs it, with the same trace id.

        Args:
            refusal: what our rules refused.
            peer: the address it came from.
            path: template of the route it asked for.
            trace_id: of the request.

        """
        self._ctx.telemetry.authentication_refused(refusal.rule)
        now_ms = self._ctx.clock.now_ms()
        if not self._has_room(now_ms):
            self._unrecorded += 1
            return
        unrecorded, self._unrecorded = self._unrecorded, 0
        record = AuditRecord(
            kind=AuditKind.AUTHENTICATION_REFUSED,
            at_ms=now_ms,
            actor="unauthenticated",
            fields={
                "rule": refusal.rule,
                "peer": peer,
                "path": path,
                "trace_id": trace_id,
                "unrecorded_before": unrecorded,
            },
            text={"explanation": refusal.explanation},
        )
        try:
            await self._ctx.store.writer.run(lambda tx: tx.audit(record))
        except BrokerError as error:
            self._unrecorded += unrecorded + 1
            log.warning("authentication.refusal_unrecorded", code=error.code)

    def _has_room(self, now_ms: int) -> bool:
        second = now_ms // MS_PER_SECOND
        if second != self._second:
            self._second, self._in_second = second, 0
        self._in_second += 1
        return self._in_second <= RECORDS_PER_SECOND_MAX
