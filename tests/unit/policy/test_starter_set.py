"""The starter set, its cases, and whether the cases would notice a policy that went missing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import cedarpy
import orjson
import pytest

from broker.policy.cases import run_cases, uncovered
from broker.policy.engine import PolicyEngine
from broker.policy.errors import PolicyError
from broker.policy.policyset import PolicyFile, PolicySources
from broker.policy.registrations import Registrations

if TYPE_CHECKING:
    from broker.policy.catalog import Catalog


def test_every_case_holds(engine: PolicyEngine, starter: Path) -> None:
    results = run_cases(engine, starter / "cases")
    assert [(result.file, result.name, result.problems) for result in results if not result.passed] == []


def test_every_policy_has_a_case_for_both_outcomes(engine: PolicyEngine, starter: Path) -> None:
    assert uncovered(engine, run_cases(engine, starter / "cases")) == []


def test_every_case_replays_to_what_it_expects(engine: PolicyEngine, starter: Path) -> None:
    for result in run_cases(engine, starter / "cases"):
        decision = type(engine.replay(result.input)).__name__
        assert decision.lower() == result.expected.replace("_", "")


def _policy_ids() -> list[str]:
    sources = PolicySources.read(Path(__file__).parents[3] / "policies")
    text = "\n".join(file.text for file in sources.files)
    found = orjson.loads(cedarpy.policies_to_json_str(text))["staticPolicies"].values()
    return sorted(policy["annotations"]["id"] for policy in found)


def _mutated(sources: PolicySources, policy: str, *, keep: bool) -> PolicySources:
    """Return the set without one policy, or (`keep`) with the policy stripped of its conditions."""
    text = "\n".join(file.text for file in sources.files)
    parsed = orjson.loads(cedarpy.policies_to_json_str(text))
    policies = {body["annotations"]["id"]: body for body in parsed["staticPolicies"].values()}
    if keep:
        policies[policy]["conditions"] = []
    else:
        del policies[policy]
    body = orjson.dumps({**parsed, "staticPolicies": policies}).decode()
    return PolicySources(sources.schema, (PolicyFile("all.cedar", cedarpy.policies_from_json_str(body)),))


@pytest.mark.parametrize("keep", [False, True], ids=["deleted", "unconditional"])
@pytest.mark.parametrize("policy", _policy_ids())
def test_the_cases_notice_a_mutant(starter: Path, catalog: Catalog, policy: str, keep: bool) -> None:  # noqa: FBT001  a parameter of the test
    mutated = _mutated(PolicySources.read(starter), policy, keep=keep)
    mutant = PolicyEngine(lambda: _without_approval_check(mutated), catalog, guards=frozenset())

    results = run_cases(mutant, starter / "cases")

    noticed = [result for result in results if result.policy == policy and result.got != result.expected]
    assert noticed, f"no case of {policy} changes its outcome"


def _without_approval_check(sources: PolicySources) -> PolicySources:
    """Drop the annotation of a forbid that lost its condition; the loader would rightly refuse it."""
    text = sources.files[0].text
    if "approvals" in text:
        return sources
    return PolicySources(
        sources.schema, (PolicyFile("all.cedar", text.replace('@needs_approval("payments-leads")', "")),)
    )


def test_a_case_that_no_longer_holds_says_what_differs(folder: Path, catalog: Catalog) -> None:
    cases = folder / "cases"
    for path in cases.iterdir():
        path.unlink()
    (cases / "one.yaml").write_text(
        "cases:\n"
        "  - {name: wrong, policy: environment-wall, resource: orders-db, action: read, expect: allow}\n"
        "  - {name: unknown, policy: no-such-policy, expect: deny}\n"
    )
    wrong, unknown = run_cases(PolicyEngine.load(folder, catalog), cases)
    assert (wrong.passed, unknown.passed) == (False, False)
    assert wrong.problems[0] == "expected allow, got deny"
    assert unknown.problems == ("there is no policy no-such-policy",)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cases: []\n", "cases: "),
        ("cases:\n  - {name: a, policy: b, expect: perhaps}\n", "one.yaml:2: cases[0].expect: "),
        ("cases:\n  - {name: a, policy: b, expect: deny, colour: red}\n", "cases[0].colour: Extra inputs"),
        (
            "cases:\n  - {name: a, policy: b, expect: deny, identity: {spiffe_id: nobody}}\n",
            "one.yaml:2: cases[0].identity.spiffe_id: ID-1",
        ),
        ("cases:\n  - {name: a, policy: b, expect: deny, history: {task: [x]}}\n", "history.task[0]: "),
    ],
)
def test_a_malformed_case_is_named_with_its_place(
    engine: PolicyEngine, tmp_path: Path, text: str, said: str
) -> None:
    (tmp_path / "one.yaml").write_text(text)
    with pytest.raises(PolicyError) as caught:
        run_cases(engine, tmp_path)
    assert said in str(caught.value)


def test_a_folder_without_cases_is_an_error_not_a_pass(engine: PolicyEngine, tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="holds no cases"):
        run_cases(engine, tmp_path)


def test_every_token_audience_of_the_starter_catalog_is_a_registered_tool(
    starter: Path, catalog: Catalog
) -> None:
    registered = Registrations.load(starter / "identities.yaml", catalog=catalog)
    audiences = {str(recipe["audience"]) for recipe in catalog.recipes_by_adapter()["tokens"]}
    assert {name for name in audiences if registered.get(name) is None} == set()
