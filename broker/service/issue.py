"""Issuing a credential: decide, record the intent, mint, record the success, release.

Two ways through, chosen by what the adapter declares:

- an external effect: INTENT is durable before the backend is called, ACTIVE before the
  secret leaves; whatever happens between, the ledger knows the lease and the sweeper ends it;
- no external effect (own tokens): the token is signed, then one durable commit makes the
  lease ACTIVE, then it is released.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from broker.core.clock import MS_PER_SECOND
from broker.core.decision import Allow, Deny, NeedsApproval
from broker.core.errors import Overloaded, PolicyDenied, TaskClosed, UnknownObject
from broker.core.facts import CredentialQuestion, TaskFacts
from broker.core.ids import DecisionId, LeaseId, TaskId, backend_name
from broker.core.lease import Cause, Lease, LeaseState, Urgency
from broker.core.ports import NATIVE_EXPIRY_MARGIN_SECONDS
from broker.core.task import TaskState
from broker.service.admit import check_not_barred
from broker.service.intent import FactsChangedError, IntentLog, claims, decision_record, refuse_killed
from broker.service.issuance import CredentialRequest, Issued, Plan, mint_request, secret_digest
from broker.service.mint import Mint
from inventory import decisions

if TYPE_CHECKING:
    from broker.core.caller import Caller
    from broker.core.facts import IdentityFacts
    from broker.core.task import Task
    from broker.policy.catalog import CatalogAction
    from broker.policy.engine import Judgement
    from broker.service.backends import Backend
    from broker.service.context import Context
    from broker.service.status_indices import StatusIndices
    from broker.service.tasks import OpenedTask, Tasks
    from inventory.idempotency import IdempotencyKey

FACTS_CHANGED_MAX: Final = 3
"""How often a request is decided anew because facts changed under it."""

__all__ = ["ROUTE", "CredentialRequest", "Issue", "Issued"]

ROUTE: Final = "credentials/request"


class Issue:
    """Serves `POST /credentials/request`."""

    def __init__(self, ctx: Context, task_service: Tasks, indices: StatusIndices) -> None:
        self._ctx = ctx
        self._tasks = task_service
        self._indices = indices
        self._intents = IntentLog(ctx, task_service)
        self._mint = Mint(ctx)

    async def request(
        self,
        caller: Caller,
        facts: IdentityFacts,
        request: CredentialRequest,
        key: IdempotencyKey | None = None,
    ) -> Issued:
        """Issue one credential.

        Raises:
            PolicyDenied: recorded; carries the decision.
            IdentityRefused: suspended, killed or ownerless meanwhile.
            UnknownObject: no such task of this caller.
            TaskClosed, BudgetExhausted: the task cannot take another lease.
            IdempotencyMismatch, StillMinting: the key was used before.
            BackendUnavailable, MintFailed, LeaseLost: nothing usable was released.
            LedgerUnavailable, Overloaded: nothing was released; what was recorded is being ended.

        """
        started = time.monotonic()
        for _ in range(FACTS_CHANGED_MAX):
            try:
                issued = await self._attempt(caller, facts, request, key)
            except FactsChangedError:
                continue
            if issued.credential is not None:
                self._ctx.telemetry.issued(issued.lease.adapter, time.monotonic() - started)
            return issued
        raise Overloaded(
            "What policy knows of this identity kept changing while it was decided; retry.",
            retry_after_seconds=1,
        )

    async def _attempt(
        self,
        caller: Caller,
        facts: IdentityFacts,
        request: CredentialRequest,
        key: IdempotencyKey | None,
    ) -> Issued:
        plan = await self._decide(caller, facts, request, key)
        if plan.backend.has_external_effect:
            return await self._issue_through_backend(plan)
        return await self._issue_own_token(plan)

    # --- deciding ------------------------------------------------------------------------------

    async def _decide(
        self,
        caller: Caller,
        facts: IdentityFacts,
        request: CredentialRequest,
        key: IdempotencyKey | None,
    ) -> Plan:
        """Ask policy; record and raise a refusal, return a plan for an Allow."""
        known, now_ms = self._ctx.known, self._ctx.clock.now_ms()
        facts_version = known.refresh()
        facts = known.identity(caller.spiffe_id) or facts
        # It may have been suspended or killed since it was admitted.
        check_not_barred(facts, require_owner=self._ctx.limits.require_owner)
        refuse_killed(known.kill(identity=facts.spiffe_id, owner=facts.owner, resource=request.resource))
        inline, task = await self._task_of(caller, facts, request, now_ms)
        granted = self._ctx.catalog.action(request.resource, request.action)
        ttl_seconds = _ttl_seconds(request, granted, task, now_ms)
        question = CredentialQuestion(
            identity=facts,
            task=TaskFacts(
                task_id=task.id,
                purpose=task.purpose,
                resources=task.resources,
                actions=task.actions,
                classification_max=task.classification_max,
            ),
            resource=request.resource,
            action=request.action,
            ttl_seconds=ttl_seconds,
            intent=request.intent,
            history=known.history(
                task=task.id if inline is None else None,
                identity=caller.spiffe_id,
                since_ms=self._ctx.limits.history_since_ms(now_ms),
            ),
            now_ms=now_ms,
        )
        judgement = self._ctx.policy.decide_credential(question)
        decision = judgement.decision
        decision_id = DecisionId.new()
        if not isinstance(decision, Allow) or granted is None:
            await self._record_refusal(question, judgement, decision_id, request)
            raise PolicyDenied(_refusal(judgement), decision_id)
        backend = self._ctx.backends.of(granted.adapter)
        backend.check_ttl(ttl_seconds)
        if backend.has_external_effect:
            backend.check_available()
        lease = await self._lease(question, backend, decision_id)
        return Plan(
            caller=caller,
            question=question,
            judgement=judgement,
            basis=decision.basis,
            request=request,
            granted=granted,
            backend=backend,
            lease=lease,
            inline=inline,
            key=key,
            facts_version=facts_version,
        )

    async def _task_of(
        self, caller: Caller, facts: IdentityFacts, request: CredentialRequest, now_ms: int
    ) -> tuple[OpenedTask | None, Task]:
        if isinstance(request.task, TaskId):
            task = self._ctx.known.task(request.task)
            if task is None or task.identity != caller.spiffe_id:
                raise UnknownObject
            if task.state is not TaskState.OPEN or task.deadline_ms <= now_ms:
                raise TaskClosed(
                    "The task has ended; nothing more is issued under it. Open another task.",
                    task_id=task.id,
                )
            return None, task
        opened = await self._tasks.decide(caller, facts, replace(request.task, inline=True, budget_leases=1))
        return opened, opened.task

    async def _record_refusal(
        self,
        question: CredentialQuestion,
        judgement: Judgement,
        decision_id: DecisionId,
        request: CredentialRequest,
    ) -> None:
        record = decision_record(question, judgement, decision_id)
        text = claims(request)
        await self._ctx.store.writer.run(lambda tx: decisions.record(tx, record, text=text))

    async def _lease(
        self,
        question: CredentialQuestion,
        backend: Backend,
        decision_id: DecisionId,
    ) -> Lease:
        """Build the lease in the state it is first recorded in."""
        now_ms = question.now_ms
        lease_id = LeaseId.new()
        expires_ms = now_ms + question.ttl_seconds * MS_PER_SECOND
        external = backend.has_external_effect
        mint_deadline_ms = now_ms + (self._ctx.limits.mint_deadline_seconds + 1) * MS_PER_SECOND
        margin_ms = NATIVE_EXPIRY_MARGIN_SECONDS * MS_PER_SECOND if external else 0
        return Lease(
            id=lease_id,
            task_id=question.task.task_id or TaskId(""),
            identity=question.identity.spiffe_id,
            adapter=backend.name,
            resource=question.resource,
            action=question.action,
            backend_name=backend_name(self._ctx.store.instance, lease_id),
            state=LeaseState.INTENT if external else LeaseState.ACTIVE,
            epoch=0,
            revocability=str(backend.capabilities.revocability),
            created_ms=now_ms,
            expires_ms=expires_ms,
            not_after_ms=expires_ms + margin_ms,
            mint_deadline_ms=mint_deadline_ms,
            cause=Cause.REQUESTED,
            urgency=Urgency.EXPIRY,
            next_action_ms=mint_deadline_ms if external else expires_ms,
            activated_ms=None if external else now_ms,
            status_index=None if external else await self._indices.take(),
            decision_id=decision_id,
        )

    # --- own tokens: one commit ----------------------------------------------------------------

    async def _issue_own_token(self, plan: Plan) -> Issued:
        minted = await plan.backend.adapter.mint(mint_request(plan.lease, plan.granted))
        digest = secret_digest(self._ctx, minted.credential)
        answer = await self._ctx.store.writer.run(
            lambda tx: self._intents.record(tx, plan, secret_digest=digest)
        )
        if answer is not None:
            return Issued(lease=answer, credential=None, basis=None)
        return Issued(lease=plan.lease, credential=minted.credential, basis=plan.basis)

    # --- external backends: intent, mint, activate ------------------------------------------------

    async def _issue_through_backend(self, plan: Plan) -> Issued:
        answer = await self._ctx.store.writer.run(lambda tx: self._intents.record(tx, plan))
        if answer is not None:
            return Issued(lease=answer, credential=None, basis=None)
        # From here on a backend may hold something: a caller that leaves must not stop the record.
        return await asyncio.shield(asyncio.ensure_future(self._mint.mint_and_activate(plan)))


def _ttl_seconds(request: CredentialRequest, granted: CatalogAction | None, task: Task, now_ms: int) -> int:
    """Return the lifetime to decide on: what was asked or the default, never past the task's deadline."""
    asked = request.ttl_seconds
    if asked is None:
        asked = 60 if granted is None else granted.ttl_seconds_default
    remaining = (task.deadline_ms - now_ms) // MS_PER_SECOND
    if remaining < 1:
        raise TaskClosed(
            "The task ends within a second; nothing more is issued under it. Open another task.",
            task_id=task.id,
        )
    return max(1, min(asked, remaining))


def _refusal(judgement: Judgement) -> Deny | NeedsApproval:
    decision = judgement.decision
    if isinstance(decision, Allow):
        # Policy allowed what the catalog does not contain: refuse, and let the record show it.
        return Deny(decision.basis, "There is no such resource and action in the catalog.")
    return decision
