"""The policy engine: questions in, decisions with reasons out. Deterministic and replayable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from broker.core.decision import Allow, Basis, Decision, Deny, NeedsApproval
from broker.core.facts import CredentialQuestion
from broker.policy import inputs, reasons
from broker.policy.evaluation import Answer, Evaluator, Outcome
from broker.policy.policyset import GUARDS, PolicySources
from broker.policy.reach import Reach

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from pathlib import Path

    from broker.core.audit import JsonValue
    from broker.core.facts import IdentityFacts, TaskQuestion
    from broker.policy.catalog import Catalog, CatalogAction
    from broker.policy.policyset import PolicyInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """A decision with everything needed to record and replay it.

    Attributes:
        decision: what the caller is told.
        input: the full canonical input; `PolicyEngine.replay` takes it.
        policy_ids: every determining policy, also those that the decision's basis withholds
            because the caller may not know of the resource. For the record, not for the caller.
        failed_ids: policies that could not be evaluated; where there are any, the decision is a Deny.

    """

    decision: Decision
    input: Mapping[str, JsonValue]
    policy_ids: tuple[str, ...] = ()
    failed_ids: tuple[str, ...] = ()

    @property
    def outcome(self) -> str:
        """``allow``, ``deny`` or ``needs_approval``: the word used in records and cases."""
        match self.decision:
            case Allow():
                return "allow"
            case Deny():
                return "deny"
            case NeedsApproval():
                return "needs_approval"

    def record(self) -> dict[str, JsonValue]:
        """Return the audit's fields of this decision: no free text, and all that replay needs."""
        return {
            "outcome": self.outcome,
            "policy_ids": self.policy_ids,
            "failed_policy_ids": self.failed_ids,
            "policy_hash": self.decision.basis.policy_hash,
            "input": self.input,
        }


class PolicyEngine:
    """Judges questions under the policy set now loaded.

    One instance per process, used from one thread at a time; `reload` swaps everything at once.
    """

    def __init__(
        self,
        read: Callable[[], PolicySources],
        catalog: Catalog,
        *,
        revocability: Mapping[str, str] | None = None,
        guards: frozenset[str] = GUARDS,
    ) -> None:
        self._read = read
        self._revocability = {name: str(effect) for name, effect in (revocability or {}).items()}
        self._guards = guards
        self._current = self._build(catalog)

    @classmethod
    def load(
        cls, directory: Path, catalog: Catalog, *, revocability: Mapping[str, str] | None = None
    ) -> Self:
        """Read ``*.cedar`` and ``schema.cedarschema`` from a directory, and validate them.

        Args:
            directory: where the files are; its sub-directories are not read.
            catalog: what the questions are about.
            revocability: each adapter's declared effect (``immediate``, ``eventual``, …) by
                its configured name; policy sees ``unknown`` for any other.

        Raises:
            PolicyError: listing everything wrong with the set.

        """
        return cls(lambda: PolicySources.read(directory), catalog, revocability=revocability)

    def reload(self, catalog: Catalog | None = None) -> str:
        """Read the files again, under a new catalog where one is given; return the new policy hash.

        Raises:
            PolicyError: where the new set cannot be used; the old one then stays in force.

        """
        self._current = self._build(catalog or self.catalog)
        return self.policy_hash

    @property
    def catalog(self) -> Catalog:
        """The catalog in force."""
        return self._current.evaluator.catalog

    @property
    def policy_hash(self) -> str:
        """SHA-256 over policies, schema and catalog, hex."""
        return self._current.evaluator.policy_hash

    @property
    def policies(self) -> Mapping[str, PolicyInfo]:
        """What each policy says of itself, by id."""
        return self._current.evaluator.compiled.policies

    def decide_credential(self, question: CredentialQuestion) -> Judgement:
        """Say whether this credential may be minted. Never raises for what a caller sent."""
        return self.simulate(question)

    def decide_task(self, question: TaskQuestion) -> Judgement:
        """Say whether this task may be opened. Never raises for what a caller sent."""
        return self.simulate(question)

    def simulate(
        self, question: CredentialQuestion | TaskQuestion, *, approvals: Collection[str] = ()
    ) -> Judgement:
        """Answer a what-if: the question as it stands, as though `approvals` had been given."""
        current = self._current
        evaluator = current.evaluator
        source: dict[str, JsonValue]
        kind = inputs.CREDENTIAL if isinstance(question, CredentialQuestion) else inputs.TASK
        try:
            if isinstance(question, CredentialQuestion):
                source = inputs.credential_input(
                    question, evaluator.catalog, evaluator.revocability, approvals
                )
            else:
                source = inputs.task_input(question, evaluator.catalog, approvals)
            return current.judge(source)
        except inputs.OutOfBoundsError as error:
            return current.judge(inputs.out_of_bounds_input(kind, error.part))

    def replay(self, recorded: Mapping[str, JsonValue]) -> Decision:
        """Decide a recorded input again, under the set now loaded.

        Raises:
            ValueError: where it is no input that this version records.

        """
        if recorded.get("version") != inputs.VERSION:
            raise ValueError("not a decision input that this version can replay")
        try:
            return self._current.judge(recorded).decision
        except (KeyError, TypeError, IndexError, inputs.OutOfBoundsError) as error:
            raise ValueError("not a complete decision input") from error

    def visible(self, identity: IdentityFacts, now_ms: int) -> list[CatalogAction]:
        """Return what this identity could be allowed to ask for, in the catalog's order.

        That is: what a plain request (default TTL, no history) would be granted under a task
        for some purpose the identity may open. At most `reach.VISIBLE_EVALUATIONS_MAX`
        combinations are tried; kept for a minute.
        """
        try:
            principal = inputs.identity_entity(identity)
        except inputs.OutOfBoundsError:
            return []
        return [*self._current.reach.visible(principal, now_ms)]

    def _build(self, catalog: Catalog) -> _Judge:
        return _Judge(Evaluator(self._read(), catalog, self._revocability, self._guards))


class _Judge:
    """Turns inputs into judgements under one set; a pure function of the input."""

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator
        self.reach = Reach(evaluator)

    def judge(self, source: Mapping[str, Any]) -> Judgement:
        if "out_of_bounds" in source:
            return self._refuse(source, reasons.out_of_bounds(source["out_of_bounds"]))
        if "unregistered" in source:
            return self._refuse(source, self._unregistered(source))
        answer = self.evaluator.ask(source)
        match answer.outcome:
            case Outcome.ALLOW:
                allow = Allow(self._basis(answer.policy_ids))
                return Judgement(decision=allow, input=source, policy_ids=answer.policy_ids)
            case Outcome.DENY:
                return self._denied(source, answer)
            case Outcome.FAILED:
                return Judgement(
                    decision=Deny(self._basis(()), reasons.POLICY_FAILED),
                    input=source,
                    policy_ids=answer.policy_ids,
                    failed_ids=answer.failed_ids,
                )

    def _denied(self, source: Mapping[str, Any], answer: Answer) -> Judgement:
        """Disclose the forbids only to a caller who would pass but for them.

        To anyone else even the name of a policy would tell that the resource exists.
        """
        permitted = (
            bool(answer.policy_ids) and self.evaluator.ask(source, permits_only=True).outcome is Outcome.ALLOW
        )
        if not permitted:
            return self._refuse(source, self._not_permitted(source), answer.policy_ids)
        policies = [self.evaluator.compiled.policies[name] for name in answer.policy_ids]
        basis, reason = self._basis(answer.policy_ids), reasons.forbidden(policies, source)
        groups = [policy.needs_approval for policy in policies if policy.needs_approval is not None]
        decision: Decision = Deny(basis, reason)
        if len(groups) == len(policies):  # one forbid that no approval lifts is a plain refusal
            decision = NeedsApproval(basis, reason, groups[0])
        return Judgement(decision=decision, input=source, policy_ids=answer.policy_ids)

    def _refuse(self, source: Mapping[str, Any], reason: str, withheld: tuple[str, ...] = ()) -> Judgement:
        return Judgement(decision=Deny(self._basis(()), reason), input=source, policy_ids=withheld)

    def _not_permitted(self, source: Mapping[str, Any]) -> str:
        if source["kind"] == inputs.CREDENTIAL:
            return reasons.not_permitted(source, self.reach)
        now_ms = source["context"]["clock"]["now_ms"]
        return reasons.no_purpose(source["principal"], now_ms, self.reach)

    def _unregistered(self, source: Mapping[str, Any]) -> str:
        if source["kind"] == inputs.TASK:
            return reasons.no_purpose(source["principal"], source["now_ms"], self.reach)
        return reasons.unregistered(source, self.reach)

    def _basis(self, policy_ids: tuple[str, ...]) -> Basis:
        return Basis(policy_ids, self.evaluator.policy_hash)
