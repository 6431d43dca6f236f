"""One policy set under one catalog: parsed once, asked often, swapped whole."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import cedarpy
import orjson

from broker.policy.catalog import CatalogAction, CatalogResource, Purpose
from broker.policy.errors import PolicyError
from broker.policy.inputs import (
    CREDENTIAL,
    EFFECTS,
    TASK,
    OutOfBoundsError,
    neutral_credential,
    neutral_task,
)
from broker.policy.policyset import SCHEMA_NAME, compile_policies

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from broker.core.audit import JsonValue
    from broker.policy.catalog import Catalog
    from broker.policy.policyset import PolicySources

CONTEXT_BYTES_MAX: Final = 65_536
_ENTITIES_CACHED: Final = 1024
_FACTS: Final[Mapping[str, Mapping[str, str]]] = {
    CREDENTIAL: {"type": "CredentialFacts", "id": "now"},
    TASK: {"type": "TaskFacts", "id": "now"},
}

_ERROR_POLICY: Final = re.compile(r"policy `([^`]+)`")


class Outcome(StrEnum):
    """What Cedar answered. FAILED covers every way of not answering."""

    ALLOW = "allow"
    DENY = "deny"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Answer:
    """One evaluation.

    Attributes:
        policy_ids: the determining policies, sorted.
        failed_ids: policies that raised an error while evaluated, sorted. Cedar leaves them
            out of its decision, a forbid too: whoever reads `outcome` must look here first.

    """

    outcome: Outcome
    policy_ids: tuple[str, ...] = ()
    failed_ids: tuple[str, ...] = ()


class Evaluator:
    """Immutable but for its cache of parsed entities, which is bounded and holds no decision.

    Requests are not validated against the schema one by one: that costs more than the
    evaluation. Instead one input of each kind is validated when the set loads, and the
    inputs' shape is fixed by code; where an attribute is missing all the same, Cedar reports
    an error and the answer is a refusal.
    """

    def __init__(
        self,
        sources: PolicySources,
        catalog: Catalog,
        revocability: Mapping[str, str],
        guards: frozenset[str],
    ) -> None:
        self.catalog = catalog
        self.revocability = revocability
        self.compiled = compile_policies(sources, guards)
        self.policy_hash = sources.sha256(catalog.sha256)
        self._entities = lru_cache(maxsize=_ENTITIES_CACHED)(self._parse_entities)
        self._check_shape()

    def ask(self, source: Mapping[str, Any], *, permits_only: bool = False) -> Answer:
        """Evaluate one input.

        Raises:
            OutOfBoundsError: where the context is larger than policy looks at.

        """
        context, entities_text = _context_json(source), _entities_json(source)
        if len(context) + len(entities_text) > CONTEXT_BYTES_MAX:
            raise OutOfBoundsError("context")
        try:
            entities = self._entities(entities_text)
        except ValueError:
            return Answer(Outcome.FAILED)
        by_scope = self.compiled.permits_by_scope if permits_only else self.compiled.everything_by_scope
        principal, resource = source["principal"], source["resource"]
        policies = by_scope.matching(
            (principal["type"], principal["id"]), source["action"], (resource["type"], resource["id"])
        )
        return self._read(cedarpy.is_authorized(_request(source, context), policies, entities))

    def _read(self, result: cedarpy.AuthzResult) -> Answer:
        diagnostics = result.diagnostics
        if diagnostics.errors or result.decision is cedarpy.Decision.NoDecision:
            named = {name for error in diagnostics.errors for name in _ERROR_POLICY.findall(error)}
            failed = named & self.compiled.policies.keys()
            return Answer(Outcome.FAILED, tuple(sorted(diagnostics.reasons)), tuple(sorted(failed)))
        outcome = Outcome.ALLOW if result.decision is cedarpy.Decision.Allow else Outcome.DENY
        return Answer(outcome, tuple(sorted(diagnostics.reasons)))

    def _parse_entities(self, text: str) -> cedarpy.Entities:
        # With the schema, so that attributes are validated and the action groups are known.
        return cedarpy.Entities.from_json_str(text, self.compiled.schema)

    def _check_shape(self) -> None:
        """Refuse a schema that does not describe what the broker supplies."""
        problems = []
        for source in _specimens():
            try:
                entities = self._parse_entities(_entities_json(source))
            except ValueError as error:
                problems.append(f"{SCHEMA_NAME}: does not fit the entities the broker supplies: {error}")
                continue
            request = _request(source, _context_json(source))
            schema = self.compiled.schema
            answer = cedarpy.is_authorized(request, self.compiled.permits, entities, schema)
            if answer.decision is cedarpy.Decision.NoDecision:
                what = "; ".join(answer.diagnostics.errors)
                problems.append(f"{SCHEMA_NAME}: does not fit the context of {source['action']}: {what}")
        if problems:
            raise PolicyError(problems)


def _entities_json(source: Mapping[str, Any]) -> str:
    """Write principal, resource and facts: what stays the same from request to request is parsed once."""
    facts = {**_FACTS[source["kind"]], "attrs": source["context"]["facts"]}
    entities = [
        {"uid": {"type": entity["type"], "id": entity["id"]}, "attrs": entity["attrs"], "parents": ()}
        for entity in (source["principal"], source["resource"], facts)
    ]
    return orjson.dumps(entities).decode()


def _context_json(source: Mapping[str, Any]) -> str:
    """Write the context with a reference in place of the facts."""
    return orjson.dumps({**source["context"], "facts": {"__entity": _FACTS[source["kind"]]}}).decode()


def _request(source: Mapping[str, Any], context: str) -> dict[str, object]:
    principal, resource = source["principal"], source["resource"]
    return {
        "principal": {"type": principal["type"], "id": principal["id"]},
        "action": {"type": "Action", "id": source["action"]},
        "resource": {"type": resource["type"], "id": resource["id"]},
        "context": context,
    }


def _specimens() -> list[dict[str, JsonValue]]:
    """Make one input of each kind that says nothing of anybody, only which fields there are."""
    attrs = dict.fromkeys(("environment", "kind", "lifecycle", "owner", "team", "trust_domain"), "")
    principal: JsonValue = {"type": "Identity", "id": "spiffe://specimen", "attrs": attrs}
    resource = CatalogResource(
        id="specimen",
        title="",
        classification="public",
        environment="",
        owner="",
        tags=("specimen",),
        external=False,
    )
    purpose = Purpose(
        word="specimen", title="", teams=("specimen",), deadline_seconds_max=1, budget_leases_max=1
    )
    found = [neutral_task(principal, purpose, 0)]
    for effect in EFFECTS:
        action = CatalogAction(
            resource=resource,
            name="specimen",
            effect=effect,
            adapter="",
            recipe={},
            ttl_seconds_default=1,
            ttl_seconds_max=1,
        )
        found.append(neutral_credential(principal, action, purpose.word, "unknown", 0))
    return found
