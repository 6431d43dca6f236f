"""Reads, checks and compiles the Cedar files. Nothing here sees a request."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from string import Formatter
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Self

import cedarpy
import orjson

from broker.policy.errors import PolicyError
from broker.policy.inputs import CREDENTIAL, EFFECTS, OPEN_TASK, TASK
from broker.policy.slices import Slices, policy_set

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

SCHEMA_NAME: Final = "schema.cedarschema"
FILE_BYTES_MAX: Final = 1024 * 1024
POLICIES_MAX: Final = 2000
REASON_LENGTH_MAX: Final = 400

GUARDS: Final = frozenset(
    {
        "identity-standing",
        "task-bound-action",
        "task-bound-classification",
        "task-bound-resource",
        "task-budget-ceiling",
        "task-deadline-ceiling",
        "ttl-ceiling",
    }
)
"""Forbids without which a set does not load: a task's bounds and the catalog's ceilings
hold under every set (DESIGN 7), and a forgotten file must not lift them in silence."""

PLACEHOLDERS: Final[Mapping[str, frozenset[str]]] = MappingProxyType(
    {
        CREDENTIAL: frozenset(
            {
                "classification",
                "classification_max",
                "identity_environment",
                "lifecycle",
                "owner",
                "purpose",
                "resource_environment",
                "team",
                "ttl_seconds_max",
            }
        ),
        TASK: frozenset(
            {
                "budget_leases_max",
                "deadline_seconds_max",
                "identity_environment",
                "lifecycle",
                "purpose",
                "team",
            }
        ),
    }
)
"""What an ``@reason`` may name in braces, per kind of question."""

_ID: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_GROUP: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_ACTIONS: Final = frozenset({*EFFECTS, OPEN_TASK})
_ANNOTATIONS: Final = frozenset({"id", "reason", "needs_approval"})


@dataclass(frozen=True, slots=True)
class PolicyFile:
    """One ``*.cedar`` file."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class PolicySources:
    """The files a set is made of, sorted by name."""

    schema: str
    files: tuple[PolicyFile, ...]

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read ``schema.cedarschema`` and every ``*.cedar`` directly in `directory`.

        Raises:
            PolicyError: for each file that is missing, too large or not UTF-8.

        """
        problems: list[str] = []
        schema = _read_text(directory / SCHEMA_NAME, problems)
        found = sorted(directory.glob("*.cedar"))
        files = tuple(PolicyFile(path.name, _read_text(path, problems)) for path in found)
        if not files:
            problems.append(f"{directory.name}: holds no *.cedar file; an empty set permits nothing")
        if problems:
            raise PolicyError(problems)
        return cls(schema, files)

    def sha256(self, catalog_sha256: str) -> str:
        """Name this set under this catalog: equal hashes decide every input alike."""
        digest = hashlib.sha256()
        for name, text in (*((file.name, file.text) for file in self.files), (SCHEMA_NAME, self.schema)):
            body = text.encode()
            digest.update(f"{name}\0{len(body)}\0".encode() + body)
        digest.update(f"catalog\0{catalog_sha256}".encode())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyInfo:
    """What a policy says of itself.

    Attributes:
        id: its ``@id``.
        effect: ``permit`` or ``forbid``.
        kinds: the kinds of question its action scope can match.
        reason: its public sentence, with placeholders; empty for most permits.
        needs_approval: the group whose approval lifts this forbid, or None.

    """

    id: str
    file: str
    effect: str
    kinds: frozenset[str]
    reason: str = ""
    needs_approval: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledPolicies:
    """The parsed handles; built once per set.

    Attributes:
        permits: the same set without its forbids: tells whether a request would pass but for them.
        everything_by_scope, permits_by_scope: the same, cut down to what one question can match.

    """

    schema: cedarpy.Schema
    everything: cedarpy.PolicySet
    permits: cedarpy.PolicySet
    everything_by_scope: Slices
    permits_by_scope: Slices
    policies: Mapping[str, PolicyInfo]


def compile_policies(sources: PolicySources, guards: frozenset[str] = GUARDS) -> CompiledPolicies:
    """Parse and validate a set.

    Raises:
        PolicyError: listing everything wrong with it.

    """
    problems: list[str] = []
    schema = _schema(sources.schema, problems)
    statements: dict[str, dict[str, Any]] = {}
    policies: dict[str, PolicyInfo] = {}
    for file in sources.files:
        for statement in _parse(file, problems):
            info = _describe(file.name, statement, problems)
            if info is None:
                continue
            if info.id in policies:
                problems.append(f"{file.name}: the id {info.id} is already used in {policies[info.id].file}")
                continue
            policies[info.id] = info
            statements[info.id] = statement
        if schema is not None:
            problems.extend(_validate(file, schema))
    problems.extend(_check_whole(policies, guards))
    if problems or schema is None:
        raise PolicyError(problems)
    permits = {name: body for name, body in statements.items() if policies[name].effect == "permit"}
    return CompiledPolicies(
        schema=schema,
        everything=policy_set(statements),
        permits=policy_set(permits),
        everything_by_scope=Slices(statements, _ACTIONS),
        permits_by_scope=Slices(permits, _ACTIONS),
        policies=MappingProxyType(policies),
    )


def _read_text(path: Path, problems: list[str]) -> str:
    try:
        raw = path.read_bytes()
        if len(raw) <= FILE_BYTES_MAX:
            return raw.decode()
        problems.append(f"{path.name}: is larger than {FILE_BYTES_MAX} bytes")
    except OSError as error:
        problems.append(f"{path.name}: cannot be read: {error.strerror}")
    except UnicodeDecodeError:
        problems.append(f"{path.name}: is not UTF-8")
    return ""


def _schema(text: str, problems: list[str]) -> cedarpy.Schema | None:
    try:
        return cedarpy.Schema.from_str(text)
    except ValueError as error:
        problems.append(f"{SCHEMA_NAME}: {error}")
        return None


def _parse(file: PolicyFile, problems: list[str]) -> list[dict[str, Any]]:
    try:
        parsed = orjson.loads(cedarpy.policies_to_json_str(file.text))
    except ValueError as error:
        problems.append(f"{file.name}: does not parse: {error}")
        return []
    if parsed["templates"]:
        problems.append(f"{file.name}: templates (?principal, ?resource) are not supported")
    if not parsed["staticPolicies"] and not parsed["templates"]:
        problems.append(f"{file.name}: holds no policy")
    return list(parsed["staticPolicies"].values())


def _validate(file: PolicyFile, schema: cedarpy.Schema) -> list[str]:
    try:
        found = cedarpy.validate_policies(file.text, schema)
    except ValueError:
        return []  # it does not parse, which was said already
    names = found.id_annotations_by_policy_id
    return [
        f"{file.name}: {names.get(error.policy_id, error.policy_id)}: {error.error}"
        for error in found.errors
        if error.policy_id  # one without a policy is the parse error again
    ]


def _describe(file: str, statement: dict[str, Any], problems: list[str]) -> PolicyInfo | None:
    notes: dict[str, str | None] = statement.get("annotations", {})
    name = notes.get("id") or ""
    if not _ID.fullmatch(name):
        problems.append(f'{file}: a policy has no @id("…") of lower case letters, digits and dashes')
        return None
    here = f"{file}: {name}"
    problems.extend(
        f"{here}: @{note} is not an annotation we know" for note in sorted(notes.keys() - _ANNOTATIONS)
    )
    kinds = _kinds(statement["action"])
    reason = notes.get("reason") or ""
    group = notes.get("needs_approval")
    if statement["effect"] == "forbid" and not reason:
        problems.append(f'{here}: a forbid needs a @reason("…"): the sentence its caller is told')
    problems.extend(f"{here}: {wrong}" for wrong in _reason_problems(reason, kinds))
    if "needs_approval" in notes:
        problems.extend(f"{here}: {wrong}" for wrong in _approval_problems(statement, group))
    return PolicyInfo(
        id=name, file=file, effect=statement["effect"], kinds=kinds, reason=reason, needs_approval=group
    )


def _kinds(action: Mapping[str, Any]) -> frozenset[str]:
    """Say which questions an action scope can match; a group we do not know may match any."""
    named = [action["entity"]] if "entity" in action else action.get("entities", [])
    names = {entity["id"] for entity in named}
    if action["op"] == "All" or not names:
        return frozenset({CREDENTIAL, TASK})
    credential = {*EFFECTS, "use", "change"}
    kinds = {CREDENTIAL} if names & credential else set()
    kinds |= {TASK} if OPEN_TASK in names else set()
    return frozenset(kinds or {CREDENTIAL, TASK})


def _reason_problems(reason: str, kinds: frozenset[str]) -> Iterable[str]:
    if len(reason) > REASON_LENGTH_MAX or not reason.isprintable():
        yield f"the @reason is not one printable line of at most {REASON_LENGTH_MAX} characters"
    try:
        names = [(name, spec, conversion) for _, name, spec, conversion in Formatter().parse(reason)]
    except ValueError:
        yield "the @reason has an unpaired brace"
        return
    for name, spec, conversion in names:
        if name is None:
            continue
        if spec or conversion or not all(name in PLACEHOLDERS[kind] for kind in kinds):
            yield f"the @reason names {{{name}}}, which not every question it answers can fill"


def _approval_problems(statement: dict[str, Any], group: str | None) -> Iterable[str]:
    if statement["effect"] != "forbid":
        yield "@needs_approval belongs on a forbid"
    if not group or not _GROUP.fullmatch(group):
        yield "@needs_approval names no group"
    # A forbid that never looks for its group's approval could not be lifted by it.
    elif orjson.dumps({"Value": group}) not in orjson.dumps(statement["conditions"]):
        yield f'no condition looks for "{group}" in context.facts.approvals'


def _check_whole(policies: Mapping[str, PolicyInfo], guards: frozenset[str]) -> Iterable[str]:
    if len(policies) > POLICIES_MAX:
        yield f"the set holds more than {POLICIES_MAX} policies"
    if not any(policy.effect == "permit" for policy in policies.values()):
        yield "the set holds no permit: everything would be refused"
    for name in sorted(guards):
        found = policies.get(name)
        if found is None or found.effect != "forbid":
            yield f"the guard {name} is missing: keep guards.cedar, it holds tasks to their bounds"
