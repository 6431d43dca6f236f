"""Exporting the audit log: audited before the first byte, read in a thread, bounded in memory.

Chunks are made only as fast as they are taken. The reading connection belongs to one
thread of its own, so that whoever leaves early leaves nothing behind: the connection is
closed after the read under way, by the thread that reads.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from broker.core.audit import AuditKind, AuditRecord
from broker.core.errors import Overloaded
from inventory.audit.export import ExportFilter
from inventory.audit.heads import HeadSigner
from inventory.audit.public_keys import PublicKeys, public_keys_json
from inventory.audit.read import export_up_to

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from broker.service.context import Context

EXPORTS_MAX: Final = 4
"""Exports at the same time; each holds a thread and a connection."""

CHUNK_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOrder:
    """What an operator asks to see; what is None narrows nothing.

    Attributes:
        from_ms, to_ms: records at or after the one, before the other.
        texts: whether free texts are shown in clear.

    """

    actor: str
    lease_id: str | None = None
    task_id: str | None = None
    identity: str | None = None
    from_ms: int | None = None
    to_ms: int | None = None
    texts: bool = False

    def filter(self) -> ExportFilter:
        """Return what the export leaves out."""
        return ExportFilter(
            lease_id=self.lease_id,
            task_id=self.task_id,
            identity=self.identity,
            from_ms=self.from_ms,
            to_ms=self.to_ms,
        )


class AuditExports:
    """Serves `GET /audit/export` and `GET /audit/keys`."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._running = 0

    @property
    def running(self) -> int:
        """Exports under way."""
        return self._running

    def public_keys(self) -> dict[str, Any]:
        """Return all that offline verification needs besides the log and the copied heads."""
        return public_keys_json(self._public())

    @asynccontextmanager
    async def open(self, order: ExportOrder) -> AsyncIterator[AsyncIterator[bytes]]:
        """Audit the export and give its chunks, whole lines each.

        Raises:
            Overloaded: as many exports as may be are under way.
            LedgerUnavailable: the export cannot be audited, so there is none.

        """
        if self._running >= EXPORTS_MAX:
            raise Overloaded(
                f"At most {EXPORTS_MAX} exports run at the same time; try again when one has ended.",
                retry_after_seconds=5,
            )
        self._running += 1
        try:
            await self._record(order)
            # Fixed here: what is written from now on is not part of this export.
            head = self._ctx.store.writer.head
            connection = self._ctx.store.open_reader()
            lines = export_up_to(
                connection,
                HeadSigner(self._ctx.keys, self._ctx.store.instance).sign(head, self._ctx.clock.now_ms()),
                self._public(),
                only=order.filter(),
                texts_with=self._ctx.keys if order.texts else None,
            )
            thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="audit-export")
            try:
                yield _chunks(lines, thread)
            finally:
                thread.submit(connection.close)
                thread.shutdown(wait=False)
        finally:
            self._running -= 1

    async def _record(self, order: ExportOrder) -> None:
        record = AuditRecord(
            kind=AuditKind.AUDIT_EXPORTED,
            at_ms=self._ctx.clock.now_ms(),
            actor=order.actor,
            fields={"filter": order.filter().as_json(), "texts": order.texts},
        )
        await self._ctx.store.writer.run(lambda tx: tx.audit(record))

    def _public(self) -> PublicKeys:
        return PublicKeys(self._ctx.store.instance, self._ctx.keys.audit_keys())


async def _chunks(lines: Iterator[bytes], thread: ThreadPoolExecutor) -> AsyncIterator[bytes]:
    loop = asyncio.get_running_loop()
    while True:
        chunk = await loop.run_in_executor(thread, _next_chunk, lines)
        if not chunk:
            return
        yield chunk


def _next_chunk(lines: Iterator[bytes]) -> bytes:
    """Join lines to a chunk; empty at the end."""
    parts: list[bytes] = []
    size = 0
    for line in lines:
        parts.append(line)
        size += len(line)
        if size >= CHUNK_BYTES:
            break
    return b"".join(parts)
