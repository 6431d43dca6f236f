"""The life of a lease, as one table (DESIGN 4).

The table feeds the ledger's guarded moves, the database CHECK, the diagram in
``docs/lease-life.md`` and the exhaustive transition test. Nothing else decides
whether a lease may move.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from broker.core.ids import LeaseId, TaskId


class LeaseState(StrEnum):
    """Where one credential stands between the intent to mint it and the proof of its end."""

    INTENT = "intent"
    PREPARED = "prepared"
    ACTIVE = "active"
    REVOKE_PENDING = "revoke_pending"
    VERIFYING = "verifying"
    REVOKED = "revoked"
    FAILED = "failed"
    EXPIRED = "expired"
    HANDED_OUT = "handed_out"
    ABANDONED = "abandoned"


@dataclass(frozen=True, slots=True)
class Move:
    """One legal transition; `source` None is creation."""

    source: LeaseState | None
    target: LeaseState
    when: str


_S = LeaseState

MOVES: Final[tuple[Move, ...]] = (
    Move(None, _S.INTENT, "allowed, budget and open task checked, committed before any backend call"),
    Move(None, _S.ACTIVE, "no external effect: one durable commit before the token is released"),
    Move(None, _S.REVOKE_PENDING, "the scan found a live object of ours without a live row"),
    Move(_S.INTENT, _S.PREPARED, "a two-step adapter recorded the handle that kills what comes next"),
    Move(_S.INTENT, _S.ACTIVE, "the backend acknowledged and the task is still open"),
    Move(_S.PREPARED, _S.ACTIVE, "the backend acknowledged and the task is still open"),
    Move(_S.INTENT, _S.FAILED, "the adapter proves that nothing was minted"),
    Move(_S.INTENT, _S.REVOKE_PENDING, "ambiguous error, mint deadline passed, or task ended"),
    Move(_S.PREPARED, _S.REVOKE_PENDING, "ambiguous error, mint deadline passed, or task ended"),
    Move(_S.ACTIVE, _S.ACTIVE, "renewed, never past the task's deadline or the catalog's ceiling"),
    Move(_S.ACTIVE, _S.REVOKE_PENDING, "task end, expiry, kill, reported, superseded"),
    Move(_S.ACTIVE, _S.REVOKED, "no external effect: the ledger is the backend"),
    Move(_S.ACTIVE, _S.HANDED_OUT, "revocability none: the value outlives us, a finding stays open"),
    Move(_S.REVOKE_PENDING, _S.VERIFYING, "the backend accepted the revocation"),
    Move(_S.VERIFYING, _S.REVOKED, "verification saw it absent; evidence stored"),
    Move(_S.VERIFYING, _S.REVOKE_PENDING, "verification saw it present"),
    Move(_S.REVOKE_PENDING, _S.EXPIRED, "by expiry, not revoked: expiry_only, or stuck past native expiry"),
    Move(_S.VERIFYING, _S.EXPIRED, "by expiry, not revoked: expiry_only, or stuck past native expiry"),
    Move(_S.REVOKE_PENDING, _S.ABANDONED, "an operator, with a reason, only when stuck"),
    Move(_S.VERIFYING, _S.ABANDONED, "an operator, with a reason, only when stuck"),
)

_LEGAL: Final = frozenset((move.source, move.target) for move in MOVES)

TERMINAL: Final = frozenset(LeaseState) - {move.source for move in MOVES}
"""States that nothing leaves."""

MAYBE_ALIVE: Final = frozenset({_S.INTENT, _S.PREPARED, _S.ACTIVE, _S.REVOKE_PENDING, _S.VERIFYING})
"""States in which the backend may hold a usable credential."""

ENDING: Final = frozenset({_S.REVOKE_PENDING, _S.VERIFYING})
"""States the sweeper works through."""

NEVER_ACTIVE: Final = frozenset({_S.INTENT, _S.PREPARED})
"""States before the backend acknowledged."""


class IllegalMoveError(RuntimeError):
    """The table does not contain this move: a defect of ours, never a caller's."""


def check_move(source: LeaseState | None, target: LeaseState) -> None:
    """Raise `IllegalMoveError` unless the table allows `source` -> `target`."""
    if (source, target) not in _LEGAL:
        msg = f"a lease does not move from {source or 'nothing'} to {target}"
        raise IllegalMoveError(msg)


class Cause(StrEnum):
    """Why a lease moved; a stable word for audit, metrics and evidence."""

    REQUESTED = "requested"
    MINTED = "minted"
    MINT_REFUSED = "mint_refused"
    MINT_AMBIGUOUS = "mint_ambiguous"
    MINT_DEADLINE = "mint_deadline"
    TASK_END = "task_end"
    EXPIRY = "expiry"
    RELEASED = "released"
    KILL = "kill"
    REPORTED = "reported"
    SUPERSEDED = "superseded"
    SUSPENDED = "suspended"
    ORPHAN = "orphan"
    OBJECT_GONE = "object_gone"
    NATIVE_EXPIRY = "native_expiry"
    ABANDONED = "abandoned"


class Urgency(IntEnum):
    """Order of the sweeper's queue: lower goes first."""

    COMPROMISE = 0
    TASK_END = 1
    EXPIRY = 2


URGENCY_OF: Final[Mapping[Cause, Urgency]] = {
    Cause.KILL: Urgency.COMPROMISE,
    Cause.REPORTED: Urgency.COMPROMISE,
    Cause.SUSPENDED: Urgency.COMPROMISE,
    Cause.ORPHAN: Urgency.COMPROMISE,
}
"""Causes not listed are `Urgency.TASK_END`, but for `Cause.EXPIRY`."""


def urgency_of(cause: Cause) -> Urgency:
    """Return the queue position that a cause earns."""
    if cause is Cause.EXPIRY:
        return Urgency.EXPIRY
    return URGENCY_OF.get(cause, Urgency.TASK_END)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The broker's record of one credential. Holds no secret.

    Attributes:
        identity: SPIFFE ID the credential was minted for.
        backend_name: deterministic name of the object in the backend.
        handle: what the backend needs besides the name to revoke; opaque, not secret.
        sealed: an encrypted secret, only where the backend needs it to revoke.
        epoch: raised by each claim; a guarded move names the epoch it saw.
        expires_ms: when the broker ends it; `not_after_ms` is the backend's own, later, backstop.
        next_action_ms: when the sweeper is due to look at it; None in terminal states.
        first_failed_ms: start of the present run of failed revocations, None when none failed.
        activated_ms: when the backend acknowledged, None if it never did.
        ended_ms: when it reached REVOKE_PENDING or an end.
        status_index: position in the Token Status Lists, own tokens only.

    """

    id: LeaseId
    task_id: TaskId
    identity: str
    adapter: str
    resource: str
    action: str
    backend_name: str
    state: LeaseState
    epoch: int
    revocability: str
    created_ms: int
    expires_ms: int
    not_after_ms: int
    mint_deadline_ms: int
    cause: Cause
    urgency: Urgency
    next_action_ms: int | None = None
    handle: str | None = None
    sealed: bytes | None = None
    attempts: int = 0
    first_failed_ms: int | None = None
    stuck: bool = False
    last_error: str | None = None
    activated_ms: int | None = None
    ended_ms: int | None = None
    status_index: int | None = None
    evidence: Mapping[str, str | int | bool] | None = None
    decision_id: str | None = None

    @property
    def was_active(self) -> bool:
        """Whether the backend ever acknowledged the mint."""
        return self.activated_ms is not None
