"""Every pair of states, legal and not, against the table, the guarded moves and the database."""

from __future__ import annotations

import sqlite3
from itertools import product
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from broker.core.lease import (
    ENDING,
    MAYBE_ALIVE,
    MOVES,
    NEVER_ACTIVE,
    TERMINAL,
    Cause,
    IllegalMoveError,
    Lease,
    LeaseState,
    Urgency,
    urgency_of,
)
from inventory import ledger
from inventory.store.sql import column_names
from inventory.store.tables import LeaseRow
from tests.support.ledger import NOW_MS, Immediate, Opened, a_lease, migrated

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from inventory.store.writer import Transaction

LEGAL = {(move.source, move.target) for move in MOVES}
PAIRS = list(product([None, *LeaseState], LeaseState))
MOVED = [pair for pair in PAIRS if pair[0] is not None]
LATER_MS = NOW_MS + 5_000


def named(pair: tuple[LeaseState | None, LeaseState]) -> str:
    return f"{pair[0] or 'nothing'}-to-{pair[1]}"


def chosen(*, legal: bool, creation: bool) -> Any:
    pairs = [pair for pair in PAIRS if (pair in LEGAL) is legal and (pair[0] is None) is creation]
    return pytest.mark.parametrize(("source", "target"), pairs, ids=[named(pair) for pair in pairs])


@pytest.fixture
async def opened(tmp_path: Path) -> AsyncIterator[Opened]:
    opened = Opened.at(migrated(tmp_path / "ledger.db"))
    opened.writer.start()
    try:
        yield opened
    finally:
        await opened.close()


async def put(opened: Opened, lease: Lease) -> Lease:
    """Put a row in a state without a move, so that the audit log holds nothing of it."""

    def unit(tx: Transaction) -> Lease:
        tx.execute(ledger._INSERT, ledger._to_row(lease))
        return lease

    return await opened.writer.run(unit)


async def move(opened: Opened, lease: Lease, target: LeaseState, **changes: Any) -> Lease | None:
    def unit(tx: Transaction) -> Lease | None:
        return ledger.move(tx, lease, target, Cause.KILL, at_ms=LATER_MS, actor="test", **changes)

    return await opened.writer.run(unit)


def needed_for(target: LeaseState) -> dict[str, Any]:
    """What the caller of a move has to say besides the state, because the row's CHECKs want it."""
    if target is LeaseState.ACTIVE:
        return {"activated_ms": LATER_MS}
    return {}


def events(opened: Opened) -> list[dict[str, Any]]:
    return [orjson.loads(body)["event"] for (body,) in opened.rows("SELECT body FROM audit ORDER BY seq")]


# --- the table against DESIGN's rules ----------------------------------------------------------


def test_every_pair_of_states_is_covered() -> None:
    assert len(PAIRS) == (len(LeaseState) + 1) * len(LeaseState)
    assert set(PAIRS) >= LEGAL


def test_no_move_is_listed_twice_and_each_says_when() -> None:
    assert len(LEGAL) == len(MOVES)
    assert all(move.when for move in MOVES)


def test_the_ends_are_exactly_those_that_nothing_leaves() -> None:
    ends = {"revoked", "failed", "expired", "handed_out", "abandoned"}
    assert {str(state) for state in TERMINAL} == ends
    assert not [move for move in MOVES if move.source in TERMINAL]


def test_a_state_is_an_end_or_may_be_alive() -> None:
    assert set(LeaseState) == TERMINAL | MAYBE_ALIVE
    assert not TERMINAL & MAYBE_ALIVE
    assert ENDING < MAYBE_ALIVE
    assert NEVER_ACTIVE < MAYBE_ALIVE


def reachable_from(start: LeaseState) -> set[LeaseState]:
    reached = {start}
    while True:
        more = {move.target for move in MOVES if move.source in reached} | reached
        if more == reached:
            return reached
        reached = more


@pytest.mark.parametrize("state", sorted(MAYBE_ALIVE))
def test_every_state_that_may_be_alive_can_be_proven_dead(state: LeaseState) -> None:
    assert LeaseState.REVOKED in reachable_from(state)


@pytest.mark.parametrize("state", sorted(LeaseState))
def test_every_state_can_be_reached(state: LeaseState) -> None:
    starts = [move.target for move in MOVES if move.source is None]
    assert any(state in reachable_from(start) for start in starts)


def test_nothing_that_began_to_end_becomes_active_again() -> None:
    for state in ENDING:
        assert not reachable_from(state) & {LeaseState.ACTIVE, *NEVER_ACTIVE}


def test_proof_comes_only_from_verification_but_for_what_the_ledger_itself_is() -> None:
    sources = {move.source for move in MOVES if move.target is LeaseState.REVOKED}
    assert sources == {LeaseState.VERIFYING, LeaseState.ACTIVE}


def test_nothing_is_called_never_minted_once_a_handle_was_made() -> None:
    assert {move.source for move in MOVES if move.target is LeaseState.FAILED} == {LeaseState.INTENT}


@pytest.mark.parametrize("cause", list(Cause))
def test_a_compromise_goes_before_a_task_end_and_an_expiry_last(cause: Cause) -> None:
    compromises = {Cause.KILL, Cause.REPORTED, Cause.SUSPENDED, Cause.ORPHAN}
    if cause in compromises:
        assert urgency_of(cause) is Urgency.COMPROMISE
    elif cause is Cause.EXPIRY:
        assert urgency_of(cause) is Urgency.EXPIRY
    else:
        assert urgency_of(cause) is Urgency.TASK_END
    assert Urgency.COMPROMISE < Urgency.TASK_END < Urgency.EXPIRY


# --- creation ----------------------------------------------------------------------------------


@chosen(legal=True, creation=True)
async def test_a_lease_may_begin(opened: Opened, source: None, target: LeaseState) -> None:
    lease = a_lease(target)
    await opened.writer.run(lambda tx: ledger.insert(tx, lease, actor="test"))
    assert ledger.get(opened.reader, lease.id) == lease
    (event,) = events(opened)
    assert (event["fields"]["from"], event["fields"]["to"]) == (None, target)
    assert event["lease_id"] == lease.id


@chosen(legal=False, creation=True)
async def test_a_lease_may_not_begin(opened: Opened, source: None, target: LeaseState) -> None:
    lease = a_lease(target)
    with pytest.raises(IllegalMoveError):
        await opened.writer.run(lambda tx: ledger.insert(tx, lease, actor="test"))
    assert ledger.get(opened.reader, lease.id) is None
    assert events(opened) == []


# --- moves -------------------------------------------------------------------------------------


@chosen(legal=True, creation=False)
async def test_a_legal_move_changes_the_row_and_writes_one_record(
    opened: Opened, source: LeaseState, target: LeaseState
) -> None:
    lease = await put(opened, a_lease(source))
    moved = await move(opened, lease, target, **needed_for(target))
    assert moved is not None
    assert moved == ledger.get(opened.reader, lease.id)
    assert (moved.state, moved.cause) == (target, Cause.KILL)
    (event,) = events(opened)
    assert event["kind"] == "lease.moved"
    fields = event["fields"]
    assert (fields["from"], fields["to"], fields["cause"], fields["epoch"]) == (source, target, "kill", 0)


@chosen(legal=False, creation=False)
async def test_an_illegal_move_changes_nothing_and_writes_nothing(
    opened: Opened, source: LeaseState, target: LeaseState
) -> None:
    lease = await put(opened, a_lease(source))
    with pytest.raises(IllegalMoveError) as illegal:
        await move(opened, lease, target, **needed_for(target))
    assert str(source) in str(illegal.value)
    assert str(target) in str(illegal.value)
    assert ledger.get(opened.reader, lease.id) == lease
    assert events(opened) == []


@chosen(legal=True, creation=False)
async def test_a_stale_epoch_moves_nothing_and_writes_nothing(
    opened: Opened, source: LeaseState, target: LeaseState
) -> None:
    """I8: an old epoch never changes a row."""
    lease = await put(opened, a_lease(source, epoch=3))
    for epoch in (2, 4):
        stale = a_lease(source, id=lease.id, epoch=epoch)
        assert await move(opened, stale, target, **needed_for(target)) is None
    assert ledger.get(opened.reader, lease.id) == lease
    assert events(opened) == []


@pytest.mark.parametrize("actual", sorted(LeaseState))
@chosen(legal=True, creation=False)
async def test_a_stale_state_moves_nothing_and_writes_nothing(
    opened: Opened, source: LeaseState, target: LeaseState, actual: LeaseState
) -> None:
    lease = await put(opened, a_lease(actual))
    believed = a_lease(source, id=lease.id)
    moved = await move(opened, believed, target, **needed_for(target))
    if actual is source:
        assert moved is not None
        return
    assert moved is None
    assert ledger.get(opened.reader, lease.id) == lease
    assert events(opened) == []


@pytest.mark.parametrize("act", ["hurry", "postpone"])
@pytest.mark.parametrize("stale", ["epoch", "state"])
async def test_what_is_no_move_is_guarded_as_well(opened: Opened, act: str, stale: str) -> None:
    lease = await put(opened, a_lease(LeaseState.REVOKE_PENDING, epoch=1))
    believed = a_lease(
        LeaseState.VERIFYING if stale == "state" else LeaseState.REVOKE_PENDING,
        id=lease.id,
        epoch=0 if stale == "epoch" else 1,
    )

    def unit(tx: Transaction) -> Lease | None:
        if act == "hurry":
            return ledger.hurry(tx, believed, urgency=Urgency.COMPROMISE, at_ms=LATER_MS)
        return ledger.postpone(tx, believed, next_action_ms=LATER_MS)

    assert await opened.writer.run(unit) is None
    assert ledger.get(opened.reader, lease.id) == lease
    assert events(opened) == []


async def test_a_move_that_the_database_refuses_leaves_neither_row_nor_record(opened: Opened) -> None:
    lease = await put(opened, a_lease(LeaseState.INTENT))
    with pytest.raises(sqlite3.IntegrityError, match="leases_active_acknowledged"):
        await move(opened, lease, LeaseState.ACTIVE)
    assert ledger.get(opened.reader, lease.id) == lease
    assert events(opened) == []


async def test_a_move_and_its_record_stand_or_fall_together(opened: Opened) -> None:
    lease = await put(opened, a_lease(LeaseState.ACTIVE))

    def unit(tx: Transaction) -> None:
        moved = ledger.move(tx, lease, LeaseState.REVOKE_PENDING, Cause.KILL, at_ms=LATER_MS, actor="test")
        assert moved is not None
        raise RuntimeError("later in the same unit")

    with pytest.raises(RuntimeError):
        await opened.writer.run(unit)
    assert ledger.get(opened.reader, lease.id) == lease
    assert events(opened) == []


# --- what a move does to the row ---------------------------------------------------------------


@chosen(legal=True, creation=False)
async def test_entering_an_end_clears_what_only_the_living_need(
    opened: Opened, source: LeaseState, target: LeaseState
) -> None:
    before = a_lease(source, sealed=b"ciphertext", stuck=True)
    lease = await put(opened, before)
    moved = await move(opened, lease, target, **needed_for(target))
    assert moved is not None
    if target in TERMINAL:
        assert (moved.next_action_ms, moved.stuck, moved.sealed) == (None, False, None)
    else:
        assert (moved.next_action_ms, moved.stuck, moved.sealed) == (
            lease.next_action_ms,
            True,
            b"ciphertext",
        )


@chosen(legal=True, creation=False)
async def test_the_end_is_dated_once(opened: Opened, source: LeaseState, target: LeaseState) -> None:
    lease = await put(opened, a_lease(source))
    moved = await move(opened, lease, target, **needed_for(target))
    assert moved is not None
    alive = {LeaseState.PREPARED, LeaseState.ACTIVE}
    assert moved.ended_ms == (None if target in alive else LATER_MS)
    dated = await put(opened, a_lease(source, ended_ms=NOW_MS + 1))
    again = await move(opened, dated, target, **needed_for(target))
    assert again is not None
    assert again.ended_ms == NOW_MS + 1


# --- the database on its own -------------------------------------------------------------------


def raw_insert(path: Path, values: list[Any]) -> None:
    with Immediate(path) as tx:
        tx.execute(ledger._INSERT, values)


def row_of(standing: LeaseState, **changes: Any) -> list[Any]:
    values = dict(zip(column_names(LeaseRow), ledger._to_row(a_lease(standing)), strict=True))
    return list({**values, **changes}.values())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return migrated(tmp_path / "ledger.db")


@pytest.mark.parametrize("state", sorted(LeaseState))
def test_the_database_takes_every_state_of_the_enum(path: Path, state: LeaseState) -> None:
    raw_insert(path, row_of(state))


@pytest.mark.parametrize("word", ["", "REVOKED", "revoked ", "alive", "none", "0"])
def test_the_database_takes_no_other_state(path: Path, word: str) -> None:
    with pytest.raises(sqlite3.IntegrityError, match="leases_"):
        raw_insert(path, row_of(LeaseState.ACTIVE, state=word))


@pytest.mark.parametrize("state", sorted(LeaseState))
def test_the_database_keeps_a_lease_due_until_its_end(path: Path, state: LeaseState) -> None:
    wrong = NOW_MS if state in TERMINAL else None
    with pytest.raises(sqlite3.IntegrityError, match="leases_due_until_terminal"):
        raw_insert(path, row_of(state, next_action_ms=wrong))


def test_the_database_wants_an_active_lease_acknowledged(path: Path) -> None:
    with pytest.raises(sqlite3.IntegrityError, match="leases_active_acknowledged"):
        raw_insert(path, row_of(LeaseState.ACTIVE, activated_ms=None))


def test_two_ended_tokens_never_share_a_status_index(path: Path) -> None:
    raw_insert(path, row_of(LeaseState.EXPIRED, status_index=7))
    with pytest.raises(sqlite3.IntegrityError, match="status_index"):
        raw_insert(path, row_of(LeaseState.REVOKED, status_index=7))


def test_the_row_has_a_column_for_every_field_of_a_lease_and_no_other() -> None:
    assert {column.name for column in LeaseRow.__table__.columns} == {  # type: ignore[attr-defined]  # SQLModel sets it
        *Lease.__slots__
    }


def test_a_lease_survives_the_ledger_unchanged(path: Path) -> None:
    lease = a_lease(
        LeaseState.REVOKE_PENDING,
        handle="handle",
        sealed=b"\x00ciphertext",
        attempts=3,
        first_failed_ms=NOW_MS,
        stuck=True,
        last_error="TimeoutError",
        ended_ms=NOW_MS,
        status_index=2**40,
        evidence={"exists": False, "sessions": 0, "basis": "naïve"},
        decision_id="dec_x",
        urgency=Urgency.COMPROMISE,
    )
    raw_insert(path, ledger._to_row(lease))
    with Immediate(path) as tx:
        assert ledger.get(tx, lease.id) == lease
