"""The services, assembled: what the listeners are given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from broker.keys.own_tokens import TokenReader
from broker.service.admit import Admission
from broker.service.audit_export import AuditExports
from broker.service.inventory_admin import InventoryAdmin
from broker.service.issue import Issue
from broker.service.kill import KillSwitch
from broker.service.lease_admin import LeaseAdmin
from broker.service.offers import Offers
from broker.service.overview import Overview
from broker.service.prove import Prove
from broker.service.reconcile import Reconcile
from broker.service.refusals import AuthenticationRefusals
from broker.service.revoke import Revoke
from broker.service.status_indices import StatusIndices
from broker.service.sweep import Sweeper
from broker.service.tasks import Tasks
from broker.service.tokens import Tokens

if TYPE_CHECKING:
    from broker.service.context import Context


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """Everything the broker does, one attribute each."""

    ctx: Context
    admission: Admission
    tasks: Tasks
    issue: Issue
    revoke: Revoke
    offers: Offers
    tokens: Tokens
    refusals: AuthenticationRefusals
    kill: KillSwitch
    leases: LeaseAdmin
    inventory: InventoryAdmin
    reconcile: Reconcile
    sweeper: Sweeper
    overview: Overview
    exports: AuditExports
    prove: Prove

    @classmethod
    def build(cls, ctx: Context, *, issuer: str, token_algorithm: str) -> Self:
        """Assemble the services around one context."""
        tasks = Tasks(ctx)
        reader = TokenReader(ctx.keys, issuer)
        return cls(
            ctx=ctx,
            admission=Admission(ctx),
            tasks=tasks,
            issue=Issue(ctx, tasks, StatusIndices(ctx.store, ctx.keys)),
            revoke=Revoke(ctx),
            offers=Offers(ctx),
            tokens=Tokens(ctx, reader, issuer=issuer, algorithm=token_algorithm),
            refusals=AuthenticationRefusals(ctx),
            kill=KillSwitch(ctx),
            leases=LeaseAdmin(ctx),
            inventory=InventoryAdmin(ctx),
            reconcile=Reconcile(ctx),
            sweeper=Sweeper(ctx),
            overview=Overview(ctx),
            exports=AuditExports(ctx),
            prove=Prove(ctx),
        )
