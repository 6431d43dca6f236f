"""The INTENT transaction: decision and lease become durable together, or not at all.

It runs under the open task's row (DESIGN 4, rule 3), settles repeated requests (rule 8),
and refuses to record what was decided on facts that have changed since.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from broker.core.errors import IdentityRefused, StillMinting
from broker.core.facts import Grant, History
from broker.core.ids import DecisionId, LeaseId
from broker.core.lease import NEVER_ACTIVE, Cause, LeaseState
from broker.service import moves
from inventory import decisions, idempotency, identities, kills, ledger
from inventory import tasks as task_rows
from inventory.decisions import DecisionRecord

if TYPE_CHECKING:
    from broker.core.facts import CredentialQuestion
    from broker.core.lease import Lease
    from broker.policy.engine import Judgement
    from broker.service.context import Context
    from broker.service.issuance import CredentialRequest, Plan
    from broker.service.tasks import Tasks
    from inventory.idempotency import IdempotencyKey
    from inventory.kills import Kill
    from inventory.store.writer import Transaction


class FactsChangedError(Exception):
    """Identity, history or kill switch changed between decision and INTENT: decide again."""


class IntentLog:
    """Records what was allowed, before anything is minted."""

    def __init__(self, ctx: Context, tasks: Tasks) -> None:
        self._ctx = ctx
        self._tasks = tasks

    def record(self, tx: Transaction, plan: Plan, *, secret_digest: str | None = None) -> Lease | None:
        """Record decision and lease in one transaction, under the open task's row.

        Returns:
            None, or the ended lease that a repeated request is answered with.

        """
        lease, now_ms = plan.lease, plan.lease.created_ms
        if plan.key is not None:
            answer = self._settle_repeat(tx, plan.key, now_ms)
            if answer is not None:
                return answer
        if tx.facts_version != plan.facts_version:
            self._check_same_facts(tx, plan.question, inline=plan.inline is not None)
        if plan.inline is not None:
            self._tasks.record(tx, plan.inline)
        task_rows.take_from_budget(tx, lease.task_id, now_ms)
        decisions.record(
            tx,
            decision_record(plan.question, plan.judgement, DecisionId(lease.decision_id or "")),
            text=claims(plan.request),
        )
        grant = Grant(lease.resource, lease.action)
        self._remember_grant(tx, grant, (lease.task_id, lease.identity), now_ms)
        moves.created(
            self._ctx,
            tx,
            lease,
            actor=lease.identity,
            fields={
                "task_purpose": plan.question.task.purpose,
                "tool": plan.request.intent.tool,
                "ttl_seconds": plan.question.ttl_seconds,
                "auth_method": plan.caller.method,
                "svid_digest": plan.caller.svid_digest,
                **({} if secret_digest is None else {"secret_digest": secret_digest}),
            },
        )
        if plan.key is not None:
            idempotency.remember(tx, plan.key, lease.id, now_ms=now_ms)
        return None

    def _settle_repeat(self, tx: Transaction, key: IdempotencyKey, now_ms: int) -> Lease | None:
        """Deal with the lease an earlier request with this key made (DESIGN 4, rule 8)."""
        object_id = idempotency.seen_object(tx, key, now_ms=now_ms)
        before = None if object_id is None else ledger.get(tx, LeaseId(object_id))
        if before is None:
            return None
        if before.state in NEVER_ACTIVE:
            raise StillMinting(
                "The first request with this Idempotency-Key is still being served. Retry shortly.",
                retry_after_seconds=1,
                lease_id=before.id,
            )
        if before.state is LeaseState.ACTIVE:
            # No secret is stored, so none can be replayed: the first credential dies, a new one is made.
            moves.end(self._ctx, tx, before, Cause.SUPERSEDED, actor=key.identity)
            return None
        # A mint that never succeeded released nothing: the retry may have its credential.
        return before if before.was_active else None

    def _check_same_facts(self, tx: Transaction, question: CredentialQuestion, *, inline: bool) -> None:
        """Raise where what was decided on no longer holds."""
        identity = question.identity
        if identities.facts(tx, identity.spiffe_id) != identity:
            raise FactsChangedError
        task_id = question.task.task_id
        of_task = decisions.within({} if inline or task_id is None else decisions.grants_of(tx, task_id), 0)
        of_identity = decisions.within(
            decisions.grants_of(tx, identity.spiffe_id), self._ctx.limits.history_since_ms(question.now_ms)
        )
        if History(task=of_task, identity=of_identity) != question.history:
            raise FactsChangedError
        refuse_killed(
            kills.find(tx, identity=identity.spiffe_id, owner=identity.owner, resource=question.resource)
        )

    def _remember_grant(self, tx: Transaction, grant: Grant, scopes: tuple[str, ...], now_ms: int) -> None:
        """Add the grant to the history of task and identity, unless it was noted within the minute."""
        known = self._ctx.known
        stale = tuple(
            scope
            for scope in scopes
            if now_ms - known.last_granted_ms(scope, grant) > decisions.HISTORY_REFRESH_MS
        )
        if stale:
            decisions.remember_grant(tx, stale, grant, at_ms=now_ms)


def refuse_killed(kill: Kill | None) -> None:
    """Raise `IdentityRefused` where the kill switch covers identity, owner or resource."""
    if kill is not None:
        raise IdentityRefused(
            f"An operator has killed this {kill.scope}: nothing is issued for it until that is lifted."
        )


def claims(request: CredentialRequest) -> dict[str, str]:
    """Return the free text of a request, which the audit keeps behind a digest."""
    return {"reason": request.intent.reason} if request.intent.reason else {}


def decision_record(
    question: CredentialQuestion, judgement: Judgement, decision_id: DecisionId
) -> DecisionRecord:
    """Return a decision on a credential as it is kept."""
    return DecisionRecord(
        id=decision_id,
        at_ms=question.now_ms,
        identity=question.identity.spiffe_id,
        task_id=question.task.task_id,
        question="credential",
        decision=judgement.decision,
        policy_ids=judgement.policy_ids,
        failed_policy_ids=judgement.failed_ids,
        input=judgement.input,
    )
