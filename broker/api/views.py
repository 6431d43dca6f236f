"""Domain objects as the plain dicts that answers are written from.

orjson writes them an order of magnitude faster than a model would; a test holds each
dict to its model in `broker.api.schemas`.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from broker.core.clock import MS_PER_SECOND

if TYPE_CHECKING:
    from collections.abc import Iterable

    from broker.core.decision import Basis
    from broker.core.ids import DecisionId
    from broker.core.lease import Lease
    from broker.core.ports import Credential
    from broker.core.task import Task


def render_time(at_ms: int) -> str:
    """Return RFC 3339 in UTC with milliseconds and Z."""
    seconds, ms = divmod(at_ms, MS_PER_SECOND)
    return f"{datetime.fromtimestamp(seconds, UTC).isoformat()[:19]}.{ms:03d}Z"


def _time_or_null(at_ms: int | None) -> str | None:
    return None if at_ms is None else render_time(at_ms)


def lease_view(lease: Lease) -> dict[str, Any]:
    """Return a lease as its holder and operators see it. `schemas.LeaseView`."""
    return {
        "lease_id": lease.id,
        "task_id": lease.task_id,
        "resource": lease.resource,
        "action": lease.action,
        "adapter": lease.adapter,
        "state": lease.state.value,
        "cause": lease.cause.value,
        "issued_at": _time_or_null(lease.activated_ms),
        "expires_at": render_time(lease.expires_ms),
        "ended_at": _time_or_null(lease.ended_ms),
        "revocability": lease.revocability,
        "stuck": lease.stuck,
        "evidence": None if lease.evidence is None else dict(lease.evidence),
    }


def task_view(task: Task) -> dict[str, Any]:
    """Return a task as its caller and operators see it. `schemas.TaskView`."""
    return {
        "task_id": task.id,
        "state": task.state.value,
        "purpose": task.purpose,
        "description": task.description,
        "resources": list(task.resources),
        "actions": list(task.actions),
        "classification_max": task.classification_max,
        "budget_leases": task.budget_leases,
        "leases_issued": task.leases_issued,
        "inline": task.inline,
        "opened_at": render_time(task.opened_ms),
        "deadline_at": render_time(task.deadline_ms),
        "ended_at": _time_or_null(task.ended_ms),
        "end_cause": None if task.end_cause is None else task.end_cause.value,
    }


def task_ended_view(task: Task, leases: Iterable[Lease]) -> dict[str, Any]:
    """Return an ended task with its leases and their proofs. `schemas.TaskEnded`."""
    return {"task": task_view(task), "leases": [lease_view(lease) for lease in leases]}


def credential_view(
    lease: Lease, credential: Credential, basis: Basis, decision_id: DecisionId, *, renewable: bool
) -> dict[str, Any]:
    """Return a minted credential for its owner, secrets in clear. `schemas.CredentialAnswer`."""
    issued_ms = lease.created_ms if lease.activated_ms is None else lease.activated_ms
    return {
        "lease_id": lease.id,
        "task_id": lease.task_id,
        "state": lease.state.value,
        "credential": credential.reveal(),
        "issued_at": render_time(issued_ms),
        "expires_at": render_time(lease.expires_ms),
        "renewable": renewable,
        "revocability": lease.revocability,
        "decision": {
            "id": decision_id,
            "policy_ids": list(basis.policy_ids),
            "policy_hash": basis.policy_hash,
        },
    }
