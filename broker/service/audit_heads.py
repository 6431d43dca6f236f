"""Signing the audit chain's head and copying it to the second place, every second (DESIGN 9)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from inventory.audit.heads import HeadCopyError, HeadSigner

if TYPE_CHECKING:
    from broker.service.context import Context
    from inventory.audit.chain import ChainHead
    from inventory.audit.heads import HeadCopy

log = structlog.get_logger(__name__)


class AuditHeads:
    """Signs and copies the head whenever it has moved.

    Attributes:
        failing: why the last copy failed, None while copies succeed; `/readyz` shows it.

    """

    def __init__(self, ctx: Context, copy: HeadCopy) -> None:
        self._ctx = ctx
        self._signer = HeadSigner(ctx.keys, ctx.store.instance)
        self._copy = copy
        self._copied: ChainHead | None = None
        self.failing: str | None = None

    def tick(self) -> None:
        """Sign and copy the head if it moved since the last copy. A failure alarms and is retried."""
        head = self._ctx.store.writer.head
        if head == self._copied or head.seq == 0:
            return
        try:
            self._copy.append(self._signer.sign(head, self._ctx.clock.now_ms()))
        except HeadCopyError as error:
            if self.failing is None:
                log.error("audit.copy_failing", reason=str(error))  # noqa: TRY400  no traceback: the reason is ours
            self.failing = str(error)
            return
        if self.failing is not None:
            log.info("audit.copy_recovered")
        self.failing = None
        self._copied = head

    def close(self) -> None:
        """Copy the last head and close the file."""
        self.tick()
        self._copy.close()
