"""The sentences of a refusal: what was refused, why as far as policy discloses, what to do.

A caller learns of a resource only what policy would let it have. Whatever else stands
behind a refusal, unknown resource, unknown action or no permit, it reads the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from broker.policy.catalog import CLASSIFICATIONS
from broker.policy.inputs import TASK

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from broker.policy.policyset import PolicyInfo
    from broker.policy.reach import Reach

REASONS_SHOWN_MAX: Final = 4
PURPOSES_SHOWN_MAX: Final = 8

NOT_PERMITTED: Final = (
    "No policy permits this resource and action for this identity and task. GET /catalog lists what the "
    "identity may ask for; for anything else, ask the team that owns the resource to grant it."
)
NO_PURPOSE: Final = (
    "No policy lets this identity open a task for this purpose. Ask the owners of the catalog to "
    "register the purpose for the identity's team."
)
POLICY_FAILED: Final = (
    "A policy could not be evaluated, so nothing is granted. Give the decision id to the people who "
    "keep the policies: the record names the policy."
)
OUT_OF_BOUNDS: Final = (
    "The request's {part} is empty, too long, too large or not a plain name; send a smaller one."
)


def out_of_bounds(part: str) -> str:
    """Say which part of the request is larger than policy looks at."""
    return OUT_OF_BOUNDS.format(part=part)


def forbidden(policies: Iterable[PolicyInfo], source: Mapping[str, Any]) -> str:
    """Put the determining forbids' own sentences together, in order of their ids."""
    words = _words(source)
    shown = dict.fromkeys(policy.reason.format_map(words) for policy in policies)
    return " ".join([*shown][:REASONS_SHOWN_MAX])


def not_permitted(source: Mapping[str, Any], reach: Reach) -> str:
    """Say that no permit matched, naming owner and purposes only of what the caller may see."""
    context, resource = source["context"], source["resource"]["id"]
    granted = reach.granted(source["principal"], resource, context["clock"]["now_ms"])
    purposes = granted.get(context["request"]["action"])
    if purposes is None:
        return _other_action(resource, granted, reach)
    return (
        f"No policy permits this action on {resource} for the purpose {context['facts']['task']['purpose']}. "
        f"It is permitted for: {_list(purposes)}. Open a task for that, or ask {_owner(resource, reach)}."
    )


def unregistered(source: Mapping[str, Any], reach: Reach) -> str:
    """Say of an unknown resource or action what would be said of one not permitted."""
    resource = source["unregistered"]["resource"]
    if resource is None:
        return NOT_PERMITTED
    return _other_action(resource, reach.granted(source["principal"], resource, source["now_ms"]), reach)


def _other_action(resource: str, granted: Mapping[str, object], reach: Reach) -> str:
    if not granted:
        return NOT_PERMITTED
    return (
        f"No policy permits this action on {resource} for this identity, only: {_list(granted)}. "
        f"To have it granted, ask {_owner(resource, reach)}."
    )


def _owner(resource: str, reach: Reach) -> str:
    found = reach.catalog.resource(resource)
    return "its owner" if found is None else f"its owner, team {found.owner}"


def no_purpose(principal: Mapping[str, Any], now_ms: int, reach: Reach) -> str:
    """Say that no permit to open a task matched, and which purposes would pass."""
    purposes = reach.openable(principal, now_ms)
    return f"{NO_PURPOSE} It may open tasks for: {_list(purposes)}." if purposes else NO_PURPOSE


def _list(words: Iterable[str]) -> str:
    found = [*words]
    more = ", …" if len(found) > PURPOSES_SHOWN_MAX else ""
    return ", ".join(found[:PURPOSES_SHOWN_MAX]) + more


def _words(source: Mapping[str, Any]) -> dict[str, object]:
    """Fill the placeholders that `policyset.PLACEHOLDERS` promises for the input's kind."""
    identity, resource = source["principal"]["attrs"], source["resource"]["attrs"]
    words: dict[str, object] = {
        "identity_environment": identity["environment"] or "(none)",
        "lifecycle": identity["lifecycle"],
        "team": identity["team"] or "(none)",
    }
    if source["kind"] == TASK:
        ceilings = {name: resource[name] for name in ("budget_leases_max", "deadline_seconds_max")}
        return {**words, **ceilings, "purpose": resource["name"]}
    facts = source["context"]["facts"]
    return {
        **words,
        "classification": resource["classification"],
        "classification_max": CLASSIFICATIONS[facts["task"]["classification_rank_max"] - 1],
        "owner": resource["owner"],
        "purpose": facts["task"]["purpose"],
        "resource_environment": resource["environment"],
        "ttl_seconds_max": facts["ttl_seconds_max"],
    }
