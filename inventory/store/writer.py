"""The one writer: sole opener of write transactions, group commit, and the audit chain in it.

Callers hand over units of work (`await writer.run(unit)`). The writer gathers whatever
waits, runs each unit inside a savepoint of one transaction, and commits once. A unit that
raises is undone alone; its audit records and its place in the chain go with it. Nothing a
unit returns is released before its commit is durable.

Statements run on the event loop (microseconds each), COMMIT with its fsync in one worker
thread, so that requests arriving meanwhile form the next group.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for_threads
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import structlog

from broker.core.errors import LedgerUnavailable, Overloaded
from inventory.audit.chain import ChainHead, append
from inventory.store.sql import plain, positional_insert_sql
from inventory.store.tables import AuditRow, AuditTextRow

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from broker.core.audit import AuditRecord
    from broker.core.ports import KeyStore

log = structlog.get_logger(__name__)

T = TypeVar("T")

QUEUE_MAX: Final = 4096
"""Units that may wait; beyond it the answer is 503, not an ever longer wait."""

BATCH_MAX: Final = 128
"""Units per commit: bounds what one slow fsync or one rollback holds up."""

_INSERT_AUDIT: Final = positional_insert_sql(AuditRow)
_INSERT_AUDIT_TEXT: Final = positional_insert_sql(AuditTextRow)


class FactsVersion:
    """Counts changes of what policy is told, so that facts read a moment ago need no second read.

    It rises when a unit makes such a change, for the units after it in the same batch, and
    again once the change is durable, for readers that still saw the state before. So equal
    versions mean that nothing changed in between; unequal ones mean look again.
    """

    __slots__ = ("current",)

    def __init__(self) -> None:
        self.current = 0

    def raise_it(self) -> None:
        """Count one change."""
        self.current += 1


class Transaction:
    """What a unit of work may touch: statements, audit records, and hooks for after the commit."""

    __slots__ = ("_after", "_connection", "_keys", "_versions", "head")

    def __init__(
        self, connection: sqlite3.Connection, head: ChainHead, keys: KeyStore, versions: FactsVersion
    ) -> None:
        self._connection = connection
        self._keys = keys
        self._versions = versions
        self._after: list[Callable[[], None]] = []
        self.head = head

    @property
    def facts_version(self) -> int:
        """What `FactsVersion.current` is for this unit."""
        return self._versions.current

    def facts_changed(self) -> None:
        """Say that this unit changes what policy is told: identities, grants, or the kill switch."""
        self._versions.raise_it()
        self._after.append(self._versions.raise_it)

    def execute(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> sqlite3.Cursor:
        """Run one statement."""
        return self._connection.execute(sql, parameters)

    def one(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> Any:
        """Run one statement and return its first row, or None."""
        return self._connection.execute(sql, parameters).fetchone()

    def audit(self, record: AuditRecord) -> None:
        """Append to the chain, in this transaction: either both stand or neither."""
        self.head, row, texts = append(self.head, record, self._keys)
        self._connection.execute(_INSERT_AUDIT, plain(row))
        for text in texts:
            self._connection.execute(_INSERT_AUDIT_TEXT, text)

    def after_commit(self, hook: Callable[[], None]) -> None:
        """Call `hook` on the event loop once this unit is durable. It must not raise."""
        self._after.append(hook)

    @property
    def hooks(self) -> list[Callable[[], None]]:
        """Hooks registered so far."""
        return self._after


class _WroteAndRaisedError(Exception):
    """A unit raised after it had written, in a batch that runs without savepoints."""


@dataclass(slots=True)
class _Item(Generic[T]):
    unit: Callable[[Transaction], T]
    future: asyncio.Future[T]
    result: T | None = None
    error: Exception | None = None
    hooks: Sequence[Callable[[], None]] = ()


class Writer:
    """Group commit over one SQLite connection.

    Attributes:
        head: where the audit chain stands after the last durable commit.
        facts: counts changes of what policy is told.
        commits: how many commits were made, units how many units they held: for metrics.

    """

    def __init__(
        self, connection: sqlite3.Connection, head: ChainHead, keys: KeyStore, *, queue_max: int = QUEUE_MAX
    ) -> None:
        self._connection = connection
        self._keys = keys
        self._queue: deque[_Item[Any]] = deque()
        self._in_hand: list[_Item[Any]] = []
        self._queue_max = queue_max
        self._wake = asyncio.Event()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ledger-commit")
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self.head = head
        self.facts = FactsVersion()
        self.commits = 0
        self.units = 0
        self.last_failure: str | None = None

    def start(self) -> None:
        """Begin to drain the queue on the running loop."""
        self._task = asyncio.get_running_loop().create_task(self._drain(), name="ledger-writer")

    @property
    def waiting(self) -> int:
        """Units in the queue."""
        return len(self._queue)

    async def run(self, unit: Callable[[Transaction], T]) -> T:
        """Run `unit` in a transaction and return its result once it is durable.

        Raises:
            Overloaded: the queue is full; nothing was done.
            LedgerUnavailable: the commit failed; nothing was done.
            BaseException: whatever `unit` raised; nothing of it was done.

        """
        if self._closing or self._task is None or self._task.done():
            raise LedgerUnavailable("The broker is shutting down.", retry_after_seconds=5)
        if len(self._queue) >= self._queue_max:
            raise Overloaded("The ledger's queue is full; retry shortly.", retry_after_seconds=1)
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._queue.append(_Item(unit, future))
        self._wake.set()
        # A caller that is cancelled cancels the future with it, and that is all: the unit runs, its
        # hooks too, and nobody is told. (`asyncio.shield` would cost every unit a second future.)
        return await future

    async def close(self) -> None:
        """Finish what is queued, then stop. Idempotent."""
        self._closing = True
        self._wake.set()
        if self._task is not None:
            await self._task
            self._task = None
        self._executor.shutdown(wait=True)
        self._connection.close()

    async def _drain(self) -> None:
        try:
            await self._commit_what_comes()
        finally:
            # Only where the loop is being torn down, or by a defect: nobody may wait for ever.
            for item in (*self._in_hand, *self._queue):
                _fail(item, sqlite3.InterfaceError("the writer has stopped"))
            self._queue.clear()

    async def _commit_what_comes(self) -> None:
        while True:
            if not self._queue:
                if self._closing:
                    return
                self._wake.clear()
                await self._wake.wait()
                continue
            self._in_hand = [self._queue.popleft() for _ in range(min(BATCH_MAX, len(self._queue)))]
            await self._commit_together(self._in_hand)
            self._in_hand = []

    async def _commit_together(self, batch: list[_Item[Any]]) -> None:
        try:
            await self._transact(batch)
        except sqlite3.Error as error:
            self.last_failure = type(error).__name__
            if len(batch) == 1:
                _fail(batch[0], error)
                return
            # One unit may be what the database cannot take: let the others through.
            for item in batch:
                await self._commit_together([item])

    async def _transact(self, batch: list[_Item[Any]]) -> None:
        """Run a batch in one transaction; raises sqlite3.Error with everything rolled back.

        Nobody is told anything before the commit, refusals included: what a unit refused for
        may be what an earlier unit of the batch wrote, and that may yet be rolled back.

        Savepoints cost a copy of every page a unit touches, and most units that raise have
        written nothing. So a batch first runs without; only where one wrote and then raised is
        it run again with them.
        """
        try:
            head = self._run_units(batch, self._run_unit)
        except _WroteAndRaisedError:
            head = self._run_units(batch, self._run_unit_in_savepoint)
        try:
            await self._commit()
        except BaseException:
            if self._connection.in_transaction:
                self._connection.rollback()
            raise
        self.head = head
        self.commits += 1
        self.units += sum(item.error is None for item in batch)
        self.last_failure = None
        for item in batch:
            _settle(item)

    async def _commit(self) -> None:
        committing = self._executor.submit(self._connection.commit)
        try:
            await asyncio.wrap_future(committing)
        except asyncio.CancelledError:
            # The thread may be at it: touch the connection again only once it has let go.
            wait_for_threads([committing])
            raise

    def _run_units(
        self, batch: list[_Item[Any]], run: Callable[[_Item[Any], ChainHead], ChainHead]
    ) -> ChainHead:
        """Run every unit in a transaction left open, and return the chain's head after the last."""
        head = self.head
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            for item in batch:
                head = run(item, head)
        except BaseException:
            if self._connection.in_transaction:
                self._connection.rollback()
            raise
        return head

    def _run_unit(self, item: _Item[Any], head: ChainHead) -> ChainHead:
        """Run one unit and return the chain's head after it.

        Raises:
            _WroteAndRaisedError: what it wrote must be undone without the rest of the batch.

        """
        transaction = Transaction(self._connection, head, self._keys, self.facts)
        item.error, item.hooks = None, ()
        changes = self._connection.total_changes
        try:
            item.result = item.unit(transaction)
        except sqlite3.Error:
            raise  # the database itself failed: the batch is rolled back and retried one by one
        except Exception as error:
            if self._connection.total_changes != changes:
                raise _WroteAndRaisedError from error
            item.error = error
            return head
        item.hooks = transaction.hooks
        return transaction.head

    def _run_unit_in_savepoint(self, item: _Item[Any], head: ChainHead) -> ChainHead:
        """Run one unit, undoing it alone where it raises, and return the chain's head after it."""
        transaction = Transaction(self._connection, head, self._keys, self.facts)
        item.error, item.hooks = None, ()
        self._connection.execute("SAVEPOINT unit")
        try:
            item.result = item.unit(transaction)
        except sqlite3.Error:
            raise  # the database itself failed: the batch is rolled back and retried one by one
        except Exception as error:  # noqa: BLE001  whatever a unit raises is its caller's, not the writer's
            self._connection.execute("ROLLBACK TO unit")
            self._connection.execute("RELEASE unit")
            item.error = error
            return head
        self._connection.execute("RELEASE unit")
        item.hooks = transaction.hooks
        return transaction.head


def _settle(item: _Item[Any]) -> None:
    """Run the hooks of a unit that is durable, and tell its caller how it went."""
    for hook in item.hooks:
        try:
            hook()
        except Exception:
            # A hook is an echo of what is durable already: it must not stop the writer, and with
            # it every revocation.
            log.exception("ledger.hook_failed")
    if item.future.done():
        return
    if item.error is not None:
        item.future.set_exception(item.error)
    else:
        item.future.set_result(item.result)


def _fail(item: _Item[Any], error: sqlite3.Error) -> None:
    if item.future.done():
        return
    if isinstance(error, sqlite3.IntegrityError):
        item.future.set_exception(error)
        return
    failure = LedgerUnavailable(
        "The ledger cannot be written; nothing was issued. Retry later.", retry_after_seconds=5
    )
    failure.__cause__ = error
    item.future.set_exception(failure)
