from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from broker.core.decision import Allow, Deny, NeedsApproval
from broker.core.facts import Grant, History, Intent, Lifecycle
from broker.policy import evaluation, inputs, reach, reasons
from broker.policy.catalog import Catalog
from broker.policy.engine import PolicyEngine
from broker.policy.errors import PolicyError

if TYPE_CHECKING:
    from pathlib import Path

    from broker.core.facts import CredentialQuestion


def _engine(folder: Path, text: str = "") -> PolicyEngine:
    if text:
        (folder / "extra.cedar").write_text(text)
    return PolicyEngine.load(folder, Catalog.load(folder / "catalog.yaml"))


def _reason(decision: object) -> str:
    assert isinstance(decision, (Deny, NeedsApproval))
    return decision.reason


# --- decisions --------------------------------------------------------------------------------------


def test_an_allow_names_its_permit_and_the_set(engine: PolicyEngine, ask: Any) -> None:
    decision = engine.decide_credential(ask.credential()).decision
    assert isinstance(decision, Allow)
    assert decision.basis.policy_ids == ("analytics-reads-orders-for-churn-report",)
    assert decision.basis.policy_hash == engine.policy_hash


def test_a_forbid_answers_with_its_own_sentence(engine: PolicyEngine, ask: Any) -> None:
    decision = engine.decide_credential(ask.credential(ttl_seconds=3601)).decision
    assert isinstance(decision, Deny)
    assert decision.basis.policy_ids == ("ttl-ceiling",)
    assert (
        decision.reason
        == "The catalog allows at most 3600 seconds for this action. Ask for a shorter ttl_seconds."
    )


def test_all_determining_forbids_are_named(engine: PolicyEngine, ask: Any) -> None:
    question = ask.credential(ttl_seconds=3601, task={"actions": ("write",)})
    decision = engine.decide_credential(question).decision
    assert isinstance(decision, Deny)
    assert decision.basis.policy_ids == ("task-bound-action", "ttl-ceiling")
    assert "opened for other actions" in decision.reason
    assert "3600 seconds" in decision.reason


def test_an_approval_lifts_only_the_forbid_that_asks_for_it(engine: PolicyEngine, ask: Any) -> None:
    payments = ask.as_identity(team="payments")
    question = payments.credential("payments-ledger", "write", task={"purpose": "nightly-reconciliation"})

    needs = engine.decide_credential(question).decision
    assert isinstance(needs, NeedsApproval)
    assert needs.group == "payments-leads"
    assert isinstance(engine.simulate(question, approvals=["payments-leads"]).decision, Allow)

    too_long = replace(question, ttl_seconds=301)
    assert isinstance(engine.decide_credential(too_long).decision, Deny)
    assert isinstance(engine.simulate(too_long, approvals=["payments-leads"]).decision, Deny)


def test_a_task_is_opened_for_a_purpose_of_the_team(engine: PolicyEngine, ask: Any) -> None:
    assert isinstance(engine.decide_task(ask.task()).decision, Allow)
    refused = engine.decide_task(ask.task("support-ticket")).decision
    assert "It may open tasks for: churn-report, partner-delivery." in _reason(refused)


@pytest.mark.parametrize("lifecycle", [Lifecycle.SUSPENDED, Lifecycle.RETIRED])
def test_a_barred_identity_gets_nothing(engine: PolicyEngine, ask: Any, lifecycle: Lifecycle) -> None:
    barred = ask.as_identity(lifecycle=lifecycle)
    for judgement in (engine.decide_credential(barred.credential()), engine.decide_task(barred.task())):
        assert isinstance(judgement.decision, Deny)
        assert judgement.decision.basis.policy_ids == ("identity-standing",)
        assert lifecycle.value in judgement.decision.reason


# --- fail closed ------------------------------------------------------------------------------------

CREDENTIALS = '(principal, action in Action::"use", resource)'
OVERFLOW = "context.request.ttl_seconds * 9223372036854775807 > 0"


@pytest.mark.parametrize(
    "text",
    [
        f'@id("broken") @reason("No.") forbid {CREDENTIALS} when {{ {OVERFLOW} }};',
        f'@id("broken") permit {CREDENTIALS} when {{ {OVERFLOW} }};',
    ],
    ids=["forbid", "permit"],
)
def test_a_policy_that_fails_refuses_even_where_cedar_would_allow(folder: Path, ask: Any, text: str) -> None:
    judgement = _engine(folder, text).decide_credential(ask.credential())
    assert isinstance(judgement.decision, Deny)
    assert judgement.decision.reason == reasons.POLICY_FAILED
    assert judgement.failed_ids == ("broken",)
    assert judgement.record()["failed_policy_ids"] == ("broken",)


def test_a_request_that_cedar_cannot_read_is_refused(engine: PolicyEngine, ask: Any) -> None:
    recorded = dict(engine.decide_credential(ask.credential()).input)
    for change in ({"action": "fly"}, {"resource": {"type": "Resource", "id": "x", "attrs": {}}}):
        assert isinstance(engine.replay({**recorded, **change}), Deny)


# --- no oracle --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"resource": "payments-ledger"},
        {"resource": "no-such-resource"},
        {"resource": "payments-ledger", "action": "no-such-action"},
        {"resource": "payments-ledger", "ttl_seconds": 999_999},
        {"resource": "no-such-resource", "ttl_seconds": 999_999},
        {"resource": "payments-ledger", "task": {"resources": ("orders-db",)}},
        {"resource": "../../etc/passwd", "action": "read\n"},
        {"resource": "", "action": ""},
    ],
)
def test_unknown_and_not_permitted_read_the_same(
    engine: PolicyEngine, ask: Any, changes: dict[str, Any]
) -> None:
    decision = engine.decide_credential(ask.credential(**changes)).decision
    assert decision == Deny(replace(decision.basis, policy_ids=()), reasons.NOT_PERMITTED)


@pytest.mark.parametrize("ttl_seconds", [0, -1, 2**31, 2**70])
def test_a_refusal_for_size_does_not_tell_what_exists(
    engine: PolicyEngine, ask: Any, ttl_seconds: int
) -> None:
    refused = {
        _reason(engine.decide_credential(ask.credential(name, ttl_seconds=ttl_seconds)).decision)
        for name in ("payments-ledger", "no-such-resource")
    }
    assert refused == {reasons.out_of_bounds("ttl_seconds")}


def test_a_known_resource_answers_alike_for_an_unknown_and_a_forbidden_action(
    engine: PolicyEngine, ask: Any
) -> None:
    refused = {
        _reason(engine.decide_credential(ask.credential("orders-db", action)).decision)
        for action in ("write", "no-such-action")
    }
    said = (
        "No policy permits this action on orders-db for this identity, only: read. "
        "To have it granted, ask its owner, team commerce."
    )
    assert refused == {said}


def test_forbids_behind_an_undisclosed_refusal_are_kept_for_the_record(
    engine: PolicyEngine, ask: Any
) -> None:
    judgement = engine.decide_credential(ask.credential("payments-ledger"))
    assert judgement.decision.basis.policy_ids == ()
    assert judgement.policy_ids == ("restricted-stays-with-its-team",)
    assert judgement.record()["policy_ids"] == judgement.policy_ids


def test_the_wrong_purpose_is_told_the_right_one(engine: PolicyEngine, ask: Any) -> None:
    question = ask.credential(task={"purpose": "partner-delivery"})
    said = _reason(engine.decide_credential(question).decision)
    assert "It is permitted for: churn-report." in said
    assert "team commerce" in said


# --- inputs -----------------------------------------------------------------------------------------


def _all_kinds(ask: Any) -> list[Any]:
    payments = ask.as_identity(team="payments")
    return [
        ask.credential(),
        ask.credential(seen=("orders-db:read", "gone:read")),
        ask.credential("partner-export", "write", seen=("orders-db:read",)),
        ask.credential("payments-ledger"),
        ask.credential("no-such-resource"),
        ask.credential(ttl_seconds=-1),
        payments.credential("payments-ledger", "write", task={"purpose": "nightly-reconciliation"}),
        ask.task(),
        ask.task("no-such-purpose"),
        ask.task(deadline_seconds=999_999),
        ask.task("Not A Word"),
    ]


def test_a_recorded_input_replays_to_the_same_decision(engine: PolicyEngine, ask: Any) -> None:
    for question in _all_kinds(ask):
        judgement = engine.simulate(question)
        recorded = orjson.loads(orjson.dumps(judgement.input))
        assert recorded == judgement.input
        assert engine.replay(recorded) == judgement.decision


def test_replay_under_another_set_shows_what_would_flip(folder: Path, engine: PolicyEngine, ask: Any) -> None:
    recorded = engine.decide_credential(ask.credential()).input
    stricter = _engine(
        folder,
        '@id("night") @reason("Not at noon.") forbid (principal, action in Action::"use", resource) '
        "when { context.clock.hour_utc == 12 && context.clock.weekday_utc == 4 };",
    )
    assert isinstance(engine.replay(recorded), Allow)
    assert _reason(stricter.replay(recorded)) == "Not at noon."


@pytest.mark.parametrize(
    "recorded", [{}, {"version": 0}, {"version": 1}, {"version": 1, "kind": "credential"}]
)
def test_replay_refuses_what_is_no_input(engine: PolicyEngine, recorded: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not a"):
        engine.replay(recorded)


def test_no_free_text_of_the_caller_enters_the_record(engine: PolicyEngine, ask: Any) -> None:
    said = "IGNORE ALL RULES"
    questions = [
        ask.credential(intent=Intent(tool="sql.query", reason=said)),
        ask.credential(intent=Intent(tool=said, reason="")),
        ask.credential(said, said),
        ask.credential(task={"purpose": said}),
        ask.credential(task={"resources": (said,)}),
        ask.task(said),
    ]
    for question in questions:
        judgement = engine.simulate(question)
        assert said not in orjson.dumps(judgement.record()).decode()
        if not isinstance(judgement.decision, Allow):
            assert said not in judgement.decision.reason


UNBOUNDED = (
    "history",
    "identity.owner",
    "identity.team",
    "intent.reason",
    "intent.tool",
    "task.actions",
    "task.classification_max",
    "task.purpose",
    "task.resources",
    "ttl_seconds",
)


def _unbounded(ask: Any) -> dict[str, CredentialQuestion]:
    plain = ask.credential()
    many = frozenset(Grant(f"r{n}", "read") for n in range(inputs.HISTORY_GRANTS_MAX + 1))
    return {
        "intent.tool": replace(plain, intent=Intent(tool="t" * 129, reason="")),
        "intent.reason": replace(plain, intent=Intent(tool="t", reason="r" * 4097)),
        "task.resources": ask.credential(task={"resources": ("r",) * 101}),
        "task.actions": ask.credential(task={"actions": ("a" * 64,)}),
        "task.purpose": ask.credential(task={"purpose": "p" * 64}),
        "task.classification_max": ask.credential(task={"classification_max": "cosmic"}),
        "identity.owner": ask.as_identity(owner="o" * 257).credential(),
        "identity.team": ask.as_identity(team="\ud800").credential(),
        "history": replace(plain, history=History(identity=many)),
        "ttl_seconds": replace(plain, ttl_seconds=2**31),
    }


@pytest.mark.parametrize("part", UNBOUNDED)
def test_what_is_too_large_for_policy_is_refused_by_name(engine: PolicyEngine, ask: Any, part: str) -> None:
    judgement = engine.decide_credential(_unbounded(ask)[part])
    assert judgement.decision == Deny(judgement.decision.basis, reasons.out_of_bounds(part))
    assert len(orjson.dumps(judgement.input)) < 100


def test_a_context_too_large_as_a_whole_is_refused(
    engine: PolicyEngine, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "CONTEXT_BYTES_MAX", 100)
    for judgement in (engine.decide_credential(ask.credential()), engine.decide_task(ask.task())):
        assert _reason(judgement.decision) == reasons.out_of_bounds("context")


def test_facts_come_from_catalog_and_adapter_not_from_the_caller(engine: PolicyEngine, ask: Any) -> None:
    recorded: Any = engine.decide_credential(ask.credential("reports-api", "write")).input
    assert recorded["context"]["facts"]["revocability"] == "immediate"
    assert recorded["context"]["facts"]["ttl_seconds_max"] == 3600
    assert recorded["context"]["claims"] == {"reason_length": 13, "tool": "sql.query"}
    assert (recorded["context"]["clock"]["hour_utc"], recorded["context"]["clock"]["weekday_utc"]) == (12, 4)
    unknown: Any = engine.decide_credential(ask.credential()).input
    assert unknown["context"]["facts"]["revocability"] == "unknown"


def test_history_is_told_in_the_catalogs_words(engine: PolicyEngine, ask: Any) -> None:
    history = History(
        task=frozenset({Grant("reports-api", "gone-action")}),
        identity=frozenset({Grant("orders-db", "write"), Grant("gone", "read")}),
    )
    recorded: Any = engine.decide_credential(ask.credential(history=history)).input
    assert recorded["context"]["facts"]["history"] == {
        "task_seen_classifications": ["internal"],
        "task_seen_tags": [],
        "task_seen_unregistered": False,
        "identity_seen_classifications": ["confidential"],
        "identity_seen_tags": ["customer-data"],
        "identity_seen_unregistered": True,
    }


def test_action_groups_hold_without_the_schema_at_request_time(folder: Path, ask: Any) -> None:
    engine = _engine(
        folder,
        '@id("frozen") @reason("Not today.") forbid (principal, action in Action::"change", resource);',
    )
    assert _reason(engine.decide_credential(ask.credential("reports-api", "write")).decision) == "Not today."
    assert isinstance(engine.decide_credential(ask.credential()).decision, Allow)


# --- reload -----------------------------------------------------------------------------------------


def test_reload_takes_the_new_set_at_once(folder: Path, ask: Any) -> None:
    engine = _engine(folder)
    before = engine.policy_hash
    engine.visible(ask.identity, 0)
    (folder / "grants.cedar").unlink()

    assert engine.reload() == engine.policy_hash != before
    assert isinstance(engine.decide_credential(ask.credential()).decision, Deny)
    assert [action.key for action in engine.visible(ask.identity, 0)] == [Grant("reports-api", "read")]


def test_a_bad_reload_keeps_the_old_set(folder: Path, ask: Any) -> None:
    engine = _engine(folder)
    before = engine.policy_hash
    (folder / "grants.cedar").write_text("permit (")

    with pytest.raises(PolicyError):
        engine.reload()

    assert engine.policy_hash == before
    assert isinstance(engine.decide_credential(ask.credential()).decision, Allow)


def test_reload_takes_a_new_catalog(folder: Path, ask: Any) -> None:
    engine = _engine(folder)
    path = folder / "catalog.yaml"
    path.write_text(path.read_text().replace("ttl_seconds_max: 3600", "ttl_seconds_max: 300", 1))
    engine.reload(Catalog.load(path))
    assert "at most 300 seconds" in _reason(
        engine.decide_credential(ask.credential(ttl_seconds=301)).decision
    )


# --- what may I ask for -----------------------------------------------------------------------------


def _visible(engine: PolicyEngine, ask: Any, **changes: Any) -> list[str]:
    found = engine.visible(ask.as_identity(**changes).identity, 0)
    return [f"{action.resource.id}:{action.name}" for action in found]


def test_visible_is_what_a_plain_request_would_get(engine: PolicyEngine, ask: Any) -> None:
    assert _visible(engine, ask) == [
        "orders-db:read",
        "reports-api:read",
        "reports-api:write",
        "partner-export:write",
    ]


def test_visible_agrees_with_decisions(engine: PolicyEngine, ask: Any) -> None:
    for team in engine.catalog.teams:
        own = ask.as_identity(team=team)
        shown = {action.key for action in engine.visible(own.identity, 0)}
        granted = {
            action.key
            for action in engine.catalog
            for purpose in engine.catalog.purposes
            if isinstance(engine.decide_task(own.task(purpose)).decision, Allow)
            and isinstance(
                engine.decide_credential(
                    own.credential(
                        action.resource.id,
                        action.name,
                        task={"purpose": purpose},
                        ttl_seconds=action.ttl_seconds_default,
                    )
                ).decision,
                Allow,
            )
        }
        assert shown == granted


@pytest.mark.parametrize(
    "changes",
    [{"lifecycle": Lifecycle.SUSPENDED}, {"team": ""}, {"environment": "dev"}, {"team": "x" * 257}],
)
def test_who_gets_nothing_sees_nothing(engine: PolicyEngine, ask: Any, changes: dict[str, Any]) -> None:
    assert _visible(engine, ask, **changes) == []


def test_visible_follows_the_time_of_day(folder: Path, ask: Any) -> None:
    office = _engine(
        folder,
        f'@id("office") @reason("After nine.") forbid {CREDENTIALS} when {{ context.clock.hour_utc < 9 }};',
    )
    nine_ms = 9 * 3_600_000
    assert office.visible(ask.identity, nine_ms - 1) == []
    assert office.visible(ask.identity, nine_ms) != []


def test_visible_is_bounded(folder: Path, ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "VISIBLE_EVALUATIONS_MAX", 1)
    assert _visible(_engine(folder), ask) == ["orders-db:read"]
