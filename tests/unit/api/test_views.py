from __future__ import annotations

import secrets

import orjson

from broker.api import schemas, views
from broker.core.decision import Basis
from broker.core.ids import DecisionId, LeaseId, TaskId
from broker.core.lease import Cause, Lease, LeaseState, Urgency
from broker.core.ports import Credential
from broker.core.secret import Secret
from broker.core.spiffe_id import SpiffeId
from broker.core.task import Task, TaskEndCause, TaskState

NOW = 1_795_176_000_123


def lease(**changes: object) -> Lease:
    values = {
        "id": LeaseId.new(),
        "task_id": TaskId.new(),
        "identity": "spiffe://example.test/agent",
        "adapter": "orders",
        "resource": "orders-db",
        "action": "read",
        "backend_name": "nhi_abcdef_abcdefghijklmnop",
        "state": LeaseState.ACTIVE,
        "epoch": 1,
        "revocability": "immediate",
        "created_ms": NOW,
        "expires_ms": NOW + 300_000,
        "not_after_ms": NOW + 360_000,
        "mint_deadline_ms": NOW + 30_000,
        "cause": Cause.MINTED,
        "urgency": Urgency.TASK_END,
        "activated_ms": NOW,
        **changes,
    }
    return Lease(**values)  # type: ignore[arg-type]  # one dict for fields of many types


def task(**changes: object) -> Task:
    values = {
        "id": TaskId.new(),
        "identity": SpiffeId.parse("spiffe://example.test/agent"),
        "purpose": "churn-report",
        "description": "",
        "resources": ("orders-db",),
        "actions": (),
        "classification_max": None,
        "budget_leases": 10,
        "leases_issued": 1,
        "inline": False,
        "state": TaskState.OPEN,
        "opened_ms": NOW,
        "deadline_ms": NOW + 3_600_000,
        **changes,
    }
    return Task(**values)  # type: ignore[arg-type]  # same


def test_times_are_rfc_3339_with_milliseconds() -> None:
    assert views.render_time(1_795_176_000_007) == "2026-11-20T12:00:00.007Z"
    assert views.render_time(0) == "1970-01-01T00:00:00.000Z"


def test_a_lease_view_keeps_the_contract() -> None:
    live = orjson.dumps(views.lease_view(lease()))
    dead = orjson.dumps(
        views.lease_view(
            lease(state=LeaseState.REVOKED, ended_ms=NOW, evidence={"role": "absent", "sessions": 0})
        )
    )
    assert schemas.LeaseView.model_validate_json(live).ended_at is None
    assert schemas.LeaseView.model_validate_json(dead).evidence == {"role": "absent", "sessions": 0}


def test_a_task_view_keeps_the_contract() -> None:
    ended = task(state=TaskState.ENDED, ended_ms=NOW, end_cause=TaskEndCause.CALLER)
    schemas.TaskView.model_validate_json(orjson.dumps(views.task_view(task())))
    answer = schemas.TaskEnded.model_validate_json(orjson.dumps(views.task_ended_view(ended, [lease()])))
    assert answer.task.end_cause == "caller"


def test_a_credential_view_keeps_the_contract_and_holds_the_secret() -> None:
    password = secrets.token_hex()
    credential = Credential(
        kind="postgresql_login",
        public={"host": "h", "port": 5432, "database": "d", "username": "u", "sslmode": "require"},
        secret={"password": Secret(password)},
    )
    view = views.credential_view(
        lease(), credential, Basis(("p1",), "ab" * 32), DecisionId.new(), renewable=False
    )
    answer = schemas.CredentialAnswer.model_validate_json(orjson.dumps(view))
    assert isinstance(answer.credential, schemas.PostgresqlLogin)
    assert answer.credential.password == password
