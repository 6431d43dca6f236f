"""A unit of work with purpose, bounds and deadline: everything issued under it dies with it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from broker.core.ids import TaskId
    from broker.core.spiffe_id import SpiffeId

DEADLINE_SECONDS_DEFAULT: Final = 3600
LEASES_PER_TASK_MAX: Final = 1000
"""Bound on the live leases of one task tree, so that its end is one transaction (DESIGN 4)."""


class TaskState(StrEnum):
    """A task is open until its one end."""

    OPEN = "open"
    ENDED = "ended"


class TaskEndCause(StrEnum):
    """Who or what ended a task."""

    CALLER = "caller"
    DEADLINE = "deadline"
    OPERATOR = "operator"
    KILL = "kill"
    INLINE = "inline"


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One task.

    Attributes:
        purpose: a word registered in the catalog.
        resources, actions: bounds; empty means no bound beyond policy.
        classification_max: ceiling on what may be asked for, None for no ceiling.
        budget_leases: how many leases may ever be issued under it.
        deadline_ms: when the broker ends it.
        inline: opened by a credential request; ends with its only lease.

    """

    id: TaskId
    identity: SpiffeId
    purpose: str
    description: str
    resources: tuple[str, ...]
    actions: tuple[str, ...]
    classification_max: str | None
    budget_leases: int
    leases_issued: int
    inline: bool
    state: TaskState
    opened_ms: int
    deadline_ms: int
    ended_ms: int | None = None
    end_cause: TaskEndCause | None = None
