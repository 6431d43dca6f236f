"""The spine: leases, tasks, identities, decisions, audit."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create every table."""
    op.create_table(
        "audit",
        sa.Column("slot", sa.Integer(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("at_ms", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("actor", sa.String(), nullable=False),
        sa.Column("lease_id", sa.String(), nullable=True),
        sa.Column("task_id", sa.String(), nullable=True),
        sa.Column("identity", sa.String(), nullable=True),
        sa.Column("decision_id", sa.String(), nullable=True),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("hash", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("slot", "seq"),
        sqlite_with_rowid=False,
    )
    op.create_index(
        "audit_by_lease", "audit", ["lease_id"], unique=False, sqlite_where=sa.text("lease_id IS NOT NULL")
    )
    op.create_index(
        "audit_by_task", "audit", ["task_id"], unique=False, sqlite_where=sa.text("task_id IS NOT NULL")
    )
    op.create_table(
        "audit_text",
        sa.Column("slot", sa.Integer(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("salt", sa.LargeBinary(), nullable=False),
        sa.Column("sealed", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("slot", "seq", "name"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "decisions",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("at_ms", sa.BigInteger(), nullable=False),
        sa.Column("identity", sa.String(), nullable=False),
        sa.Column("task_id", sa.String(), nullable=True),
        sa.Column("question", sa.String(), nullable=False),
        sa.Column("outcome", sa.String(), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("policy_ids", sa.String(), nullable=False),
        sa.Column("policy_hash", sa.String(), nullable=False),
        sa.Column("input", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "findings",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("check_id", sa.String(), nullable=False),
        sa.Column("subject", sa.String(), nullable=False),
        sa.Column("evidence", sa.String(), nullable=False),
        sa.Column("opened_ms", sa.BigInteger(), nullable=False),
        sa.Column("closed_ms", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(
        "findings_open",
        "findings",
        ["check_id", "subject"],
        unique=True,
        sqlite_where=sa.text("closed_ms IS NULL"),
    )
    op.create_table(
        "history",
        sa.Column("scope", sa.String(), nullable=False),
        sa.Column("resource", sa.String(), nullable=False),
        sa.Column("action", sa.String(), nullable=False),
        sa.Column("last_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("scope", "resource", "action"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "idempotency",
        sa.Column("identity", sa.String(), nullable=False),
        sa.Column("route", sa.String(), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("request_hash", sa.String(), nullable=False),
        sa.Column("object_id", sa.String(), nullable=False),
        sa.Column("created_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("identity", "route", "key"),
        sqlite_with_rowid=False,
    )
    op.create_index("idempotency_by_age", "idempotency", ["created_ms"], unique=False)
    op.create_table(
        "identities",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("spiffe_id", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("lifecycle", sa.String(), nullable=False),
        sa.Column("owner", sa.String(), nullable=False),
        sa.Column("backup_owner", sa.String(), nullable=False),
        sa.Column("team", sa.String(), nullable=False),
        sa.Column("environment", sa.String(), nullable=False),
        sa.Column("purpose", sa.String(), nullable=False),
        sa.Column("criticality", sa.String(), nullable=False),
        sa.Column("source", sa.String(), nullable=False),
        sa.Column("owner_source", sa.String(), nullable=False),
        sa.Column("first_seen_ms", sa.BigInteger(), nullable=True),
        sa.Column("last_used_ms", sa.BigInteger(), nullable=True),
        sa.Column("created_ms", sa.BigInteger(), nullable=False),
        sa.CheckConstraint(
            "lifecycle IN ('active', 'discovered', 'retired', 'suspended')", name="identities_lifecycle"
        ),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("spiffe_id"),
    )
    op.create_table(
        "jobs",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("due_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "kills",
        sa.Column("scope", sa.String(), nullable=False),
        sa.Column("value", sa.String(), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("actor", sa.String(), nullable=False),
        sa.Column("at_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("scope", "value"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "leases",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("task_id", sa.String(), nullable=False),
        sa.Column("identity", sa.String(), nullable=False),
        sa.Column("adapter", sa.String(), nullable=False),
        sa.Column("resource", sa.String(), nullable=False),
        sa.Column("action", sa.String(), nullable=False),
        sa.Column("backend_name", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("revocability", sa.String(), nullable=False),
        sa.Column("created_ms", sa.BigInteger(), nullable=False),
        sa.Column("expires_ms", sa.BigInteger(), nullable=False),
        sa.Column("not_after_ms", sa.BigInteger(), nullable=False),
        sa.Column("mint_deadline_ms", sa.BigInteger(), nullable=False),
        sa.Column("cause", sa.String(), nullable=False),
        sa.Column("urgency", sa.Integer(), nullable=False),
        sa.Column("next_action_ms", sa.BigInteger(), nullable=True),
        sa.Column("handle", sa.String(), nullable=True),
        sa.Column("sealed", sa.LargeBinary(), nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("first_failed_ms", sa.BigInteger(), nullable=True),
        sa.Column("stuck", sa.Boolean(), nullable=False),
        sa.Column("last_error", sa.String(), nullable=True),
        sa.Column("activated_ms", sa.BigInteger(), nullable=True),
        sa.Column("ended_ms", sa.BigInteger(), nullable=True),
        sa.Column("status_index", sa.BigInteger(), nullable=True),
        sa.Column("evidence", sa.String(), nullable=True),
        sa.Column("decision_id", sa.String(), nullable=True),
        sa.CheckConstraint(
            "(state IN ('abandoned', 'expired', 'failed', 'handed_out', 'revoked')) = (next_action_ms IS NULL)",
            name="leases_due_until_terminal",
        ),
        sa.CheckConstraint(
            "state <> 'active' OR activated_ms IS NOT NULL", name="leases_active_acknowledged"
        ),
        sa.CheckConstraint(
            "state IN ('abandoned', 'active', 'expired', 'failed', 'handed_out', 'intent', 'prepared', 'revoke_pending', 'revoked', 'verifying')",
            name="leases_state",
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(
        "leases_by_status_index",
        "leases",
        ["status_index"],
        unique=True,
        sqlite_where=sa.text("status_index IS NOT NULL AND state <> 'active'"),
    )
    op.create_index("leases_by_task", "leases", ["task_id"], unique=False)
    op.create_index(
        "leases_due",
        "leases",
        ["adapter", "urgency", "next_action_ms"],
        unique=False,
        sqlite_where=sa.text("next_action_ms IS NOT NULL"),
    )
    op.create_index(
        "leases_live_by_identity",
        "leases",
        ["identity", "resource"],
        unique=False,
        sqlite_where=sa.text("ended_ms IS NULL"),
    )
    op.create_index("leases_stuck", "leases", ["adapter"], unique=False, sqlite_where=sa.text("stuck"))
    op.create_table(
        "meta",
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("value", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("key"),
    )
    op.create_table(
        "tasks",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("identity", sa.String(), nullable=False),
        sa.Column("purpose", sa.String(), nullable=False),
        sa.Column("description", sa.String(), nullable=False),
        sa.Column("resources", sa.String(), nullable=False),
        sa.Column("actions", sa.String(), nullable=False),
        sa.Column("classification_max", sa.String(), nullable=True),
        sa.Column("budget_leases", sa.Integer(), nullable=False),
        sa.Column("leases_issued", sa.Integer(), nullable=False),
        sa.Column("inline", sa.Boolean(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("opened_ms", sa.BigInteger(), nullable=False),
        sa.Column("deadline_ms", sa.BigInteger(), nullable=False),
        sa.Column("ended_ms", sa.BigInteger(), nullable=True),
        sa.Column("end_cause", sa.String(), nullable=True),
        sa.CheckConstraint("state IN ('ended', 'open')", name="tasks_state"),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(
        "tasks_open_by_deadline",
        "tasks",
        ["deadline_ms"],
        unique=False,
        sqlite_where=sa.text("state = 'open'"),
    )
    op.create_index(
        "tasks_open_by_identity", "tasks", ["identity"], unique=False, sqlite_where=sa.text("state = 'open'")
    )
