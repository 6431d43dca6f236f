"""Domain objects as the plain dicts that answers are written from.

orjson writes them an order of magnitude faster than a model would; a test holds each
dict to its model in `broker.api.schemas`.
"""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from broker.api.edge_errors import FieldError, InvalidInput
from broker.core.clock import MS_PER_SECOND

if TYPE_CHECKING:
    from collections.abc import Iterable

    from broker.core.decision import Basis
    from broker.core.ids import DecisionId
    from broker.core.lease import Lease
    from broker.core.ports import Credential
    from broker.core.task import Task
    from broker.service.inventory_admin import Identity
    from broker.service.offers import Offer
    from broker.service.overview import BackendStatus, Finding, Kill, Status
    from broker.service.prove import Proof


def render_time(at_ms: int) -> str:
    """Return RFC 3339 in UTC with milliseconds and Z."""
    seconds, ms = divmod(at_ms, MS_PER_SECOND)
    return f"{_to_the_second(seconds)}.{ms:03d}Z"


@lru_cache(maxsize=256)
def _to_the_second(seconds: int) -> str:
    """Return the part that all times of one second share: answers of a busy second repeat it."""
    return datetime.fromtimestamp(seconds, UTC).isoformat()[:19]


def parse_time(text: str, field: str) -> int:
    """Return the milliseconds since the epoch of what `render_time` writes.

    Raises:
        InvalidInput: there is no such date or time; `field` is where it stood.

    """
    try:
        at = datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%f%z")
    except ValueError:
        raise InvalidInput(
            "A time is not one.", [FieldError(field, "must be a date and time that exist")]
        ) from None
    return int(at.timestamp()) * MS_PER_SECOND + at.microsecond // 1000


def _time_or_null(at_ms: int | None) -> str | None:
    return None if at_ms is None else render_time(at_ms)


def lease_view(lease: Lease) -> dict[str, Any]:
    """Return a lease as its holder and operators see it. `schemas.LeaseView`."""
    return {
        "lease_id": lease.id,
        "task_id": lease.task_id or None,  # an orphan that the scan found belongs to no task
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


def catalog_item(offer: Offer) -> dict[str, Any]:
    """Return one thing a caller may ask for. `schemas.CatalogItem`."""
    granted = offer.granted
    return {
        "resource": granted.resource.id,
        "title": granted.resource.title,
        "action": granted.name,
        "effect": granted.effect,
        "classification": granted.resource.classification,
        "environment": granted.resource.environment,
        "owner": granted.resource.owner,
        "kind": offer.kind,
        "ttl_seconds_default": granted.ttl_seconds_default,
        "ttl_seconds_max": granted.ttl_seconds_max,
        "revocability": offer.revocability,
    }


# --- for operators --------------------------------------------------------------------------------


def operator_lease_view(lease: Lease) -> dict[str, Any]:
    """Return a lease as operators see it. `schemas.OperatorLease`."""
    return {
        **lease_view(lease),
        "identity": lease.identity or None,
        "backend_name": lease.backend_name,
        "created_at": render_time(lease.created_ms),
        "next_try_at": _time_or_null(lease.next_action_ms),
        "attempts": lease.attempts,
        "first_failed_at": _time_or_null(lease.first_failed_ms),
        "last_error": lease.last_error,
    }


def identity_view(identity: Identity) -> dict[str, Any]:
    """Return an inventory record. `schemas.IdentityView`."""
    return {
        "spiffe_id": identity.spiffe_id,
        "kind": identity.kind,
        "lifecycle": identity.lifecycle.value,
        "owner": identity.owner,
        "backup_owner": identity.backup_owner,
        "team": identity.team,
        "environment": identity.environment,
        "purpose": identity.purpose,
        "criticality": identity.criticality,
        "source": identity.source,
        "owner_source": identity.owner_source,
        "orphan": identity.is_orphan,
        "first_seen_at": _time_or_null(identity.first_seen_ms),
        "last_used_at": _time_or_null(identity.last_used_ms),
        "created_at": render_time(identity.created_ms),
    }


def kill_view(kill: Kill) -> dict[str, Any]:
    """Return a killed scope. `schemas.KillView`."""
    return {
        "scope": kill.scope.value,
        "value": kill.value,
        "reason": kill.reason,
        "actor": kill.actor,
        "at": render_time(kill.at_ms),
    }


def finding_view(finding: Finding) -> dict[str, Any]:
    """Return an open finding. `schemas.FindingView`."""
    return {
        "check": finding.check_id,
        "subject": finding.subject,
        "evidence": dict(finding.evidence),
        "opened_at": render_time(finding.opened_ms),
    }


def _backend_view(backend: BackendStatus) -> dict[str, Any]:
    return {
        "name": backend.name,
        "kind": backend.kind or None,
        "live": backend.live,
        "stuck": backend.stuck,
        "breaker": "open" if backend.breaker_open else "closed",
    }


def status_view(status: Status, *, version: str, problems: dict[str, str]) -> dict[str, Any]:
    """Return the broker at a glance. `schemas.StatusView`."""
    return {
        "instance": status.instance,
        "version": version,
        "policy_hash": status.policy_hash,
        "live": status.live,
        "stuck": status.stuck,
        "backends": [_backend_view(backend) for backend in status.backends],
        "ledger": {
            "waiting": status.ledger_waiting,
            "failure": status.ledger_failure,
            "audit_seq": status.audit_seq,
        },
        "readiness": readiness_view(problems),
    }


def readiness_view(problems: dict[str, str]) -> dict[str, Any]:
    """Return what keeps the broker from being ready. `schemas.ReadinessView`."""
    return {"ready": not problems, "problems": problems}


def proof_view(proof: Proof) -> dict[str, Any]:
    """Return what proving a backend showed. `schemas.ProveAnswer`."""
    return {
        "backend": proof.backend,
        "resource": proof.resource,
        "action": proof.action,
        "proven": proof.proven,
        "lease_id": proof.lease_id,
        "checks": [
            {"name": check.name, "ok": check.ok, "remedy": "" if check.ok else check.remedy}
            for check in proof.checks
        ],
        "steps": [
            {"name": step.name, "ok": step.ok, "milliseconds": step.milliseconds, "detail": dict(step.detail)}
            for step in proof.steps
        ],
    }
