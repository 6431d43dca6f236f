"""A ledger file for one test: migrated once per run, copied for each test, opened as the broker opens it."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from broker.core.audit import AuditKind, AuditRecord
from broker.core.ids import InstanceTag, LeaseId, TaskId, backend_name
from broker.core.lease import TERMINAL, Cause, Lease, LeaseState, Urgency
from broker.core.spiffe_id import SpiffeId
from broker.core.task import Task, TaskState
from inventory.audit.chain import ChainHead
from inventory.audit.public_keys import PublicKeys
from inventory.audit.slots import last_head
from inventory.audit.verify import verify_database
from inventory.store import engine
from inventory.store.writer import FactsVersion, Transaction, Writer
from tests.support.audit_log import MemoryKeys

if TYPE_CHECKING:
    import sqlite3

    from inventory.audit.report import VerificationReport

AGENT = SpiffeId("spiffe://example.org/agent/reporter")
NOW_MS = 1_700_000_000_000
_INSTANCE = InstanceTag("aaaaaa")
_KEEP: list[tempfile.TemporaryDirectory[str]] = []


@cache
def _template() -> Path:
    directory = tempfile.TemporaryDirectory(prefix="ledger-template-")
    _KEEP.append(directory)
    path = Path(directory.name) / "ledger.db"
    engine.prepare(path)
    engine.open_for_writing(path).close()
    return path


def migrated(path: Path) -> Path:
    """Put an empty ledger at `path`; Alembic runs once per test run, not once per test."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    shutil.copyfile(_template(), path)
    path.chmod(0o600)
    return path


@dataclass
class Opened:
    """One ledger with one writer, as a process has it."""

    path: Path
    keys: MemoryKeys
    writer: Writer
    connection: sqlite3.Connection
    reader: sqlite3.Connection

    @classmethod
    def at(
        cls,
        path: Path,
        keys: MemoryKeys | None = None,
        *,
        slot: int = 0,
        connection: sqlite3.Connection | None = None,
        **how: Any,
    ) -> Opened:
        keys = keys or MemoryKeys()
        connection = connection or engine.open_for_writing(path)
        writer = Writer(connection, last_head(connection, slot), keys, **how)  # type: ignore[arg-type]  # the audit half of a key store
        return cls(path, keys, writer, connection, engine.open_for_reading(path))

    async def close(self) -> None:
        await self.writer.close()
        self.reader.close()

    def rows(self, sql: str, *parameters: Any) -> list[Any]:
        return self.reader.execute(sql, parameters).fetchall()

    def kinds(self) -> list[str]:
        return [kind for (kind,) in self.rows("SELECT kind FROM audit ORDER BY slot, seq")]

    def actors(self) -> list[str]:
        return [actor for (actor,) in self.rows("SELECT actor FROM audit ORDER BY slot, seq")]

    def verify(self) -> VerificationReport:
        return verify_database(self.path, PublicKeys("test", self.keys.audit_keys()), None)


class Immediate:
    """A transaction without a writer: for tests of single statements. Commits on exit."""

    def __init__(self, path: Path) -> None:
        self._connection = engine.open_for_writing(path)
        self._keys = MemoryKeys()

    def __enter__(self) -> Transaction:
        self._connection.execute("BEGIN IMMEDIATE")
        return Transaction(self._connection, ChainHead(0, *self._head()), self._keys, FactsVersion())  # type: ignore[arg-type]  # the audit half of a key store

    def _head(self) -> tuple[int, bytes]:
        head = last_head(self._connection, 0)
        return head.seq, head.hash

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._connection.commit()
        self._connection.close()


def note(actor: str, *, at_ms: int = NOW_MS) -> AuditRecord:
    return AuditRecord(kind=AuditKind.BROKER_STARTED, at_ms=at_ms, actor=actor)


def a_task(**changes: Any) -> Task:
    task = Task(
        id=TaskId.new(),
        identity=AGENT,
        purpose="churn-report",
        description="",
        resources=(),
        actions=(),
        classification_max=None,
        budget_leases=100,
        leases_issued=0,
        inline=False,
        state=TaskState.OPEN,
        opened_ms=NOW_MS,
        deadline_ms=NOW_MS + 3_600_000,
    )
    return replace(task, **changes)


def a_lease(state: LeaseState = LeaseState.INTENT, **changes: Any) -> Lease:
    """Build a lease that may stand in `state`, whatever the moves to it would have been."""
    lease_id = changes.pop("id", None) or LeaseId.new()
    never_active = state in {LeaseState.INTENT, LeaseState.PREPARED, LeaseState.FAILED}
    lease = Lease(
        id=lease_id,
        task_id=TaskId.new(),
        identity=AGENT,
        adapter="orders",
        resource="orders-db",
        action="read",
        backend_name=backend_name(_INSTANCE, lease_id),
        state=state,
        epoch=0,
        revocability="immediate",
        created_ms=NOW_MS,
        expires_ms=NOW_MS + 300_000,
        not_after_ms=NOW_MS + 360_000,
        mint_deadline_ms=NOW_MS + 16_000,
        cause=Cause.REQUESTED,
        urgency=Urgency.EXPIRY,
        next_action_ms=None if state in TERMINAL else NOW_MS + 16_000,
        activated_ms=None if never_active else NOW_MS,
    )
    return replace(lease, **changes)
