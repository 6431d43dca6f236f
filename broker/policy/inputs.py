"""The facts given to Cedar: one canonical, replayable input per question.

An input holds words, numbers and sets of words, never free text: of the caller's reason
policy learns the length, so that the record of a decision can be kept for ever while the
text itself stays erasable (DESIGN 9). Everything in it is bounded here, whatever the edge
let through.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from broker.core.task import DEADLINE_SECONDS_DEFAULT
from broker.policy.catalog import CLASSIFICATIONS, rank_of

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from broker.core.audit import JsonValue
    from broker.core.facts import (
        CredentialQuestion,
        History,
        IdentityFacts,
        Intent,
        TaskFacts,
        TaskQuestion,
    )
    from broker.policy.catalog import Catalog, CatalogAction, CatalogResource, Purpose

VERSION: Final = 1
CREDENTIAL: Final = "credential"
TASK: Final = "task"
OPEN_TASK: Final = "open_task"
EFFECTS: Final = ("read", "write", "admin")

BOUND_NAMES_MAX: Final = 100
HISTORY_GRANTS_MAX: Final = 10_000
NAME_LENGTH_MAX: Final = 256
NUMBER_MAX: Final = 2**31 - 1
REASON_LENGTH_MAX: Final = 4096

_WORD: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_TOOL: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}|")
_MS_PER_HOUR: Final = 3_600_000
_MS_PER_DAY: Final = 24 * _MS_PER_HOUR
_EPOCH_WEEKDAY: Final = 3  # 1 January 1970 was a Thursday; Monday is 0 here, 1 in the facts


@dataclass(frozen=True, slots=True)
class OutOfBoundsError(Exception):
    """A question is larger than policy looks at; `part` names which part, as the API calls it."""

    part: str

    def __str__(self) -> str:
        return self.part


def credential_input(
    question: CredentialQuestion,
    catalog: Catalog,
    revocability: Mapping[str, str],
    approvals: Collection[str] = (),
) -> dict[str, JsonValue]:
    """Build the input of a credential decision.

    Raises:
        OutOfBoundsError: where a part is too long, too many or no name.

    """
    # Every bound is checked before the catalog is asked: a refusal for size must not tell
    # whether a resource exists.
    identity = identity_entity(question.identity)
    _check_number(question.ttl_seconds, "ttl_seconds")
    task = _task_facts(question.task)
    claims = _claims(question.intent)
    history = _history(question.history, catalog)
    action = catalog.action(question.resource, question.action)
    if action is None:
        names = {"resource": question.resource, "action": question.action}
        return _unregistered(CREDENTIAL, identity, question.now_ms, names)
    return credential_source(
        identity,
        action,
        revocability.get(action.adapter, "unknown"),
        now_ms=question.now_ms,
        ttl_seconds=question.ttl_seconds,
        task=task,
        history=history,
        claims=claims,
        approvals=approvals,
    )


def credential_source(
    principal: JsonValue,
    action: CatalogAction,
    revocability: str,
    *,
    now_ms: int,
    ttl_seconds: int,
    task: JsonValue,
    history: JsonValue,
    claims: JsonValue,
    approvals: Collection[str] = (),
) -> dict[str, JsonValue]:
    """Put the parts of a credential input in their one order."""
    return {
        "version": VERSION,
        "kind": CREDENTIAL,
        "principal": principal,
        "action": action.effect,
        "resource": resource_entity(action.resource),
        "context": {
            "clock": _clock(now_ms),
            "facts": {
                "approvals": _sorted(approvals),
                "history": history,
                "revocability": revocability,
                "task": task,
                "ttl_seconds_max": action.ttl_seconds_max,
            },
            "claims": claims,
            "request": {"action": action.name, "ttl_seconds": ttl_seconds},
        },
    }


def task_input(
    question: TaskQuestion, catalog: Catalog, approvals: Collection[str] = ()
) -> dict[str, JsonValue]:
    """Build the input of a decision to open a task; raises as `credential_input`."""
    identity = identity_entity(question.identity)
    _check_number(question.deadline_seconds, "deadline_seconds")
    _check_number(question.budget_leases, "budget_leases")
    bounds = _task_facts(question.task)
    history = _history(question.history, catalog)
    purpose = catalog.purposes.get(question.task.purpose)
    if purpose is None:
        return _unregistered(TASK, identity, question.now_ms, {"purpose": question.task.purpose})
    del bounds["purpose"]  # it is the resource here
    return task_source(
        identity,
        purpose,
        now_ms=question.now_ms,
        history=history,
        request={
            **bounds,
            "deadline_seconds": question.deadline_seconds,
            "budget_leases": question.budget_leases,
        },
        approvals=approvals,
    )


def task_source(
    principal: JsonValue,
    purpose: Purpose,
    *,
    now_ms: int,
    history: JsonValue,
    request: JsonValue,
    approvals: Collection[str] = (),
) -> dict[str, JsonValue]:
    """Put the parts of a task input in their one order."""
    return {
        "version": VERSION,
        "kind": TASK,
        "principal": principal,
        "action": OPEN_TASK,
        "resource": purpose_entity(purpose),
        "context": {
            "clock": _clock(now_ms),
            "facts": {"approvals": _sorted(approvals), "history": history},
            "request": request,
        },
    }


def neutral_credential(
    principal: JsonValue, action: CatalogAction, purpose: str, revocability: str, now_ms: int
) -> dict[str, JsonValue]:
    """Ask for an action as plainly as can be: default TTL, no history, a task without bounds."""
    task: JsonValue = {
        "actions": [],
        "classification_rank_max": len(CLASSIFICATIONS),
        "purpose": purpose,
        "resources": [],
    }
    return credential_source(
        principal,
        action,
        revocability,
        now_ms=now_ms,
        ttl_seconds=action.ttl_seconds_default,
        task=task,
        history=_NO_HISTORY,
        claims={"tool": "", "reason_length": 0},
    )


def neutral_task(principal: JsonValue, purpose: Purpose, now_ms: int) -> dict[str, JsonValue]:
    """Ask to open a task as plainly as can be: the default deadline, one lease, no bounds."""
    request: JsonValue = {
        "actions": [],
        "budget_leases": 1,
        "classification_rank_max": len(CLASSIFICATIONS),
        "deadline_seconds": min(DEADLINE_SECONDS_DEFAULT, purpose.deadline_seconds_max),
        "resources": [],
    }
    return task_source(principal, purpose, now_ms=now_ms, history=_NO_HISTORY, request=request)


def out_of_bounds_input(kind: str, part: str) -> dict[str, JsonValue]:
    """Record a refusal for size without keeping what was too large."""
    return {"version": VERSION, "kind": kind, "out_of_bounds": part}


def identity_entity(identity: IdentityFacts) -> dict[str, JsonValue]:
    """Return the principal: what the inventory knows of the caller."""
    attrs: dict[str, JsonValue] = {
        "environment": identity.environment,
        "kind": identity.kind,
        "lifecycle": identity.lifecycle.value,
        "owner": identity.owner,
        "team": identity.team,
        "trust_domain": identity.spiffe_id.trust_domain,
    }
    for name in ("environment", "kind", "owner", "team"):
        value = attrs[name]
        if not isinstance(value, str) or len(value) > NAME_LENGTH_MAX or not value.isprintable():
            raise OutOfBoundsError(f"identity.{name}")
    return {"type": "Identity", "id": str(identity.spiffe_id), "attrs": attrs}


def resource_entity(resource: CatalogResource) -> dict[str, JsonValue]:
    """Return the resource as the catalog describes it."""
    return {
        "type": "Resource",
        "id": resource.id,
        "attrs": {
            "classification": resource.classification,
            "classification_rank": resource.classification_rank,
            "environment": resource.environment,
            "external": resource.external,
            "name": resource.id,
            "owner": resource.owner,
            "tags": [*resource.tags],
        },
    }


def purpose_entity(purpose: Purpose) -> dict[str, JsonValue]:
    """Return the purpose that a task is to be opened for."""
    return {
        "type": "Purpose",
        "id": purpose.word,
        "attrs": {
            "budget_leases_max": purpose.budget_leases_max,
            "deadline_seconds_max": purpose.deadline_seconds_max,
            "name": purpose.word,
            "teams": [*purpose.teams],
        },
    }


def _unregistered(
    kind: str, principal: JsonValue, now_ms: int, names: Mapping[str, str]
) -> dict[str, JsonValue]:
    return {
        "version": VERSION,
        "kind": kind,
        "principal": principal,
        "now_ms": now_ms,
        "unregistered": {part: _word_or_none(name) for part, name in names.items()},
    }


def _claims(intent: Intent) -> dict[str, JsonValue]:
    if not _TOOL.fullmatch(intent.tool):
        raise OutOfBoundsError("intent.tool")
    if len(intent.reason) > REASON_LENGTH_MAX:
        raise OutOfBoundsError("intent.reason")
    return {"reason_length": len(intent.reason), "tool": intent.tool}


def _word_or_none(text: str) -> str | None:
    """Keep what could be a registered word; anything else is free text and stays out of the record."""
    return text if _WORD.fullmatch(text) else None


def _check_number(value: int, part: str) -> None:
    if not 0 < value <= NUMBER_MAX:
        raise OutOfBoundsError(part)


def _names(values: tuple[str, ...], part: str) -> list[JsonValue]:
    if len(values) > BOUND_NAMES_MAX or not all(map(_WORD.fullmatch, values)):
        raise OutOfBoundsError(part)
    return _sorted(set(values))


def _task_facts(task: TaskFacts) -> dict[str, JsonValue]:
    if not _WORD.fullmatch(task.purpose):
        raise OutOfBoundsError("task.purpose")
    ceiling = task.classification_max
    if ceiling is not None and ceiling not in CLASSIFICATIONS:
        raise OutOfBoundsError("task.classification_max")
    return {
        "actions": _names(task.actions, "task.actions"),
        "classification_rank_max": len(CLASSIFICATIONS) if ceiling is None else rank_of(ceiling),
        "purpose": task.purpose,
        "resources": _names(task.resources, "task.resources"),
    }


def _clock(now_ms: int) -> dict[str, JsonValue]:
    return {
        "hour_utc": now_ms // _MS_PER_HOUR % 24,
        "now_ms": now_ms,
        "weekday_utc": (now_ms // _MS_PER_DAY + _EPOCH_WEEKDAY) % 7 + 1,
    }


def _history(history: History, catalog: Catalog) -> dict[str, JsonValue]:
    """Say what was within reach before, in the catalog's words.

    Every grant counts as having seen its resource, one to write too: what may write to a
    database or a service can as a rule read from it, and the broker cannot tell. A grant
    whose resource has left the catalog is told apart, so that no edit of the catalog
    makes history forget.
    """
    facts: dict[str, JsonValue] = {}
    for scope, grants in (("task", history.task), ("identity", history.identity)):
        if len(grants) > HISTORY_GRANTS_MAX:
            raise OutOfBoundsError("history")
        seen = {name: catalog.resource(name) for name in {grant.resource for grant in grants}}
        known = [resource for resource in seen.values() if resource is not None]
        facts[f"{scope}_seen_classifications"] = _sorted({resource.classification for resource in known})
        facts[f"{scope}_seen_tags"] = _sorted({tag for resource in known for tag in resource.tags})
        facts[f"{scope}_seen_unregistered"] = len(known) < len(seen)
    return facts


def _sorted(words: Collection[str]) -> list[JsonValue]:
    return [*sorted(words)]


_NO_HISTORY: Final[Mapping[str, JsonValue]] = {
    f"{scope}_seen_{what}": empty
    for scope in ("task", "identity")
    for what, empty in (("classifications", ()), ("tags", ()), ("unregistered", False))
}
