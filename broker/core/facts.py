"""What policy is given: facts the broker knows, and claims the caller makes, kept apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from broker.core.ids import TaskId
    from broker.core.spiffe_id import SpiffeId


class Lifecycle(StrEnum):
    """Where an identity stands in the inventory."""

    DISCOVERED = "discovered"
    ACTIVE = "active"
    SUSPENDED = "suspended"
    RETIRED = "retired"


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentityFacts:
    """The inventory's view of the caller. `owner`, `team`, `environment` are empty where unknown."""

    spiffe_id: SpiffeId
    lifecycle: Lifecycle
    kind: str = "workload"
    owner: str = ""
    team: str = ""
    environment: str = ""


@dataclass(frozen=True, slots=True, order=True)
class Grant:
    """One thing that was granted: what history is made of."""

    resource: str
    action: str


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What was granted before, so that a new task launders nothing (DESIGN 7).

    Attributes:
        task: grants of the root task's whole tree.
        identity: grants of the identity within the history window, across all its tasks.

    """

    task: frozenset[Grant] = field(default_factory=frozenset)
    identity: frozenset[Grant] = field(default_factory=frozenset)


@dataclass(frozen=True, slots=True, kw_only=True)
class Intent:
    """What the caller says it is about to do. Claims, not facts."""

    tool: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFacts:
    """The task a request is made under, or the one it asks to open (`task_id` None then)."""

    task_id: TaskId | None
    purpose: str
    resources: tuple[str, ...] = ()
    actions: tuple[str, ...] = ()
    classification_max: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CredentialQuestion:
    """May this identity get this credential, under this task, now?"""

    identity: IdentityFacts
    task: TaskFacts
    resource: str
    action: str
    ttl_seconds: int
    intent: Intent
    history: History
    now_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskQuestion:
    """May this identity open this task?"""

    identity: IdentityFacts
    task: TaskFacts
    deadline_seconds: int
    budget_leases: int
    history: History
    now_ms: int
