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
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import structlog

from broker.core.clock import MS_PER_SECOND
from broker.core.decision import Allow, Basis, Deny, NeedsApproval
from broker.core.errors import (
    BrokerError,
    IdentityRefused,
    LeaseLost,
    MintFailed,
    Overloaded,
    PolicyDenied,
    StillMinting,
    TaskClosed,
    UnknownObject,
)
from broker.core.facts import CredentialQuestion, Grant, History, TaskFacts
from broker.core.ids import DecisionId, LeaseId, TaskId, backend_name
from broker.core.lease import NEVER_ACTIVE, Cause, Lease, LeaseState, Urgency
from broker.core.ports import NATIVE_EXPIRY_MARGIN_SECONDS, ErrorClass, Minted, MintRequest, Target
from broker.core.spiffe_id import SpiffeId
from broker.core.task import TaskState
from broker.service import moves, tasks
from broker.service.admit import BARRED, check_not_barred
from inventory import decisions, idempotency, identities, kills, ledger
from inventory import tasks as task_rows
from inventory.decisions import DecisionRecord

if TYPE_CHECKING:
    from broker.core.caller import Caller
    from broker.core.facts import IdentityFacts, Intent
    from broker.core.ports import Credential
    from broker.core.task import Task
    from broker.policy.catalog import CatalogAction
    from broker.policy.engine import Judgement
    from broker.service.backends import Backend
    from broker.service.context import Context
    from broker.service.status_indices import StatusIndices
    from broker.service.tasks import TaskSpec
    from inventory.idempotency import IdempotencyKey
    from inventory.kills import Kill
    from inventory.store.writer import Transaction

log = structlog.get_logger(__name__)

FACTS_CHANGED_MAX: Final = 3
"""How often a request is decided anew because facts changed under it."""

ROUTE: Final = "credentials/request"


class FactsChangedError(Exception):
    """Identity, history or kill switch changed between decision and INTENT: decide again."""


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
class _Plan:
    """One allowed request, ready to be recorded."""

    caller: Caller
    question: CredentialQuestion
    judgement: Judgement
    basis: Basis
    request: CredentialRequest
    granted: CatalogAction
    backend: Backend
    lease: Lease
    inline: tasks.OpenedTask | None
    key: IdempotencyKey | None
    facts_version: int


class Issue:
    """Serves `POST /credentials/request`."""

    def __init__(self, ctx: Context, task_service: tasks.Tasks, indices: StatusIndices) -> None:
        self._ctx = ctx
        self._tasks = task_service
        self._indices = indices

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
    ) -> _Plan:
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
                since_ms=self._since_ms(now_ms),
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
        return _Plan(
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
    ) -> tuple[tasks.OpenedTask | None, Task]:
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
        record = _decision_record(question, judgement, decision_id)
        text = _claims(request)
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

    # --- recording -----------------------------------------------------------------------------

    def _record(self, tx: Transaction, plan: _Plan, *, secret_digest: str | None = None) -> Lease | None:
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
            _decision_record(plan.question, plan.judgement, DecisionId(lease.decision_id or "")),
            text=_claims(plan.request),
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
            decisions.grants_of(tx, identity.spiffe_id), self._since_ms(question.now_ms)
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

    def _since_ms(self, now_ms: int) -> int:
        return now_ms - self._ctx.limits.history_window_seconds * MS_PER_SECOND

    # --- own tokens: one commit ----------------------------------------------------------------

    async def _issue_own_token(self, plan: _Plan) -> Issued:
        minted = await plan.backend.adapter.mint(_mint_request(plan.lease, plan.granted))
        digest = _secret_digest(self._ctx, minted.credential)
        answer = await self._ctx.store.writer.run(lambda tx: self._record(tx, plan, secret_digest=digest))
        if answer is not None:
            return Issued(lease=answer, credential=None, basis=None)
        return Issued(lease=plan.lease, credential=minted.credential, basis=plan.basis)

    # --- external backends: intent, mint, activate ------------------------------------------------

    async def _issue_through_backend(self, plan: _Plan) -> Issued:
        answer = await self._ctx.store.writer.run(lambda tx: self._record(tx, plan))
        if answer is not None:
            return Issued(lease=answer, credential=None, basis=None)
        # From here on a backend may hold something: a caller that leaves must not stop the record.
        return await asyncio.shield(asyncio.ensure_future(self._mint_and_activate(plan)))

    async def _mint_and_activate(self, plan: _Plan) -> Issued:
        lease = plan.lease
        try:
            async with plan.backend.minting(lease):
                lease, minted = await self._mint(plan.backend, lease, plan.granted)
        except BrokerError:
            raise
        except Exception as error:
            # Every vendor's exception ends here: the adapter says what it means for the lease.
            raise await self._mint_failed(plan.backend, lease, error) from error
        digest = _secret_digest(self._ctx, minted.credential)
        active = await self._ctx.store.writer.run(lambda tx: self._activate(tx, lease, minted, digest))
        if active is None:
            self._ctx.telemetry.mint_failed(lease.adapter, "lost")
            await self._revoke_lost(plan, lease, minted)
            raise _lost(lease)
        return Issued(lease=active, credential=minted.credential, basis=plan.basis)

    async def _mint(self, backend: Backend, lease: Lease, granted: CatalogAction) -> tuple[Lease, Minted]:
        request = _mint_request(lease, granted)
        handle = await backend.adapter.prepare(request)
        if handle is not None:
            prepared = await self._ctx.store.writer.run(
                lambda tx: moves.move(
                    self._ctx,
                    tx,
                    lease,
                    LeaseState.PREPARED,
                    Cause.REQUESTED,
                    actor=lease.identity,
                    handle=handle,
                )
            )
            if prepared is None:
                raise _lost(lease)
            lease, request = prepared, replace(request, handle=handle)
        return lease, await backend.adapter.mint(request)

    async def _revoke_lost(self, plan: _Plan, lease: Lease, minted: Minted) -> None:
        """Undo a mint whose lease was ended meanwhile (rule 2).

        The sweeper proves the end; but only here the handle is known that the backend gave it.
        """
        target = Target(
            lease_id=lease.id,
            backend_name=lease.backend_name,
            recipe=plan.granted.recipe,
            handle=minted.handle if minted.handle is not None else lease.handle,
            kept=minted.keep,
        )
        try:
            with plan.backend.observed():
                async with asyncio.timeout(self._ctx.limits.claim_visibility_seconds):
                    await plan.backend.adapter.revoke(target)
        except Exception as error:  # noqa: BLE001  any vendor's exception: the sweeper goes on trying
            log.warning("issue.lost_mint_not_revoked", lease_id=lease.id, error=type(error).__name__)

    def _activate(self, tx: Transaction, lease: Lease, minted: Minted, digest: str) -> Lease | None:
        """Move to ACTIVE. Only whoever gets a lease back here may release the secret (rule 2).

        A task that ended meanwhile moved the lease in its own transaction, so the guard sees it;
        a kill and a suspension close their scope first and move its leases afterwards.
        """
        overtaken = self._overtaken_by(tx, lease)
        if overtaken is not None:
            moves.end(self._ctx, tx, lease, overtaken, actor="broker")
            return None
        sealed = None
        if minted.keep is not None:
            sealed = self._ctx.keys.seal(minted.keep.reveal(), lease.id.encode())
        return moves.move(
            self._ctx,
            tx,
            lease,
            LeaseState.ACTIVE,
            Cause.MINTED,
            actor=lease.identity,
            fields={"secret_digest": digest},
            handle=minted.handle if minted.handle is not None else lease.handle,
            sealed=sealed,
            activated_ms=self._ctx.clock.now_ms(),
            next_action_ms=lease.expires_ms,
        )

    def _overtaken_by(self, tx: Transaction, lease: Lease) -> Cause | None:
        """Return why a credential minted a moment ago must not be released any more."""
        holder = identities.facts(tx, SpiffeId(lease.identity))
        if holder is None or holder.lifecycle in BARRED:
            return Cause.SUSPENDED
        if kills.find(tx, identity=lease.identity, owner=holder.owner, resource=lease.resource) is not None:
            return Cause.KILL
        return Cause.EXPIRY if lease.expires_ms <= self._ctx.clock.now_ms() else None

    async def _mint_failed(self, backend: Backend, lease: Lease, error: Exception) -> MintFailed:
        """Move the lease where the error says it belongs, and return what to tell the caller."""
        certain = backend.adapter.classify(error) is ErrorClass.PERMANENT
        self._ctx.telemetry.mint_failed(lease.adapter, "refused" if certain else "ambiguous")

        def record(tx: Transaction) -> None:
            # Read anew: a two-step mint that fails has a handle on record already.
            now = ledger.get(tx, lease.id)
            if now is None or now.state not in NEVER_ACTIVE:
                return
            nothing_made = certain and now.state is LeaseState.INTENT
            moves.move(
                self._ctx,
                tx,
                now,
                LeaseState.FAILED if nothing_made else LeaseState.REVOKE_PENDING,
                Cause.MINT_REFUSED if certain else Cause.MINT_AMBIGUOUS,
                actor="broker",
                last_error=type(error).__name__,
                next_action_ms=None if nothing_made else self._ctx.clock.now_ms(),
            )

        await self._ctx.store.writer.run(record)
        detail = (
            "The backend refused to mint this credential; nothing was made. Tell the resource's owner."
            if certain
            else "The backend did not confirm the mint; whatever it made is being revoked. Retry later."
        )
        return MintFailed(detail, retry_after_seconds=5, lease_id=lease.id, task_id=lease.task_id)


def refuse_killed(kill: Kill | None) -> None:
    """Raise `IdentityRefused` where the kill switch covers identity, owner or resource."""
    if kill is not None:
        raise IdentityRefused(
            f"An operator has killed this {kill.scope}: nothing is issued for it until that is lifted."
        )


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


def _claims(request: CredentialRequest) -> dict[str, str]:
    return {"reason": request.intent.reason} if request.intent.reason else {}


def _decision_record(
    question: CredentialQuestion, judgement: Judgement, decision_id: DecisionId
) -> DecisionRecord:
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


def _mint_request(lease: Lease, granted: CatalogAction) -> MintRequest:
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


def _secret_digest(ctx: Context, credential: Credential) -> str:
    """Return the keyed digest that finds this lease from a leaked secret; several secrets are joined."""
    return ",".join(ctx.keys.digest(value.reveal().encode()) for value in credential.secret.values())


def _lost(lease: Lease) -> LeaseLost:
    return LeaseLost(
        "The lease was ended while its credential was being minted; nothing was released. "
        "If the task is still open, retry.",
        retry_after_seconds=1,
        lease_id=lease.id,
        task_id=lease.task_id,
    )
