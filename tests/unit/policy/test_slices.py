from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import cedarpy
import orjson
import pytest

from broker.policy.inputs import EFFECTS, OPEN_TASK
from broker.policy.slices import SLICES_MAX, Slices, policy_set

ACTIONS = frozenset({*EFFECTS, OPEN_TASK})
PRINCIPALS = [("Identity", f"spiffe://td/{n}") for n in range(4)]
RESOURCES = [("Resource", f"r{n}") for n in range(4)]


def scope(rng: random.Random, entities: list[tuple[str, str]], kind: str) -> str:
    chosen = rng.choice(entities)
    return rng.choice(["", f' == {kind}::"{chosen[1]}"', f" is {kind}", f' in {kind}::"{chosen[1]}"'])


def action_scope(rng: random.Random) -> str:
    names = sorted(ACTIONS)
    pair = ", ".join(f'Action::"{name}"' for name in rng.sample(names, 2))
    return rng.choice(["", f' == Action::"{rng.choice(names)}"', f" in [{pair}]", ' in Action::"use"'])


def random_statements(rng: random.Random, count: int) -> dict[str, dict[str, Any]]:
    text = ""
    for _ in range(count):
        effect = rng.choice(["permit", "permit", "forbid"])
        condition = rng.choice(["", "when { context.n > 5 }", "when { context.missing }"])
        text += (
            f"{effect}(principal{scope(rng, PRINCIPALS, 'Identity')}, action{action_scope(rng)}, "
            f"resource{scope(rng, RESOURCES, 'Resource')}) {condition};\n"
        )
    parsed: dict[str, dict[str, Any]] = orjson.loads(cedarpy.policies_to_json_str(text))["staticPolicies"]
    return parsed


def answer(
    policies: cedarpy.PolicySet, principal: tuple[str, str], action: str, resource: tuple[str, str], n: int
) -> tuple[object, ...]:
    groups = [
        {"uid": {"type": "Action", "id": name}, "attrs": {}, "parents": [{"type": "Action", "id": "use"}]}
        for name in sorted(ACTIONS)
    ]
    request = {
        "principal": {"type": principal[0], "id": principal[1]},
        "action": {"type": "Action", "id": action},
        "resource": {"type": resource[0], "id": resource[1]},
        "context": orjson.dumps({"n": n}).decode(),
    }
    result = cedarpy.is_authorized(request, policies, orjson.dumps(groups).decode())
    return result.decision, sorted(result.diagnostics.reasons), sorted(result.diagnostics.errors)


@pytest.mark.parametrize("seed", range(30))
def test_a_slice_answers_as_the_whole_set_does_errors_included(seed: int) -> None:
    rng = random.Random(seed)
    statements = random_statements(rng, 25)
    whole, slices = policy_set(statements), Slices(statements, ACTIONS)
    for _ in range(40):
        principal, resource = rng.choice(PRINCIPALS), rng.choice(RESOURCES)
        action, n = rng.choice(sorted(ACTIONS)), rng.randrange(10)
        part = slices.matching(principal, action, resource)
        assert answer(part, principal, action, resource, n) == answer(whole, principal, action, resource, n)


def test_entities_that_no_policy_names_share_a_slice() -> None:
    statements = random_statements(random.Random(1), 10)
    slices = Slices(statements, ACTIONS)
    first = slices.matching(("Identity", "spiffe://td/unnamed-1"), "read", ("Resource", "unnamed-1"))
    second = slices.matching(("Identity", "spiffe://td/unnamed-2"), "read", ("Resource", "unnamed-2"))
    assert first is second


def test_the_memory_is_bounded() -> None:
    text = "".join(
        f'permit(principal == Identity::"i{n}", action, resource);' for n in range(SLICES_MAX + 50)
    )
    statements = orjson.loads(cedarpy.policies_to_json_str(text))["staticPolicies"]
    slices = Slices(statements, ACTIONS)
    for n in range(SLICES_MAX + 50):
        slices.matching(("Identity", f"i{n}"), "read", ("Resource", "r"))
    assert len(slices) == SLICES_MAX


def test_the_shipped_policies_are_cut_by_action_and_resource() -> None:
    directory = Path(__file__).parents[3] / "policies"
    text = "\n".join(path.read_text() for path in sorted(directory.glob("*.cedar")))
    statements = orjson.loads(cedarpy.policies_to_json_str(text))["staticPolicies"]
    part = Slices(statements, ACTIONS).matching(("Identity", "x"), "write", ("Resource", "reports-api"))
    assert 0 < len(part.to_pst().static_policies) < len(statements)
