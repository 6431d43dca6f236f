"""Signing the audit chain's head and copying it to the second place, every second (DESIGN 9)."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from broker.keys.key_file import KeyStoreError
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
        self._one_at_a_time = asyncio.Lock()
        self.failing: str | None = None

    async def tick(self) -> None:
        """Sign and copy the head if it moved since the last copy. A failure alarms and is retried.

        In a thread: a second place that hangs must not hold up the broker.
        """
        async with self._one_at_a_time:
            await self._copy_if_moved(self._ctx.store.writer.head)

    async def _copy_if_moved(self, head: ChainHead) -> None:
        if head == self._copied or head.seq == 0:
            return
        try:
            await asyncio.to_thread(self._sign_and_copy, head)
        except (HeadCopyError, KeyStoreError) as error:
            if self.failing is None:
                log.error("audit.copy_failing", reason=str(error))  # noqa: TRY400  no traceback: the reason is ours
            self.failing = str(error)
            return
        if self.failing is not None:
            log.info("audit.copy_recovered")
        self.failing = None
        self._copied = head

    async def close(self) -> None:
        """Copy the last head and close the file."""
        await self.tick()
        self._copy.close()

    def _sign_and_copy(self, head: ChainHead) -> None:
        self._copy.append(self._signer.sign(head, self._ctx.clock.now_ms()))
