"""The part of a policy set that one question can match, as a set of its own.

A policy whose scope names another principal, action or resource is neither satisfied nor
can it raise an error, so leaving it out changes no answer; evaluating it costs time in
every request. Scopes that name groups or types are kept: they may match.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final

import cedarpy
import orjson

if TYPE_CHECKING:
    from collections.abc import Mapping

SLICES_MAX: Final = 512
"""Slices kept; the one unused for longest goes first."""


class Slices:
    """Cuts one immutable set of parsed statements, and remembers the pieces."""

    def __init__(self, statements: Mapping[str, dict[str, Any]], actions: frozenset[str]) -> None:
        """Keep the statements.

        Args:
            statements: Cedar's JSON form of each policy, by id.
            actions: the actions a question can have; any other name in a scope is a group.

        """
        self._statements = dict(statements)
        self._actions = actions
        self._named = {
            part: frozenset(_entity(body[part]) for body in statements.values() if body[part]["op"] == "==")
            for part in ("principal", "resource")
        }
        self._kept: OrderedDict[tuple[object, ...], cedarpy.PolicySet] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def matching(
        self, principal: tuple[str, str], action: str, resource: tuple[str, str]
    ) -> cedarpy.PolicySet:
        """Return the policies that can match; principal and resource are (type, id)."""
        # Entities no policy names by id share a slice.
        key = (
            principal if principal in self._named["principal"] else None,
            action,
            resource if resource in self._named["resource"] else None,
        )
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
            return found
        if len(self._kept) >= SLICES_MAX:
            self._kept.popitem(last=False)
        found = self._kept[key] = policy_set(
            {
                name: body
                for name, body in self._statements.items()
                if self._may_match(body, principal, action, resource)
            }
        )
        return found

    def _may_match(
        self, body: dict[str, Any], principal: tuple[str, str], action: str, resource: tuple[str, str]
    ) -> bool:
        for part, entity in (("principal", principal), ("resource", resource)):
            if body[part]["op"] == "==" and _entity(body[part]) != entity:
                return False
        scope = body["action"]
        if scope["op"] not in {"==", "in"}:
            return True
        listed = scope.get("entities") or [scope["entity"]]
        return any(name["id"] == action or name["id"] not in self._actions for name in listed)


def policy_set(statements: Mapping[str, dict[str, Any]]) -> cedarpy.PolicySet:
    """Build Cedar's handle from statements in their JSON form, keeping our ids."""
    document = {"staticPolicies": dict(statements), "templates": {}, "templateLinks": []}
    return cedarpy.PolicySet.from_json_str(orjson.dumps(document).decode())


def _entity(scope: dict[str, Any]) -> tuple[str, str]:
    # A template's slot has no entity; templates are refused at load.
    entity = scope.get("entity") or {"type": "", "id": ""}
    return entity["type"], entity["id"]
