"""Tasks: opening one is a policy decision, ending one ends everything issued under it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from broker.core.clock import MS_PER_SECOND
from broker.core.decision import Allow
from broker.core.errors import BudgetExhausted, IdentityRefused, PolicyDenied, UnknownObject
from broker.core.facts import TaskFacts, TaskQuestion
from broker.core.ids import DecisionId, TaskId
from broker.core.lease import TERMINAL, Cause
from broker.core.task import (
    DEADLINE_SECONDS_DEFAULT,
    LEASES_PER_TASK_MAX,
    Task,
    TaskEndCause,
    TaskState,
)
from broker.service import moves
from inventory import decisions, idempotency, identities, kills, ledger
from inventory import tasks as task_rows
from inventory.decisions import DecisionRecord

if TYPE_CHECKING:
    from broker.core.caller import Caller
    from broker.core.facts import IdentityFacts
    from broker.core.lease import Lease
    from broker.service.context import Context
    from inventory.idempotency import IdempotencyKey
    from inventory.store.writer import Transaction

ROUTE: Final = "tasks"
BUDGET_DEFAULT: Final = 100

_CAUSE_OF_LEASES: Final = {
    TaskEndCause.CALLER: Cause.TASK_END,
    TaskEndCause.OPERATOR: Cause.TASK_END,
    TaskEndCause.INLINE: Cause.TASK_END,
    TaskEndCause.DEADLINE: Cause.EXPIRY,
    TaskEndCause.KILL: Cause.KILL,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSpec:
    """What a caller asks a task to be."""

    purpose: str
    description: str = ""
    resources: tuple[str, ...] = ()
    actions: tuple[str, ...] = ()
    classification_max: str | None = None
    budget_leases: int = BUDGET_DEFAULT
    deadline_seconds: int = DEADLINE_SECONDS_DEFAULT
    inline: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedTask:
    """A task that policy allows, with the decision to record beside it."""

    task: Task
    decision: DecisionRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedTask:
    """A task that has ended, with the proof so far."""

    task: Task
    leases: tuple[Lease, ...]

    @property
    def all_proven(self) -> bool:
        """Whether every lease of the task has reached its end."""
        return all(lease.state in TERMINAL for lease in self.leases)


class Tasks:
    """Opens, shows and ends tasks."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx

    def defaults(self, purpose: str) -> tuple[int, int]:
        """Return the deadline in seconds and the budget of leases of a task that asks for none.

        The purpose's own ceilings are lower than the general defaults for some.
        """
        known = self._ctx.catalog.purposes.get(purpose)
        if known is None:
            return DEADLINE_SECONDS_DEFAULT, BUDGET_DEFAULT
        return (
            min(DEADLINE_SECONDS_DEFAULT, known.deadline_seconds_max),
            min(BUDGET_DEFAULT, known.budget_leases_max),
        )

    async def open(
        self, caller: Caller, facts: IdentityFacts, spec: TaskSpec, key: IdempotencyKey | None = None
    ) -> Task:
        """Open a task.

        Raises:
            PolicyDenied: recorded; carries the decision.
            BudgetExhausted: too many open tasks of this identity.
            IdempotencyMismatch: the key was used with another body.

        """
        opened = await self.decide(caller, facts, spec)

        def record(tx: Transaction) -> Task:
            if key is not None:
                known = idempotency.seen_object(tx, key, now_ms=opened.task.opened_ms)
                before = None if known is None else task_rows.get(tx, TaskId(known))
                if before is not None:
                    return before
                idempotency.remember(tx, key, opened.task.id, now_ms=opened.task.opened_ms)
            self._check_still_welcome(tx, caller, facts)
            self.record(tx, opened)
            return opened.task

        return await self._ctx.store.writer.run(record)

    async def decide(self, caller: Caller, facts: IdentityFacts, spec: TaskSpec) -> OpenedTask:
        """Ask policy whether the task may be opened; a refusal is recorded and raised."""
        now_ms = self._ctx.clock.now_ms()
        question = TaskQuestion(
            identity=facts,
            task=TaskFacts(
                task_id=None,
                purpose=spec.purpose,
                resources=spec.resources,
                actions=spec.actions,
                classification_max=spec.classification_max,
            ),
            deadline_seconds=spec.deadline_seconds,
            budget_leases=spec.budget_leases,
            history=self._ctx.known.history(
                task=None,
                identity=caller.spiffe_id,
                since_ms=now_ms - self._ctx.limits.history_window_seconds * MS_PER_SECOND,
            ),
            now_ms=now_ms,
        )
        judgement = self._ctx.policy.decide_task(question)
        task_id = TaskId.new()
        decision = judgement.decision
        record = DecisionRecord(
            id=DecisionId.new(),
            at_ms=now_ms,
            identity=caller.spiffe_id,
            task_id=task_id if isinstance(decision, Allow) else None,
            question="task",
            decision=decision,
            policy_ids=judgement.policy_ids,
            failed_policy_ids=judgement.failed_ids,
            input=judgement.input,
        )
        if not isinstance(decision, Allow):
            await self._ctx.store.writer.run(lambda tx: decisions.record(tx, record))
            raise PolicyDenied(decision, record.id)
        return OpenedTask(task=_new_task(task_id, caller, spec, now_ms), decision=record)

    def record(self, tx: Transaction, opened: OpenedTask) -> None:
        """Record an allowed task and its decision."""
        task = opened.task
        if task_rows.count_open(tx, task.identity) >= self._ctx.limits.open_tasks_max:
            raise BudgetExhausted(
                f"This identity has {self._ctx.limits.open_tasks_max} open tasks, the most it may have. "
                "End some of them."
            )
        decisions.record(tx, opened.decision)
        task_rows.insert(tx, task, actor=task.identity, decision_id=opened.decision.id)

    def get(self, caller: Caller, task_id: TaskId) -> Task:
        """Return the caller's own task; `UnknownObject` for any other."""
        task = task_rows.get(self._ctx.store.reader, task_id)
        if task is None or task.identity != caller.spiffe_id:
            raise UnknownObject
        return task

    async def end(
        self, caller: Caller, task_id: TaskId, *, reason: str = "", wait_seconds: float = 0
    ) -> EndedTask:
        """End the caller's own task; harmless when repeated. Waits for proof up to `wait_seconds`."""
        task = self.get(caller, task_id)
        await self._ctx.store.writer.run(
            lambda tx: end_task(
                self._ctx, tx, task, TaskEndCause.CALLER, actor=caller.spiffe_id, reason=reason
            )
        )
        return await self.proof(task_id, wait_seconds=wait_seconds)

    async def proof(self, task_id: TaskId, *, wait_seconds: float) -> EndedTask:
        """Return a task with its leases, once they have ended or the wait is over."""
        leases = ledger.of_task(self._ctx.store.reader, task_id)
        open_ended = [lease.id for lease in leases if lease.state not in TERMINAL]
        if open_ended and wait_seconds > 0:
            await self._ctx.watch.wait(open_ended, seconds=wait_seconds)
            leases = ledger.of_task(self._ctx.store.reader, task_id)
        task = task_rows.get(self._ctx.store.reader, task_id)
        if task is None:
            raise UnknownObject
        return EndedTask(task=task, leases=tuple(leases))

    def _check_still_welcome(self, tx: Transaction, caller: Caller, facts: IdentityFacts) -> None:
        """Raise where the identity was suspended or killed since it was admitted."""
        now = identities.facts(tx, caller.spiffe_id)
        owner = facts.owner if now is None else now.owner
        kill = kills.find(tx, identity=caller.spiffe_id, owner=owner, resource="")
        if kill is not None or now is None or now.lifecycle is not facts.lifecycle:
            raise IdentityRefused(
                "This identity was suspended or killed while the request was served; it gets nothing."
            )


def end_task(
    ctx: Context, tx: Transaction, task: Task, cause: TaskEndCause, *, actor: str, reason: str = ""
) -> Task | None:
    """Close a task and move its live leases, in one transaction (DESIGN 4); None where it had ended."""
    ended = task_rows.end(tx, task, cause, at_ms=ctx.clock.now_ms(), actor=actor, reason=reason)
    if ended is not None:
        tx.after_commit(lambda: ctx.known.forget_task(task.id))
        leases = ledger.live_of_task(tx, task.id)
        moves.end_all(ctx, tx, leases, _CAUSE_OF_LEASES[cause], actor=actor)
    return ended


def _new_task(task_id: TaskId, caller: Caller, spec: TaskSpec, now_ms: int) -> Task:
    return Task(
        id=task_id,
        identity=caller.spiffe_id,
        purpose=spec.purpose,
        description=spec.description,
        resources=spec.resources,
        actions=spec.actions,
        classification_max=spec.classification_max,
        budget_leases=min(spec.budget_leases, LEASES_PER_TASK_MAX),
        leases_issued=0,
        inline=spec.inline,
        state=TaskState.OPEN,
        opened_ms=now_ms,
        deadline_ms=now_ms + spec.deadline_seconds * MS_PER_SECOND,
    )
