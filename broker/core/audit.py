"""What the audit log records. Its bytes, chain and verification live in ``inventory.audit``."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping

JsonValue: TypeAlias = (
    "str | int | bool | list[JsonValue] | tuple[JsonValue, ...] | Mapping[str, JsonValue] | None"
)
"""The canonical subset: no floats, integers below 2^53, ASCII keys (DESIGN 9)."""


class AuditKind(StrEnum):
    """One word per kind of event."""

    DECISION = "decision.made"
    LEASE_MOVED = "lease.moved"
    TASK_OPENED = "task.opened"
    TASK_ENDED = "task.ended"
    AUTHENTICATION_REFUSED = "authentication.refused"
    IDENTITY_SEEN = "identity.first_seen"
    IDENTITY_CHANGED = "identity.changed"
    KILL = "kill.ordered"
    LEASE_RETRIED = "lease.retry_ordered"
    POLICY_LOADED = "policy.loaded"
    KEY_ROTATED = "key.rotated"
    FINDING_OPENED = "finding.opened"
    FINDING_CLOSED = "finding.closed"
    AUDIT_EXPORTED = "audit.exported"
    BROKER_STARTED = "broker.started"
    BROKER_STOPPED = "broker.stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRecord:
    """One event, written in the same transaction as the change it describes.

    Attributes:
        actor: who caused it: a SPIFFE ID, ``operator:uid=0``, ``sweeper``, ``broker``.
        fields: the facts; never a secret, never free text.
        text: free text of people or callers, kept behind a salted digest so that it can be erased.

    """

    kind: AuditKind
    at_ms: int
    actor: str
    lease_id: str | None = None
    task_id: str | None = None
    identity: str | None = None
    decision_id: str | None = None
    fields: Mapping[str, JsonValue] = field(default_factory=dict)
    text: Mapping[str, str] = field(default_factory=dict)
