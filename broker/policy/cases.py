"""Decision cases: what each policy must decide, written by the people who wrote the policy.

A file in ``policies/cases`` holds a `base` question and cases that change parts of it. Each
case is about one policy and comes in two kinds: the policy *bites* (a permit determines an
allow, a forbid a refusal), or it *lets go* (the request just misses it). A policy that lacks
either kind is not covered: deleting it, or losing its condition, could go unseen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import Field, StringConstraints

from broker.core.decision import Allow
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
from broker.core.spiffe_id import SpiffeId, SpiffeIdError
from broker.policy.documents import Document, Strict, read_document
from broker.policy.errors import PolicyError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from broker.core.audit import JsonValue
    from broker.policy.catalog import Catalog
    from broker.policy.engine import Judgement, PolicyEngine

CASES_PER_FILE_MAX: Final = 1000
NOW_MS: Final = 1_763_640_000_000
"""When a case happens unless it says otherwise: Thursday 20 November 2025, 12:00 UTC."""

_TTL_SECONDS_DEFAULT: Final = 300

Expectation = Literal["allow", "deny", "needs_approval"]
_GrantText = Annotated[str, StringConstraints(pattern=r"^[a-z0-9._-]+:[a-z0-9._-]+$")]


class _IdentityModel(Strict):
    spiffe_id: str = "spiffe://dev.nhi.internal/agent/case"
    lifecycle: Literal["discovered", "active", "suspended", "retired"] = "active"
    kind: str = "agent"
    owner: str = "someone@example.com"
    team: str = ""
    environment: str = ""


class _TaskModel(Strict):
    purpose: str = ""
    resources: list[str] = Field(default_factory=list)
    actions: list[str] = Field(default_factory=list)
    classification_max: str | None = None


class _IntentModel(Strict):
    tool: str = "case"
    reason: str = "a decision case"


class _HistoryModel(Strict):
    task: list[_GrantText] = Field(default_factory=list)
    identity: list[_GrantText] = Field(default_factory=list)


class _QuestionModel(Strict):
    ask: Literal["credential", "task"] = "credential"
    identity: _IdentityModel = _IdentityModel()
    task: _TaskModel = _TaskModel()
    intent: _IntentModel = _IntentModel()
    history: _HistoryModel = _HistoryModel()
    approvals: list[str] = Field(default_factory=list)
    resource: str = ""
    action: str = ""
    ttl_seconds: int | None = None
    deadline_seconds: int = 3600
    budget_leases: int = 10
    now_ms: int = NOW_MS


class _CaseModel(_QuestionModel):
    name: str = Field(min_length=1, max_length=200)
    policy: str
    expect: Expectation
    determining: list[str] | None = None
    reason: str = ""


class _FileModel(Strict):
    base: dict[str, object] = Field(default_factory=dict)
    cases: list[dict[str, object]] = Field(min_length=1, max_length=CASES_PER_FILE_MAX)


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseResult:
    """What became of one case.

    Attributes:
        policy: the policy the case is about.
        expected, got: ``allow``, ``deny`` or ``needs_approval``.
        determining: the policies that settled it.
        reason: the sentence a caller would have read; empty for an allow.
        bites: whether the case is one where its policy must determine the decision.
        problems: what differed, each a sentence; empty where the case holds.
        input: what was decided, for `PolicyEngine.replay`.

    """

    file: str
    name: str
    policy: str
    expected: str
    got: str
    determining: tuple[str, ...]
    reason: str
    bites: bool
    problems: tuple[str, ...]
    input: Mapping[str, JsonValue] = field(repr=False)

    @property
    def passed(self) -> bool:
        """Whether nothing differed."""
        return not self.problems


def run_cases(engine: PolicyEngine, directory: Path) -> list[CaseResult]:
    """Run every case of every ``*.yaml`` in a directory, in order of file and case.

    Raises:
        PolicyError: where a file cannot be read as cases, or there is none.

    """
    problems: list[str] = []
    found = [
        (path.name, case) for path in sorted(directory.glob("*.yaml")) for case in _read_cases(path, problems)
    ]
    if not found and not problems:
        problems.append(f"{directory.name}: holds no cases")
    if problems:
        raise PolicyError(problems)
    return [_run(engine, file, case) for file, case in found]


def uncovered(engine: PolicyEngine, results: Iterable[CaseResult]) -> list[str]:
    """Name each policy that lacks a case in which it bites, or one in which it lets go."""
    seen = {(result.policy, result.bites) for result in results}
    return [
        f"{name}: no case in which it {word}"
        for name in sorted(engine.policies)
        for bites, word in ((True, "determines the decision"), (False, "lets go"))
        if (name, bites) not in seen
    ]


def _read_cases(path: Path, problems: list[str]) -> Iterator[_CaseModel]:
    document = read_document(path, problems)
    if document is None:
        return
    file = document.validate(_FileModel, document.content, (), problems)
    if file is None:
        return
    for index, own in enumerate(file.cases):
        case = document.validate(_CaseModel, _merged(file.base, own), ("cases", index), problems)
        if case is not None and _check_id(document, index, case, problems):
            yield case


def _merged(base: Mapping[str, object], own: Mapping[str, object]) -> dict[str, object]:
    """Lay a case over its file's base; of identity, task, intent and history field by field."""
    merged = {**base}
    for key, value in own.items():
        before = merged.get(key)
        merged[key] = {**before, **value} if isinstance(before, dict) and isinstance(value, dict) else value
    return merged


def _check_id(document: Document, index: int, case: _CaseModel, problems: list[str]) -> bool:
    try:
        SpiffeId.parse(case.identity.spiffe_id)
    except SpiffeIdError as error:
        problems.append(f"{document.at(('cases', index, 'identity', 'spiffe_id'))}: {error}")
        return False
    return True


def _run(engine: PolicyEngine, file: str, case: _CaseModel) -> CaseResult:
    judgement = engine.simulate(_question(case, engine.catalog), approvals=case.approvals)
    policy = engine.policies.get(case.policy)
    permit = policy is not None and policy.effect == "permit"
    decision = judgement.decision
    reason = "" if isinstance(decision, Allow) else decision.reason
    return CaseResult(
        file=file,
        name=case.name,
        policy=case.policy,
        expected=case.expect,
        got=judgement.outcome,
        determining=judgement.policy_ids,
        reason=reason,
        bites=permit == (case.expect == "allow"),
        problems=tuple(_differences(case, judgement, reason, permit=permit, known=policy is not None)),
        input=judgement.input,
    )


def _differences(
    case: _CaseModel, judgement: Judgement, reason: str, *, permit: bool, known: bool
) -> Iterator[str]:
    if not known:
        yield f"there is no policy {case.policy}"
        return
    if judgement.outcome != case.expect:
        yield f"expected {case.expect}, got {judgement.outcome}"
    if judgement.failed_ids:
        yield f"could not be evaluated: {', '.join(judgement.failed_ids)}"
    determining = case.determining
    if determining is None and permit == (case.expect == "allow"):
        determining = [case.policy]
    if determining is not None and judgement.policy_ids != tuple(sorted(determining)):
        yield f"expected {_ids(determining)} to determine it, got {_ids(judgement.policy_ids)}"
    if determining is None and case.policy in judgement.policy_ids:
        yield f"expected {case.policy} to let go, but it determined the decision"
    if case.reason not in reason:
        yield f"the reason does not contain “{case.reason}”, it is “{reason}”"


def _ids(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "no policy"


def _question(case: _CaseModel, catalog: Catalog) -> CredentialQuestion | TaskQuestion:
    identity = IdentityFacts(
        spiffe_id=SpiffeId.parse(case.identity.spiffe_id),
        lifecycle=Lifecycle(case.identity.lifecycle),
        kind=case.identity.kind,
        owner=case.identity.owner,
        team=case.identity.team,
        environment=case.identity.environment,
    )
    task = TaskFacts(
        task_id=None,
        purpose=case.task.purpose,
        resources=tuple(case.task.resources),
        actions=tuple(case.task.actions),
        classification_max=case.task.classification_max,
    )
    history = History(task=_grants(case.history.task), identity=_grants(case.history.identity))
    if case.ask == "task":
        return TaskQuestion(
            identity=identity,
            task=task,
            deadline_seconds=case.deadline_seconds,
            budget_leases=case.budget_leases,
            history=history,
            now_ms=case.now_ms,
        )
    granted = catalog.action(case.resource, case.action)
    default = _TTL_SECONDS_DEFAULT if granted is None else granted.ttl_seconds_default
    return CredentialQuestion(
        identity=identity,
        task=task,
        resource=case.resource,
        action=case.action,
        ttl_seconds=default if case.ttl_seconds is None else case.ttl_seconds,
        intent=Intent(tool=case.intent.tool, reason=case.intent.reason),
        history=history,
        now_ms=case.now_ms,
    )


def _grants(texts: Iterable[str]) -> frozenset[Grant]:
    return frozenset(Grant(*text.split(":")) for text in texts)
