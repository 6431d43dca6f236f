from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from broker.core.facts import (
    CredentialQuestion,
    Grant,
    History,
    IdentityFacts,
    Intent,
    Lifecycle,
    TaskFacts,
    TaskQuestion,
)
from broker.core.spiffe_id import SpiffeId
from broker.policy.catalog import Catalog
from broker.policy.engine import PolicyEngine

POLICIES = Path(__file__).parents[3] / "policies"
NOW_MS = 1_763_640_000_000

CHURN = IdentityFacts(
    spiffe_id=SpiffeId.parse("spiffe://dev.nhi.internal/agent/churn-report"),
    lifecycle=Lifecycle.ACTIVE,
    kind="agent",
    owner="mara.lindqvist@example.com",
    team="analytics",
    environment="prod",
)


@dataclass(frozen=True)
class Ask:
    """Questions of the churn-report agent, changed part by part."""

    identity: IdentityFacts = field(default=CHURN)

    def credential(
        self,
        resource: str = "orders-db",
        action: str = "read",
        *,
        task: dict[str, Any] | None = None,
        seen: tuple[str, ...] = (),
        **changes: Any,
    ) -> CredentialQuestion:
        grants = frozenset(Grant(*text.split(":")) for text in seen)
        question = CredentialQuestion(
            identity=self.identity,
            task=TaskFacts(**{"task_id": None, "purpose": "churn-report", **(task or {})}),
            resource=resource,
            action=action,
            ttl_seconds=300,
            intent=Intent(tool="sql.query", reason="churn by plan"),
            history=History(task=grants, identity=grants),
            now_ms=NOW_MS,
        )
        return replace(question, **changes)

    def task(self, purpose: str = "churn-report", **changes: Any) -> TaskQuestion:
        question = TaskQuestion(
            identity=self.identity,
            task=TaskFacts(task_id=None, purpose=purpose),
            deadline_seconds=3600,
            budget_leases=10,
            history=History(),
            now_ms=NOW_MS,
        )
        return replace(question, **changes)

    def as_identity(self, **changes: Any) -> Ask:
        return Ask(replace(self.identity, **changes))


@pytest.fixture
def ask() -> Ask:
    return Ask()


@pytest.fixture(scope="session")
def starter() -> Path:
    return POLICIES


@pytest.fixture(scope="session")
def catalog(starter: Path) -> Catalog:
    return Catalog.load(starter / "catalog.yaml")


@pytest.fixture(scope="session")
def engine(starter: Path, catalog: Catalog) -> PolicyEngine:
    return PolicyEngine.load(starter, catalog, revocability={"tokens": "immediate"})


@pytest.fixture
def folder(starter: Path, tmp_path: Path) -> Path:
    """Return a copy of the starter set that a test may change."""
    return Path(shutil.copytree(starter, tmp_path / "policies"))
