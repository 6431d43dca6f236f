"""The schema, once: SQLModel metadata from which hot SQL is compiled and migrations are checked.

Times are milliseconds since the epoch in BIGINT columns (a plain ``int`` would become
int4 on PostgreSQL and overflow). Secret material has no column; `LeaseRow.sealed` and
`AuditTextRow.sealed` hold ciphertext only.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, Column, Index, LargeBinary, PrimaryKeyConstraint, text
from sqlmodel import Field, SQLModel

from broker.core.facts import Lifecycle
from broker.core.lease import TERMINAL, LeaseState
from broker.core.task import TaskState


def _quoted(values: Any) -> str:
    return ", ".join(f"'{value}'" for value in sorted(values))


def _ms(*, nullable: bool = False) -> Any:
    return Field(sa_column=Column(BigInteger, nullable=nullable))


class MetaRow(SQLModel, table=True):
    """Facts about the ledger itself: instance tag, counters reserved in blocks."""

    __tablename__ = "meta"

    key: str = Field(primary_key=True)
    value: str


class IdentityRow(SQLModel, table=True):
    """One non-human identity (DESIGN 8)."""

    __tablename__ = "identities"
    __table_args__ = (CheckConstraint(f"lifecycle IN ({_quoted(Lifecycle)})", name="identities_lifecycle"),)

    id: str = Field(primary_key=True)
    spiffe_id: str = Field(unique=True)
    kind: str
    lifecycle: str
    owner: str
    backup_owner: str
    team: str
    environment: str
    purpose: str
    criticality: str
    source: str
    owner_source: str
    first_seen_ms: int | None = _ms(nullable=True)
    last_used_ms: int | None = _ms(nullable=True)
    created_ms: int = _ms()


class TaskRow(SQLModel, table=True):
    """One task. `resources` and `actions` are JSON arrays."""

    __tablename__ = "tasks"
    __table_args__ = (
        CheckConstraint(f"state IN ({_quoted(TaskState)})", name="tasks_state"),
        Index("tasks_open_by_deadline", "deadline_ms", sqlite_where=text("state = 'open'")),
        Index("tasks_open_by_identity", "identity", sqlite_where=text("state = 'open'")),
    )

    id: str = Field(primary_key=True)
    identity: str
    purpose: str
    description: str
    resources: str
    actions: str
    classification_max: str | None
    budget_leases: int
    leases_issued: int
    inline: bool
    state: str
    opened_ms: int = _ms()
    deadline_ms: int = _ms()
    ended_ms: int | None = _ms(nullable=True)
    end_cause: str | None


class LeaseRow(SQLModel, table=True):
    """One lease; its columns are the fields of `broker.core.lease.Lease`."""

    __tablename__ = "leases"
    __table_args__ = (
        CheckConstraint(f"state IN ({_quoted(LeaseState)})", name="leases_state"),
        CheckConstraint(
            f"(state IN ({_quoted(TERMINAL)})) = (next_action_ms IS NULL)", name="leases_due_until_terminal"
        ),
        CheckConstraint("state <> 'active' OR activated_ms IS NOT NULL", name="leases_active_acknowledged"),
        # The sweeper's queue: per backend, so that a dead one starves no other; then most urgent first.
        Index(
            "leases_due",
            "adapter",
            "urgency",
            "next_action_ms",
            sqlite_where=text("next_action_ms IS NOT NULL"),
        ),
        Index("leases_by_task", "task_id"),
        Index("leases_live_by_identity", "identity", "resource", sqlite_where=text("ended_ms IS NULL")),
        Index("leases_stuck", "adapter", sqlite_where=text("stuck")),
        Index(
            "leases_by_status_index",
            "status_index",
            unique=True,
            # A status list shows what ended; a live token's insert need not touch this index.
            sqlite_where=text("status_index IS NOT NULL AND state <> 'active'"),
        ),
    )

    id: str = Field(primary_key=True)
    task_id: str
    identity: str
    adapter: str
    resource: str
    action: str
    backend_name: str
    state: str
    epoch: int
    revocability: str
    created_ms: int = _ms()
    expires_ms: int = _ms()
    not_after_ms: int = _ms()
    mint_deadline_ms: int = _ms()
    cause: str
    urgency: int
    next_action_ms: int | None = _ms(nullable=True)
    handle: str | None
    sealed: bytes | None = Field(sa_column=Column(LargeBinary, nullable=True))
    attempts: int
    first_failed_ms: int | None = _ms(nullable=True)
    stuck: bool
    last_error: str | None
    activated_ms: int | None = _ms(nullable=True)
    ended_ms: int | None = _ms(nullable=True)
    status_index: int | None = _ms(nullable=True)
    evidence: str | None
    decision_id: str | None


class DecisionRow(SQLModel, table=True):
    """One decision with its full input as canonical JSON: replayable (DESIGN 7)."""

    __tablename__ = "decisions"
    __table_args__ = ({"sqlite_with_rowid": False},)

    id: str = Field(primary_key=True)
    at_ms: int = _ms()
    identity: str
    task_id: str | None
    question: str
    outcome: str
    reason: str
    policy_ids: str
    policy_hash: str
    input: str


class HistoryRow(SQLModel, table=True):
    """What was granted in a scope (a task or an identity): the facts that history policies read."""

    __tablename__ = "history"
    __table_args__ = (PrimaryKeyConstraint("scope", "resource", "action"), {"sqlite_with_rowid": False})

    scope: str
    resource: str
    action: str
    last_ms: int = _ms()


class IdempotencyRow(SQLModel, table=True):
    """One Idempotency-Key of one identity on one route, kept 24 h (DESIGN 4, rule 8)."""

    __tablename__ = "idempotency"
    __table_args__ = (
        PrimaryKeyConstraint("identity", "route", "key"),
        Index("idempotency_by_age", "created_ms"),
        {"sqlite_with_rowid": False},
    )

    identity: str
    route: str
    key: str
    request_hash: str
    object_id: str
    created_ms: int = _ms()


class KillRow(SQLModel, table=True):
    """A scope in which nothing is issued, renewed or active until an operator lifts it."""

    __tablename__ = "kills"
    __table_args__ = (PrimaryKeyConstraint("scope", "value"), {"sqlite_with_rowid": False})

    scope: str
    value: str
    reason: str
    actor: str
    at_ms: int = _ms()


class FindingRow(SQLModel, table=True):
    """A failed check: what, on whom, the evidence, since when."""

    __tablename__ = "findings"
    __table_args__ = (
        Index(
            "findings_open",
            "check_id",
            "subject",
            unique=True,
            sqlite_where=text("closed_ms IS NULL"),
        ),
    )

    id: str = Field(primary_key=True)
    check_id: str
    subject: str
    evidence: str
    opened_ms: int = _ms()
    closed_ms: int | None = _ms(nullable=True)


class JobRow(SQLModel, table=True):
    """A periodic job's claim: each job runs once per deployment (DESIGN 4)."""

    __tablename__ = "jobs"

    name: str = Field(primary_key=True)
    due_ms: int = _ms()


class AuditRow(SQLModel, table=True):
    """One audit record; `body` holds the canonical bytes, the other columns repeat them as indices."""

    __tablename__ = "audit"
    __table_args__ = (
        PrimaryKeyConstraint("slot", "seq"),
        Index("audit_by_lease", "lease_id", sqlite_where=text("lease_id IS NOT NULL")),
        Index("audit_by_task", "task_id", sqlite_where=text("task_id IS NOT NULL")),
        {"sqlite_with_rowid": False},
    )

    slot: int
    seq: int = Field(sa_column=Column(BigInteger, nullable=False))
    at_ms: int = _ms()
    kind: str
    actor: str
    lease_id: str | None
    task_id: str | None
    identity: str | None
    decision_id: str | None
    body: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    hash: bytes = Field(sa_column=Column(LargeBinary, nullable=False))


class AuditTextRow(SQLModel, table=True):
    """Free text of a record, sealed; deleting the row erases it without breaking the chain."""

    __tablename__ = "audit_text"
    __table_args__ = (PrimaryKeyConstraint("slot", "seq", "name"), {"sqlite_with_rowid": False})

    slot: int
    seq: int = Field(sa_column=Column(BigInteger, nullable=False))
    name: str
    salt: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    sealed: bytes = Field(sa_column=Column(LargeBinary, nullable=False))


METADATA = SQLModel.metadata
"""What migrations are compared with."""
