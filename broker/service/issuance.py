"""What passes between the steps of issuing: the request, the plan for it, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from broker.core.ports import MintRequest
from broker.core.spiffe_id import SpiffeId

if TYPE_CHECKING:
    from broker.core.caller import Caller
    from broker.core.decision import Basis
    from broker.core.facts import CredentialQuestion, Intent
    from broker.core.ids import TaskId
    from broker.core.lease import Lease
    from broker.core.ports import Credential
    from broker.policy.catalog import CatalogAction
    from broker.policy.engine import Judgement
    from broker.service.backends import Backend
    from broker.service.context import Context
    from broker.service.tasks import OpenedTask, TaskSpec
    from inventory.idempotency import IdempotencyKey


@dataclass(frozen=True, slots=True, kw_only=True)
class CredentialRequest:
    """What a caller asks for.

    Attributes:
        task: an open task of the caller's, or the specification of an inline one.
        ttl_seconds: wished lifetime; None takes the catalog's default.

    """

    task: TaskId | TaskSpec
    resource: str
    action: str
    intent: Intent
    ttl_seconds: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Issued:
    """What a caller gets. `credential` is None for a repeated request whose lease has ended."""

    lease: Lease
    credential: Credential | None
    basis: Basis | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One allowed request, ready to be recorded.

    Attributes:
        lease: in the state it is first recorded in.
        inline: the task to open with it, None under an open one.
        facts_version: what the facts decided on belong to (`KnownFacts.version`).

    """

    caller: Caller
    question: CredentialQuestion
    judgement: Judgement
    basis: Basis
    request: CredentialRequest
    granted: CatalogAction
    backend: Backend
    lease: Lease
    inline: OpenedTask | None
    key: IdempotencyKey | None
    facts_version: int


def mint_request(lease: Lease, granted: CatalogAction) -> MintRequest:
    """Return what an adapter may know of a mint."""
    return MintRequest(
        lease_id=lease.id,
        task_id=lease.task_id,
        identity=SpiffeId(lease.identity),
        backend_name=lease.backend_name,
        resource=lease.resource,
        action=lease.action,
        recipe=granted.recipe,
        now_ms=lease.created_ms,
        expires_ms=lease.expires_ms,
        not_after_ms=lease.not_after_ms,
        handle=lease.handle,
        status_index=lease.status_index,
    )


def secret_digest(ctx: Context, credential: Credential) -> str:
    """Return the keyed digest that finds this lease from a leaked secret; several secrets are joined."""
    return ",".join(ctx.keys.digest(value.reveal().encode()) for value in credential.secret.values())
