"""Each contradiction that a ledger can hold is found and named; a sound one has none."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from broker.core.lease import MOVES, LeaseState
from inventory.fsck import (
    LATE_MS,
    NotALedgerError,
    Severity,
    instance_of,
    is_untouched,
    known_revision,
    look_through,
)
from inventory.store import engine
from tests.support.world import World, opened

if TYPE_CHECKING:
    from pathlib import Path

    from inventory.fsck import Contradiction


@pytest.fixture
async def ledger(tmp_path: Path) -> Path:
    """A ledger with a revoked, an active and a failed lease, closed in good order."""
    async with opened(tmp_path) as world:
        await _live_a_little(world)
    return tmp_path / "ledger" / "ledger.db"


async def _live_a_little(world: World) -> None:
    ended = await world.open_task()
    await world.ask(ended)
    await world.end(ended)
    await world.drain()
    await world.ask(await world.open_task(), "orders-db", "read", ttl_seconds=300)
    await world.ask(await world.open_task(), "reports-api", "write")


NOW_MS = 1_700_000_000_000
PAGE_BYTES = 4096


def found(path: Path, *, now_ms: int = NOW_MS) -> list[Contradiction]:
    return list(look_through(path, now_ms=now_ms))


def tamper(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA ignore_check_constraints=ON")
        for statement in statements:
            assert connection.execute(statement).rowcount >= 1, statement
        connection.commit()


def test_a_sound_ledger_has_no_contradiction(ledger: Path) -> None:
    seen: list[tuple[str, int]] = []
    assert list(look_through(ledger, now_ms=NOW_MS, progress=lambda *more: seen.append(more))) == []
    assert known_revision(ledger)
    assert instance_of(ledger)
    assert not is_untouched(ledger)


@pytest.mark.parametrize(
    ("check", "statement"),
    [
        ("lease-audited", "UPDATE leases SET state = 'verifying', ended_ms = 1 WHERE state = 'active'"),
        ("lease-words", "UPDATE leases SET state = 'lost' WHERE state = 'active'"),
        ("lease-words", "UPDATE leases SET cause = 'whim' WHERE state = 'active'"),
        ("lease-due-until-terminal", "UPDATE leases SET next_action_ms = NULL WHERE state = 'active'"),
        ("lease-due-until-terminal", "UPDATE leases SET next_action_ms = 1 WHERE state = 'revoked'"),
        ("lease-acknowledged", "UPDATE leases SET activated_ms = NULL WHERE state = 'active'"),
        ("lease-end-time", "UPDATE leases SET ended_ms = NULL WHERE state = 'revoked'"),
        ("lease-end-time", "UPDATE leases SET ended_ms = 1 WHERE state = 'active'"),
        ("lease-nothing-left", "UPDATE leases SET stuck = 1 WHERE state = 'revoked'"),
        ("lease-nothing-left", "UPDATE leases SET sealed = x'00' WHERE state = 'revoked'"),
        ("lease-evidence", "UPDATE leases SET evidence = NULL WHERE state = 'revoked'"),
        ("lease-times", "UPDATE leases SET not_after_ms = expires_ms - 1 WHERE state = 'active'"),
        ("lease-missing", "DELETE FROM leases WHERE state = 'revoked'"),
        ("lease-audited", "UPDATE leases SET id = 'lse_unheardof' WHERE state = 'revoked'"),
        ("lease-moves", "DELETE FROM audit WHERE rowid_of_the_first_move"),
        ("lease-under-ended-task", "UPDATE tasks SET state = 'ended' WHERE state = 'open'"),
        ("lease-without-task", "DELETE FROM tasks WHERE state = 'open'"),
        ("task-budget", "UPDATE tasks SET leases_issued = 0"),
        ("task-budget", "UPDATE tasks SET leases_issued = budget_leases + 1"),
        ("lease-decided", "DELETE FROM decisions"),
        ("lease-decided", "UPDATE decisions SET outcome = 'deny'"),
        ("history", "DELETE FROM history WHERE scope LIKE 'spiffe:%'"),
        ("history", "DELETE FROM history WHERE scope LIKE 'tsk_%'"),
    ],
)
def test_each_contradiction_is_named(ledger: Path, check: str, statement: str) -> None:
    first_move = "lease_id IS NOT NULL AND json_extract(body, '$.event.fields.from') = 'intent'"
    tamper(ledger, statement.replace("rowid_of_the_first_move", first_move))
    named = {one.check for one in found(ledger) if one.severity is Severity.WRONG}
    assert check in named


def test_a_move_that_the_table_forbids_is_named(ledger: Path) -> None:
    assert (LeaseState.REVOKED, LeaseState.ACTIVE) not in {(one.source, one.target) for one in MOVES}
    statement = (
        'UPDATE audit SET body = replace(CAST(body AS TEXT), \'"to":"active"\', \'"to":"expired"\') '
        "WHERE kind = 'lease.moved'"
    )
    tamper(ledger, statement)
    assert "lease-moves" in {one.check for one in found(ledger)}


def test_what_only_waits_for_a_broker_is_late_and_not_wrong(ledger: Path) -> None:
    much_later = NOW_MS + 86_400_000
    late = found(ledger, now_ms=much_later)
    assert {one.severity for one in late} == {Severity.LATE}
    assert {one.check for one in late} == {"lease-past-its-bound", "task-past-its-deadline"}
    overdue = f"mint_deadline_ms = {NOW_MS - LATE_MS - 1}"
    statement = "UPDATE leases SET state = 'intent', activated_ms = NULL, {} WHERE state = 'active'"
    tamper(ledger, statement.format(overdue))
    assert "lease-past-its-bound" in {one.check for one in found(ledger) if one.severity is Severity.LATE}


def test_a_damaged_file_is_named_and_a_foreign_one_refused(ledger: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.write_text("no database" * 100)
    for look in (instance_of, known_revision, found):
        with pytest.raises(NotALedgerError):
            look(foreign)
    with pytest.raises(NotALedgerError):
        instance_of(tmp_path / "absent")
    empty = tmp_path / "empty.db"
    sqlite3.connect(empty).close()
    empty.touch()
    with pytest.raises(NotALedgerError, match="schema none"):
        found(empty)
    content = ledger.read_bytes()
    ledger.write_bytes(content[:-PAGE_BYTES] + b"\xff" * PAGE_BYTES)
    assert {one.check for one in found(ledger)} & {"database", "readable"}


def test_a_ledger_of_another_version_is_not_looked_through(ledger: Path) -> None:
    tamper(ledger, "UPDATE alembic_version SET version_num = '9999'")
    assert not known_revision(ledger)
    with pytest.raises(NotALedgerError, match="9999"):
        found(ledger)


def test_a_prepared_ledger_is_untouched(tmp_path: Path) -> None:
    path = tmp_path / "fresh" / "ledger.db"
    tag = engine.prepare(path)
    assert is_untouched(path)
    assert instance_of(path) == tag
