"""Non-human identities: who was ever seen, who answers for them, what they may still do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from broker.core.audit import AuditKind, AuditRecord
from broker.core.facts import IdentityFacts, Lifecycle
from broker.core.ids import IdentityId
from broker.core.registration import Registration
from broker.core.spiffe_id import SpiffeId
from inventory.store.sql import column_names, insert_sql, select_sql
from inventory.store.tables import IdentityRow

if TYPE_CHECKING:
    import sqlite3

    from broker.core.audit import JsonValue
    from inventory.store.writer import Transaction

_NAMES: Final = column_names(IdentityRow)
_INSERT: Final = insert_sql(IdentityRow)
_SELECT: Final = select_sql(IdentityRow)
_FACTS: Final = "SELECT lifecycle, kind, owner, team, environment FROM identities WHERE spiffe_id = ?"

LIFECYCLE_MOVES: Final = frozenset(
    {
        (Lifecycle.DISCOVERED, Lifecycle.ACTIVE),
        (Lifecycle.DISCOVERED, Lifecycle.SUSPENDED),
        (Lifecycle.ACTIVE, Lifecycle.SUSPENDED),
        (Lifecycle.SUSPENDED, Lifecycle.ACTIVE),
        (Lifecycle.DISCOVERED, Lifecycle.RETIRED),
        (Lifecycle.ACTIVE, Lifecycle.RETIRED),
        (Lifecycle.SUSPENDED, Lifecycle.RETIRED),
    }
)
"""Legal moves of an identity's lifecycle; retired is the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """One inventory record. Empty strings stand for what nobody has said.

    Attributes:
        source: what first told us of it: ``registration`` or ``first_sight``.
        owner_source: who set the owner last: ``registration``, ``operator`` or empty.

    """

    id: IdentityId
    spiffe_id: SpiffeId
    kind: str
    lifecycle: Lifecycle
    owner: str
    backup_owner: str
    team: str
    environment: str
    purpose: str
    criticality: str
    source: str
    owner_source: str
    first_seen_ms: int | None
    last_used_ms: int | None
    created_ms: int

    @property
    def is_orphan(self) -> bool:
        """Whether nobody is accountable for it."""
        return not self.owner


_REGISTERED: Final = ("kind", "owner", "backup_owner", "team", "environment", "purpose", "criticality")


def from_row(row: tuple[Any, ...]) -> Identity:
    """Build an identity from a row in table order."""
    values = dict(zip(_NAMES, row, strict=True))
    values["id"] = IdentityId(values["id"])
    values["spiffe_id"] = SpiffeId(values["spiffe_id"])
    values["lifecycle"] = Lifecycle(values["lifecycle"])
    return Identity(**values)


def get(connection: sqlite3.Connection | Transaction, spiffe_id: str) -> Identity | None:
    """Return one identity."""
    row = connection.execute(f"{_SELECT} WHERE spiffe_id = ?", (spiffe_id,)).fetchone()
    return None if row is None else from_row(row)


def facts(connection: sqlite3.Connection | Transaction, spiffe_id: SpiffeId) -> IdentityFacts | None:
    """Return what policy is told of an identity, None where it was never seen."""
    row = connection.execute(_FACTS, (spiffe_id,)).fetchone()
    if row is None:
        return None
    lifecycle, kind, owner, team, environment = row
    return IdentityFacts(
        spiffe_id=spiffe_id,
        lifecycle=Lifecycle(lifecycle),
        kind=kind,
        owner=owner,
        team=team,
        environment=environment,
    )


def page(
    connection: sqlite3.Connection, *, after: str = "", limit: int = 100, query: str = ""
) -> list[Identity]:
    """Return identities in SPIFFE ID order after a cursor; `query` is a prefix of ID, owner or team."""
    pattern = query.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%"
    rows = connection.execute(
        f"{_SELECT} WHERE spiffe_id > ? AND (spiffe_id LIKE ? ESCAPE '\\' OR owner LIKE ? ESCAPE '\\' "
        "OR team LIKE ? ESCAPE '\\') ORDER BY spiffe_id LIMIT ?",
        (after, pattern, pattern, pattern, min(limit, 1000)),
    )
    return [from_row(row) for row in rows]


def of_owner(connection: sqlite3.Connection | Transaction, owner: str) -> list[str]:
    """Return the SPIFFE IDs an owner answers for."""
    rows = connection.execute("SELECT spiffe_id FROM identities WHERE owner = ? ORDER BY spiffe_id", (owner,))
    return [spiffe_id for (spiffe_id,) in rows]


def barred_but_live(connection: sqlite3.Connection) -> list[str]:
    """Return the suspended and retired identities that still have an open task or a lease."""
    rows = connection.execute(
        "SELECT spiffe_id FROM identities AS i WHERE lifecycle IN ('suspended', 'retired') AND ("
        "EXISTS (SELECT 1 FROM leases WHERE ended_ms IS NULL AND identity = i.spiffe_id) OR "
        "EXISTS (SELECT 1 FROM tasks WHERE state = 'open' AND identity = i.spiffe_id)) ORDER BY spiffe_id"
    )
    return [spiffe_id for (spiffe_id,) in rows]


def record_first_sight(
    tx: Transaction, spiffe_id: SpiffeId, registration: Registration | None, *, at_ms: int
) -> None:
    """Create the record of a caller seen for the first time; harmless where another did so already."""
    tx.facts_changed()
    if get(tx, spiffe_id) is not None:
        tx.execute(
            "UPDATE identities SET first_seen_ms = coalesce(first_seen_ms, ?), last_used_ms = ?, "
            "lifecycle = CASE lifecycle WHEN 'discovered' THEN 'active' ELSE lifecycle END "
            "WHERE spiffe_id = ?",
            (at_ms, at_ms, spiffe_id),
        )
        return
    source = "first_sight" if registration is None else "registration"
    _insert(tx, registration or Registration(spiffe_id=spiffe_id), source, at_ms=at_ms, seen=True)


def touch(tx: Transaction, spiffe_id: str, *, at_ms: int) -> None:
    """Record the last use. Callers coalesce to one write per identity and minute."""
    tx.execute("UPDATE identities SET last_used_ms = ? WHERE spiffe_id = ?", (at_ms, spiffe_id))


def register(tx: Transaction, registration: Registration, *, at_ms: int) -> None:
    """Apply a registration. An owner that an operator set by hand stays."""
    known = get(tx, registration.spiffe_id)
    if known is None:
        _insert(tx, registration, "registration", at_ms=at_ms, seen=False)
        return
    wanted = {name: getattr(registration, name) for name in _REGISTERED}
    if known.owner_source == "operator":
        for name in ("owner", "team", "environment"):
            wanted.pop(name)
    elif registration.owner:
        wanted["owner_source"] = "registration"
    changed = {name: value for name, value in wanted.items() if getattr(known, name) != value}
    if changed:
        _update(tx, known, changed, at_ms=at_ms, actor="broker", text={})


def set_owner(
    tx: Transaction,
    known: Identity,
    *,
    owner: str,
    team: str | None,
    environment: str | None,
    at_ms: int,
    actor: str,
) -> None:
    """Give an identity an accountable owner."""
    changed: dict[str, JsonValue] = {"owner": owner, "owner_source": "operator"}
    if team is not None:
        changed["team"] = team
    if environment is not None:
        changed["environment"] = environment
    _update(tx, known, changed, at_ms=at_ms, actor=actor, text={})


def set_lifecycle(
    tx: Transaction, known: Identity, target: Lifecycle, *, at_ms: int, actor: str, reason: str
) -> bool:
    """Move an identity's lifecycle; False where the table has no such move."""
    if (known.lifecycle, target) not in LIFECYCLE_MOVES:
        return False
    _update(tx, known, {"lifecycle": target}, at_ms=at_ms, actor=actor, text={"reason": reason})
    return True


def _insert(tx: Transaction, registration: Registration, source: str, *, at_ms: int, seen: bool) -> None:
    tx.facts_changed()
    identity = Identity(
        id=IdentityId.new(),
        lifecycle=Lifecycle.ACTIVE if seen else Lifecycle.DISCOVERED,
        source=source,
        owner_source="registration" if registration.owner else "",
        first_seen_ms=at_ms if seen else None,
        last_used_ms=at_ms if seen else None,
        created_ms=at_ms,
        spiffe_id=registration.spiffe_id,
        **{name: getattr(registration, name) for name in _REGISTERED},
    )
    tx.execute(_INSERT, {name: getattr(identity, name) for name in _NAMES})
    tx.audit(
        AuditRecord(
            kind=AuditKind.IDENTITY_SEEN,
            at_ms=at_ms,
            actor=registration.spiffe_id if seen else "broker",
            identity=registration.spiffe_id,
            fields={
                "source": source,
                "owner": identity.owner,
                "team": identity.team,
                "environment": identity.environment,
                "orphan": identity.is_orphan,
            },
        )
    )


def _update(
    tx: Transaction,
    known: Identity,
    changed: dict[str, JsonValue],
    *,
    at_ms: int,
    actor: str,
    text: dict[str, str],
) -> None:
    tx.facts_changed()
    columns = ", ".join(f"{name} = :{name}" for name in changed)
    tx.execute(
        f"UPDATE identities SET {columns} WHERE id = :__id",  # noqa: S608  names of ours
        {**changed, "__id": known.id},
    )
    before: dict[str, JsonValue] = {name: getattr(known, name) for name in changed}
    tx.audit(
        AuditRecord(
            kind=AuditKind.IDENTITY_CHANGED,
            at_ms=at_ms,
            actor=actor,
            identity=known.spiffe_id,
            fields={"before": before, "after": dict(changed)},
            text=text,
        )
    )
