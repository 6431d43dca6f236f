"""Identities, kills, findings, idempotency keys: the rows that decisions rest on."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import orjson
import pytest

from broker.core.errors import IdempotencyMismatch
from broker.core.facts import Grant, Lifecycle
from broker.core.registration import Registration
from broker.core.spiffe_id import SpiffeId
from inventory import decisions, findings, idempotency, identities, kills
from inventory.findings import Finding
from inventory.idempotency import KEPT_MS, IdempotencyKey
from inventory.identities import LIFECYCLE_MOVES
from inventory.kills import Kill, KillScope
from tests.support.ledger import AGENT, NOW_MS, Immediate

if TYPE_CHECKING:
    from pathlib import Path

    from inventory.identities import Identity
    from inventory.store.writer import Transaction

OTHER = SpiffeId("spiffe://example.org/agent/other")


def known(tx: Transaction, spiffe_id: SpiffeId = AGENT) -> Identity:
    identity = identities.get(tx, spiffe_id)
    assert identity is not None
    return identity


def kinds(tx: Transaction) -> list[str]:
    return [kind for (kind,) in tx.execute("SELECT kind FROM audit ORDER BY seq")]


# --- identities ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "target"), list(product(Lifecycle, Lifecycle)))
def test_a_lifecycle_moves_only_as_its_table_says(
    ledger_file: Path, source: Lifecycle, target: Lifecycle
) -> None:
    with Immediate(ledger_file) as tx:
        identities.record_first_sight(tx, AGENT, None, at_ms=NOW_MS)
        tx.execute("UPDATE identities SET lifecycle = ?", (source,))
        before = kinds(tx)
        moved = identities.set_lifecycle(tx, known(tx), target, at_ms=NOW_MS, actor="op", reason="r")
        assert moved is ((source, target) in LIFECYCLE_MOVES)
        assert known(tx).lifecycle is (target if moved else source)
        assert kinds(tx) == before + (["identity.changed"] if moved else [])


def test_nothing_brings_a_retired_identity_back() -> None:
    assert not [move for move in LIFECYCLE_MOVES if move[0] is Lifecycle.RETIRED]


@pytest.mark.parametrize("barred", [Lifecycle.SUSPENDED, Lifecycle.RETIRED])
def test_being_seen_again_revives_no_barred_identity(ledger_file: Path, barred: Lifecycle) -> None:
    with Immediate(ledger_file) as tx:
        identities.record_first_sight(tx, AGENT, None, at_ms=NOW_MS)
        tx.execute("UPDATE identities SET lifecycle = ?", (barred,))
        identities.record_first_sight(tx, AGENT, Registration(spiffe_id=AGENT), at_ms=NOW_MS + 1)
        assert known(tx).lifecycle is barred


def test_a_registration_changes_what_it_says_but_no_owner_an_operator_set(ledger_file: Path) -> None:
    first = Registration(spiffe_id=AGENT, owner="a@example.com", team="one", purpose="p")
    with Immediate(ledger_file) as tx:
        identities.register(tx, first, at_ms=NOW_MS)
        assert (known(tx).lifecycle, known(tx).owner_source) == (Lifecycle.DISCOVERED, "registration")
        identities.set_owner(
            tx, known(tx), owner="b@example.com", team=None, environment=None, at_ms=NOW_MS, actor="op"
        )
        identities.register(
            tx, Registration(spiffe_id=AGENT, owner="c@example.com", team="two", purpose="q"), at_ms=NOW_MS
        )
        assert (known(tx).owner, known(tx).team, known(tx).purpose) == ("b@example.com", "one", "q")


def test_a_search_for_a_wildcard_finds_the_character_itself(ledger_file: Path) -> None:
    with Immediate(ledger_file) as tx:
        for owner, name in (("%", AGENT), ("x", OTHER)):
            identities.register(tx, Registration(spiffe_id=name, owner=owner), at_ms=NOW_MS)
        for query, found in (
            ("%", [AGENT]),
            ("_", []),
            ("\\", []),
            ("spiffe://", [AGENT, OTHER]),
            ("x", [OTHER]),
        ):
            names = [row.spiffe_id for row in identities.page(tx, query=query)]  # type: ignore[arg-type]  # reads alike
            assert names == sorted(found), query


def test_what_names_nobody_as_owner_is_nobodys(ledger_file: Path) -> None:
    """A kill of the empty owner would be a kill of every orphan."""
    with Immediate(ledger_file) as tx:
        kills.mark(tx, Kill(KillScope.OWNER, "", "r", "op", NOW_MS))
        assert kills.find(tx, identity=AGENT, owner="", resource="r") is None
        assert not Kill(KillScope.OWNER, "", "r", "op", NOW_MS).covers(AGENT, "", "r")


# --- kills ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scope", "value"),
    [(KillScope.IDENTITY, str(AGENT)), (KillScope.OWNER, "a@example.com"), (KillScope.RESOURCE, "orders-db")],
)
def test_a_kill_covers_its_scope_until_it_is_lifted_and_both_are_on_record(
    ledger_file: Path, scope: KillScope, value: str
) -> None:
    mine = {"identity": str(AGENT), "owner": "a@example.com", "resource": "orders-db"}
    foreign = {"identity": str(OTHER), "owner": "b@example.com", "resource": "other-db"}
    kill = Kill(scope, value, "theft", "op", NOW_MS)
    with Immediate(ledger_file) as tx:
        assert kills.find(tx, **mine) is None
        kills.mark(tx, kill)
        kills.mark(tx, kill)
        assert kills.find(tx, **mine) == kill
        assert kills.find(tx, **foreign) is None
        assert kill.covers(**mine)
        assert not kill.covers(**foreign)
        assert kills.lift(tx, scope, value, reason="mended", actor="op", at_ms=NOW_MS)
        assert not kills.lift(tx, scope, value, reason="mended", actor="op", at_ms=NOW_MS)
        assert kills.find(tx, **mine) is None
        assert kinds(tx) == ["kill.ordered"] * 3


# --- findings ------------------------------------------------------------------------------------


def test_a_finding_is_open_once_and_may_be_opened_again_after_it_was_closed(ledger_file: Path) -> None:
    with Immediate(ledger_file) as tx:
        for at_ms in (NOW_MS, NOW_MS + 1):
            finding = Finding("stuck", "lse_x", {"n": 1}, at_ms)
            assert findings.open_finding(tx, finding, actor="sweeper")
            assert not findings.open_finding(tx, finding, actor="sweeper")
            assert findings.close_finding(tx, "stuck", "lse_x", at_ms=at_ms, actor="sweeper")
            assert not findings.close_finding(tx, "stuck", "lse_x", at_ms=at_ms, actor="sweeper")
        assert kinds(tx) == ["finding.opened", "finding.closed"] * 2


# --- idempotency ---------------------------------------------------------------------------------

KEY = IdempotencyKey(str(AGENT), "tasks", "k", "hash")


def test_a_key_is_its_identitys_and_its_routes_alone(ledger_file: Path) -> None:
    with Immediate(ledger_file) as tx:
        idempotency.remember(tx, KEY, "tsk_a", now_ms=NOW_MS)
        assert idempotency.seen_object(tx, KEY, now_ms=NOW_MS) == "tsk_a"
        for other in (
            IdempotencyKey(str(OTHER), "tasks", "k", "hash"),
            IdempotencyKey(str(AGENT), "credentials/request", "k", "hash"),
            IdempotencyKey(str(AGENT), "tasks", "K", "hash"),
        ):
            assert idempotency.seen_object(tx, other, now_ms=NOW_MS) is None


def test_another_body_under_the_same_key_is_refused_and_changes_nothing(ledger_file: Path) -> None:
    with Immediate(ledger_file) as tx:
        idempotency.remember(tx, KEY, "tsk_a", now_ms=NOW_MS)
        with pytest.raises(IdempotencyMismatch):
            idempotency.seen_object(tx, IdempotencyKey(str(AGENT), "tasks", "k", "other"), now_ms=NOW_MS)
        assert idempotency.seen_object(tx, KEY, now_ms=NOW_MS) == "tsk_a"


def test_a_key_is_kept_for_a_day_and_then_forgotten(ledger_file: Path) -> None:
    with Immediate(ledger_file) as tx:
        idempotency.remember(tx, KEY, "tsk_a", now_ms=NOW_MS)
        assert idempotency.purge(tx, now_ms=NOW_MS + KEPT_MS - 1) == 0
        assert idempotency.seen_object(tx, KEY, now_ms=NOW_MS + KEPT_MS - 1) == "tsk_a"
        assert idempotency.seen_object(tx, KEY, now_ms=NOW_MS + KEPT_MS) is None
        assert idempotency.purge(tx, now_ms=NOW_MS + KEPT_MS) == 1


# --- history -------------------------------------------------------------------------------------


def test_a_grant_coalesced_within_the_minute_is_never_hidden(ledger_file: Path) -> None:
    grant = Grant("orders-db", "read")
    with Immediate(ledger_file) as tx:
        for at_ms in (NOW_MS, NOW_MS + 59_000):
            decisions.remember_grant(tx, ("scope",), grant, at_ms=at_ms)
        grants = decisions.grants_of(tx, "scope")
        assert grants == {grant: NOW_MS}
        # A window that begins after the first write, but before the second use, still shows it.
        assert decisions.within(grants, NOW_MS + 58_000) == {grant}


def test_a_clock_that_jumped_back_hides_no_grant(ledger_file: Path) -> None:
    grant = Grant("orders-db", "read")
    with Immediate(ledger_file) as tx:
        decisions.remember_grant(tx, ("scope",), grant, at_ms=NOW_MS + 600_000)
        decisions.remember_grant(tx, ("scope",), grant, at_ms=NOW_MS)
        assert decisions.within(decisions.grants_of(tx, "scope"), NOW_MS) == {grant}


def test_audit_of_a_change_names_before_and_after(ledger_file: Path) -> None:
    with Immediate(ledger_file) as tx:
        identities.register(tx, Registration(spiffe_id=AGENT, owner="a@example.com"), at_ms=NOW_MS)
        identities.set_owner(
            tx, known(tx), owner="b@example.com", team=None, environment=None, at_ms=NOW_MS, actor="op"
        )
        (body,) = tx.one("SELECT body FROM audit ORDER BY seq DESC LIMIT 1")
    fields = orjson.loads(body)["event"]["fields"]
    assert fields["before"]["owner"] == "a@example.com"
    assert fields["after"]["owner"] == "b@example.com"
