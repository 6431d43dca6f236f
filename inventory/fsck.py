"""Looking through a ledger for contradictions, read-only (DESIGN 10).

What the code keeps true while it runs is asked of the file again: that each lease obeys
the table of its life, that its row says what the audit log says, that nothing is alive past
its bound or under a task that has ended, and that no grant is missing from the history
which policy reads. Memory is bounded: rows stream by.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

import orjson

from broker.core.clock import MS_PER_SECOND
from broker.core.ids import InstanceTag, MalformedIdError
from broker.core.lease import ENDING, MOVES, NEVER_ACTIVE, TERMINAL, Cause, LeaseState
from inventory.store.engine import SCHEMA_REVISION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Progress = Callable[[str, int], None]

LATE_MS: Final = 120 * MS_PER_SECOND
"""How long after its bound a lease may stand before a running broker should have moved it."""

_PROGRESS_EVERY: Final = 1000
_BUSY_TIMEOUT_MS: Final = 5000
_INTEGRITY_LINES_MAX: Final = 100
_LEGAL: Final = frozenset((move.source, move.target) for move in MOVES)


class NotALedgerError(ValueError):
    """The file cannot be read as a ledger; the message says why."""


class Severity(StrEnum):
    """``wrong``: the ledger contradicts itself. ``late``: it waits for a broker to run."""

    WRONG = "wrong"
    LATE = "late"


@dataclass(frozen=True, slots=True)
class Contradiction:
    """One thing that should not be.

    Attributes:
        check: stable word for what was checked.
        subject: the lease, task or table concerned.
        detail: a sentence.

    """

    severity: Severity
    check: str
    subject: str
    detail: str


def instance_of(path: Path) -> InstanceTag:
    """Return the deployment's tag, without writing.

    Raises:
        NotALedgerError: the file holds none.

    """
    with _opened(path) as connection:
        try:
            row = connection.execute("SELECT value FROM meta WHERE key = 'instance'").fetchone()
            return InstanceTag.parse(row[0])
        except (sqlite3.Error, TypeError, MalformedIdError) as error:
            raise NotALedgerError(f"{path} holds no instance tag: it is not a broker's ledger.") from error


def is_untouched(path: Path) -> bool:
    """Say whether nothing was ever recorded, so that new keys may be made for it; without writing."""
    with _opened(path) as connection:
        try:
            return connection.execute("SELECT 1 FROM audit LIMIT 1").fetchone() is None
        except sqlite3.Error:
            return _revision(path) is None


def known_revision(path: Path) -> bool:
    """Say whether this version can read the file, after migrating it where need be.

    Raises:
        NotALedgerError: the file is not a database.

    """
    from inventory.migrations.run import known_revisions  # noqa: PLC0415  Alembic is heavy

    revision = _revision(path)
    return revision is None or revision == SCHEMA_REVISION or revision in known_revisions()


def look_through(path: Path, *, now_ms: int, progress: Progress | None = None) -> Iterator[Contradiction]:
    """Yield every contradiction, in one snapshot of the file.

    Args:
        path: the ledger's database file; a broker may be running on it.
        now_ms: what "late" is measured against.
        progress: called with the name of a check and the rows it has seen, now and then.

    Raises:
        NotALedgerError: the file cannot be read as a ledger of this version.

    """
    revision = _revision(path)
    if revision != SCHEMA_REVISION:
        raise NotALedgerError(
            f"{path} is at schema {revision or 'none'}, this version reads {SCHEMA_REVISION}: "
            "start the broker once to migrate it, or use the version that wrote it."
        )
    tell = progress or _silent
    with _opened(path) as connection:
        try:
            connection.execute("BEGIN")  # one snapshot, while a broker writes on
            yield from _database(connection)
            yield from _leases(connection, now_ms, tell)
            yield from _moves(connection, tell)
            yield from _tasks(connection, now_ms)
            yield from _grants(connection)
        except sqlite3.DatabaseError as error:
            yield Contradiction(
                Severity.WRONG, "readable", path.name, f"The database cannot be read: {error}."
            )


def _silent(_check: str, _rows: int) -> None:
    return None


def _opened(path: Path) -> closing[sqlite3.Connection]:
    try:
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)
        connection.execute(f"PRAGMA busy_timeout={_BUSY_TIMEOUT_MS}")
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.Error as error:
        raise NotALedgerError(f"{path} cannot be read as a ledger: {error}.") from error
    return closing(connection)


def _revision(path: Path) -> str | None:
    with _opened(path) as connection:
        try:
            row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        except sqlite3.Error:
            return None
        return None if row is None else str(row[0])


def _database(connection: sqlite3.Connection) -> Iterator[Contradiction]:
    """Ask SQLite itself: pages, indices, CHECK and NOT NULL constraints."""
    for (line,) in connection.execute(f"PRAGMA integrity_check({_INTEGRITY_LINES_MAX})"):
        if line != "ok":
            yield Contradiction(Severity.WRONG, "database", "file", str(line))


# --- leases, each by itself ----------------------------------------------------------------------

_LEASES: Final = (
    "SELECT id, state, cause, created_ms, expires_ms, not_after_ms, mint_deadline_ms, next_action_ms, "
    "activated_ms, ended_ms, sealed IS NOT NULL, stuck, evidence, status_index FROM leases ORDER BY id"
)


@dataclass(frozen=True, slots=True)
class _Row:
    id: str
    state: str
    cause: str
    created_ms: int
    expires_ms: int
    not_after_ms: int
    mint_deadline_ms: int
    next_action_ms: int | None
    activated_ms: int | None
    ended_ms: int | None
    has_sealed: int
    stuck: int
    evidence: str | None
    status_index: int | None


def _leases(connection: sqlite3.Connection, now_ms: int, tell: Progress) -> Iterator[Contradiction]:
    for seen, values in enumerate(connection.execute(_LEASES), start=1):
        row = _Row(*values)
        for check, detail in _broken_rules(row):
            yield Contradiction(Severity.WRONG, check, row.id, detail)
        late = _late(row, now_ms)
        if late is not None:
            yield Contradiction(Severity.LATE, "lease-past-its-bound", row.id, late)
        if seen % _PROGRESS_EVERY == 0:
            tell("leases", seen)


def _broken_rules(row: _Row) -> Iterator[tuple[str, str]]:
    try:
        state = LeaseState(row.state)
        Cause(row.cause)
    except ValueError:
        yield "lease-words", "State or cause is not a word of the table."
        return
    terminal = state in TERMINAL
    if terminal != (row.next_action_ms is None):
        yield "lease-due-until-terminal", "A live lease must be due at some time, an ended one never."
    if state is LeaseState.ACTIVE and row.activated_ms is None:
        yield "lease-acknowledged", "It is active, but no backend acknowledged it."
    if (state in ENDING or terminal) != (row.ended_ms is not None):
        yield (
            "lease-end-time",
            "A lease has the time of its end from the moment it is being ended, not before.",
        )
    if terminal and (row.has_sealed or row.stuck):
        yield "lease-nothing-left", "It has ended, but a sealed secret or the stuck flag is still there."
    if state is LeaseState.REVOKED and row.evidence is None:
        yield "lease-evidence", "It counts as proven dead, but there is no evidence."
    if row.expires_ms < row.created_ms or row.not_after_ms < row.expires_ms:
        yield (
            "lease-times",
            "It was made before it expires, and the backend's own expiry comes last: not here.",
        )


def _late(row: _Row, now_ms: int) -> str | None:
    if row.state == LeaseState.ACTIVE and row.expires_ms + LATE_MS < now_ms:
        return "It expired and is still active. A running broker ends it within seconds: is one running?"
    if row.state in NEVER_ACTIVE and row.mint_deadline_ms + LATE_MS < now_ms:
        return "Its mint should have ended long ago. A running broker revokes it: is one running?"
    if row.state in ENDING and row.not_after_ms + LATE_MS < now_ms:
        stuck = " It is stuck: see nhi leases show." if row.stuck else ""
        return f"The backend's own expiry has passed and its end is not proven yet.{stuck}"
    return None


# --- leases against the audit log ------------------------------------------------------------------

_AUDITED: Final = (
    "SELECT lease_id, body FROM audit WHERE kind = 'lease.moved' AND lease_id IS NOT NULL "
    "ORDER BY lease_id, slot, seq"
)
_LEASE_STATES: Final = "SELECT id, state FROM leases ORDER BY id"


def _moves(connection: sqlite3.Connection, tell: Progress) -> Iterator[Contradiction]:
    """Hold each row against the moves that were audited for it; both streams come in order of lease."""
    rows = connection.execute(_LEASE_STATES)
    current: Any = rows.fetchone()
    for lease_id, last, problem in _histories(connection, tell):
        while current is not None and current[0] < lease_id:
            yield _unaudited(current[0])
            current = rows.fetchone()
        if problem is not None:
            yield Contradiction(Severity.WRONG, "lease-moves", lease_id, problem)
        if current is None or current[0] != lease_id:
            yield Contradiction(
                Severity.WRONG, "lease-missing", lease_id, "The audit log knows it, the ledger does not."
            )
            continue
        if current[1] != last:
            detail = f"The ledger says {current[1]}, the audit log last said {last}."
            yield Contradiction(Severity.WRONG, "lease-audited", lease_id, detail)
        current = rows.fetchone()
    while current is not None:
        yield _unaudited(current[0])
        current = rows.fetchone()


def _unaudited(lease_id: str) -> Contradiction:
    return Contradiction(Severity.WRONG, "lease-audited", lease_id, "No audit record mentions it.")


def _histories(
    connection: sqlite3.Connection, tell: Progress
) -> Iterator[tuple[str, str | None, str | None]]:
    """Yield (lease, last audited state, what is wrong with its moves or None) in order of lease."""
    lease_id: str | None = None
    last: str | None = None
    problem: str | None = None
    for seen, (of, body) in enumerate(connection.execute(_AUDITED), start=1):
        if of != lease_id:
            if lease_id is not None:
                yield lease_id, last, problem
            lease_id, last, problem = of, None, None
        source, target = _move_of(body)
        if source != last:
            problem = (
                problem or f"A move begins at {source or 'nothing'}, but the one before ended at {last}."
            )
        elif not _is_legal(source, target):
            problem = problem or f"It moved from {source or 'nothing'} to {target}, which the table forbids."
        last = target
        if seen % _PROGRESS_EVERY == 0:
            tell("moves", seen)
    if lease_id is not None:
        yield lease_id, last, problem


def _move_of(body: bytes | str) -> tuple[str | None, str | None]:
    try:
        fields = orjson.loads(body)["event"]["fields"]
        return fields["from"], fields["to"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None, None  # `verify` names a record that cannot be read


def _is_legal(source: str | None, target: str | None) -> bool:
    try:
        return (None if source is None else LeaseState(source), LeaseState(target or "")) in _LEGAL
    except ValueError:
        return False


# --- leases against tasks, decisions and history -------------------------------------------------

_ALIVE: Final = ", ".join(f"'{state}'" for state in sorted([*NEVER_ACTIVE, LeaseState.ACTIVE]))

_UNDER_ENDED_TASK: Final = (
    "SELECT l.id FROM leases l JOIN tasks t ON t.id = l.task_id "  # noqa: S608  constants of ours
    f"WHERE t.state = 'ended' AND l.state IN ({_ALIVE})"
)
_WITHOUT_TASK: Final = (
    "SELECT l.id FROM leases l LEFT JOIN tasks t ON t.id = l.task_id WHERE l.task_id <> '' AND t.id IS NULL"
)
_OVER_BUDGET: Final = (
    "SELECT t.id FROM tasks t WHERE t.leases_issued > t.budget_leases "
    "OR t.leases_issued < (SELECT count(*) FROM leases l WHERE l.task_id = t.id)"
)
_UNDECIDED: Final = (
    "SELECT l.id FROM leases l LEFT JOIN decisions d ON d.id = l.decision_id "
    "WHERE l.task_id <> '' AND (d.id IS NULL OR d.outcome <> 'allow')"
)
_TASK_CHECKS: Final = (
    ("lease-under-ended-task", "It lives on although its task has ended.", _UNDER_ENDED_TASK),
    ("lease-without-task", "Its task is not in the ledger.", _WITHOUT_TASK),
    ("task-budget", "It has more leases than were counted, or than its budget allows.", _OVER_BUDGET),
    ("lease-decided", "No decision that allowed it is on record.", _UNDECIDED),
)

_OVERDUE_TASKS: Final = "SELECT id FROM tasks WHERE state = 'open' AND deadline_ms < ?"


def _tasks(connection: sqlite3.Connection, now_ms: int) -> Iterator[Contradiction]:
    for check, detail, sql in _TASK_CHECKS:
        for (subject,) in connection.execute(sql):
            yield Contradiction(Severity.WRONG, check, subject, detail)
    for (subject,) in connection.execute(_OVERDUE_TASKS, (now_ms - LATE_MS,)):
        detail = "Its deadline has passed and it is still open. A running broker ends it: is one running?"
        yield Contradiction(Severity.LATE, "task-past-its-deadline", subject, detail)


_FORGOTTEN: Final = (
    "SELECT l.id FROM leases l WHERE l.task_id <> '' AND NOT EXISTS (SELECT 1 FROM history h "
    "WHERE h.scope = l.{column} AND h.resource = l.resource AND h.action = l.action)"
)


def _grants(connection: sqlite3.Connection) -> Iterator[Contradiction]:
    """Every grant must be in the history of its task and identity: a gap there launders data (DESIGN 7)."""
    for column in ("task_id", "identity"):
        for (lease_id,) in connection.execute(_FORGOTTEN.format(column=column)):
            scope = "task" if column == "task_id" else "identity"
            detail = f"What it granted is missing from the history of its {scope}, which policy reads."
            yield Contradiction(Severity.WRONG, "history", lease_id, detail)
