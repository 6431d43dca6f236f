"""The catalog: what can be asked for, with classification, environment, owner, ceilings and recipe."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Final, Literal, Self

import orjson
from pydantic import AfterValidator, Field, JsonValue, model_validator

from broker.core.facts import Grant
from broker.core.task import LEASES_PER_TASK_MAX
from broker.policy.documents import Document, Place, Strict, Text, Word, read_document
from broker.policy.errors import PolicyError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

CLASSIFICATIONS: Final = ("public", "internal", "confidential", "restricted")
"""From harmless to grave; policy compares ranks, `rank_of`."""

RESOURCES_MAX: Final = 2000
ACTIONS_PER_RESOURCE_MAX: Final = 16
PURPOSES_MAX: Final = 256
TTL_SECONDS_MAX: Final = 86_400
DEADLINE_SECONDS_MAX: Final = 7 * 86_400
_RECIPE_BYTES_MAX: Final = 16_384

Effect = Literal["read", "write", "admin"]
Classification = Literal["public", "internal", "confidential", "restricted"]


def rank_of(classification: str) -> int:
    """Return 1 (public) to 4 (restricted); raises ValueError for any other word."""
    return CLASSIFICATIONS.index(classification) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Purpose:
    """Why a task may exist. The ceilings bound every task opened for it.

    Attributes:
        teams: whose identities may open such tasks, for the policies to use.

    """

    word: str
    title: str
    teams: tuple[str, ...]
    deadline_seconds_max: int
    budget_leases_max: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogResource:
    """One thing that can be asked for.

    Attributes:
        owner: the team that answers for it.
        external: whether what is written to it leaves the company.

    """

    id: str
    title: str
    classification: str
    environment: str
    owner: str
    tags: tuple[str, ...]
    external: bool

    @property
    def classification_rank(self) -> int:
        """1 (public) to 4 (restricted)."""
        return rank_of(self.classification)


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogAction:
    """One action on one resource, and how its credential is made.

    Attributes:
        name: what callers ask for.
        effect: ``read``, ``write`` or ``admin``: the Cedar action it is judged as.
        adapter: the configured backend's name.
        recipe: adapter-specific; the adapter validates it at start.

    """

    resource: CatalogResource
    name: str
    effect: str
    adapter: str
    recipe: Mapping[str, object] = field(hash=False)
    ttl_seconds_default: int
    ttl_seconds_max: int

    @property
    def key(self) -> Grant:
        """Resource id and action name."""
        return Grant(self.resource.id, self.name)


class Catalog:
    """The registered resources, purposes, teams and environments. Immutable."""

    def __init__(
        self,
        *,
        actions: Mapping[tuple[str, str], CatalogAction],
        purposes: Mapping[str, Purpose],
        teams: Mapping[str, str],
        environments: tuple[str, ...],
    ) -> None:
        self._actions = MappingProxyType(dict(actions))
        self.purposes: Mapping[str, Purpose] = MappingProxyType(dict(purposes))
        self.teams: Mapping[str, str] = MappingProxyType(dict(teams))
        self.environments = environments
        by_resource: dict[str, list[CatalogAction]] = {}
        for action in self._actions.values():
            by_resource.setdefault(action.resource.id, []).append(action)
        self._by_resource = {name: tuple(found) for name, found in by_resource.items()}
        self.sha256 = hashlib.sha256(self._canonical()).hexdigest()

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read ``catalog.yaml``.

        Raises:
            PolicyError: listing everything wrong with it, each with its line and place.

        """
        problems: list[str] = []
        document = read_document(path, problems)
        if document is None:
            raise PolicyError(problems)
        parts = _Reader(document, problems).read()
        if parts is None or problems:
            raise PolicyError(problems)
        return cls(
            actions=parts.actions, purposes=parts.purposes, teams=parts.teams, environments=parts.environments
        )

    def action(self, resource: str, action: str) -> CatalogAction | None:
        """Return the registered action, or None where there is none of that name."""
        return self._actions.get((resource, action))

    def actions_of(self, resource: str) -> tuple[CatalogAction, ...]:
        """Return every action registered for a resource; empty for an unknown one."""
        return self._by_resource.get(resource, ())

    def resource(self, resource: str) -> CatalogResource | None:
        """Return the registered resource, or None."""
        found = self._by_resource.get(resource)
        return found[0].resource if found else None

    def __iter__(self) -> Iterator[CatalogAction]:
        return iter(self._actions.values())

    def __len__(self) -> int:
        return len(self._actions)

    def recipes_by_adapter(self) -> dict[str, tuple[Mapping[str, object], ...]]:
        """Return each adapter's recipes, without repeats, in the catalog's order."""
        found: dict[str, dict[bytes, Mapping[str, object]]] = {}
        for action in self:
            name = orjson.dumps(dict(action.recipe), option=orjson.OPT_SORT_KEYS)
            found.setdefault(action.adapter, {}).setdefault(name, action.recipe)
        return {adapter: tuple(recipes.values()) for adapter, recipes in found.items()}

    def _canonical(self) -> bytes:
        content = {
            "environments": self.environments,
            "teams": dict(self.teams),
            "purposes": dict(self.purposes),
            "actions": [
                [
                    action.resource,
                    action.name,
                    action.effect,
                    action.adapter,
                    dict(action.recipe),
                    action.ttl_seconds_default,
                    action.ttl_seconds_max,
                ]
                for _, action in sorted(self._actions.items())
            ],
        }
        return orjson.dumps(content, option=orjson.OPT_SORT_KEYS)


def _without_floats(value: JsonValue) -> JsonValue:
    """Refuse what no canonical form holds, so that a recipe can be recorded as it is."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, float):
            raise ValueError("a recipe holds no fractions")  # noqa: TRY004  pydantic turns ValueError into a finding
        pending.extend(item.values() if isinstance(item, dict) else item if isinstance(item, list) else [])
    if len(orjson.dumps(value)) > _RECIPE_BYTES_MAX:
        raise ValueError(f"a recipe holds at most {_RECIPE_BYTES_MAX} bytes")
    return value


_TtlSeconds = Annotated[int, Field(ge=1, le=TTL_SECONDS_MAX)]
_DeadlineSeconds = Annotated[int, Field(ge=1, le=DEADLINE_SECONDS_MAX)]
_Budget = Annotated[int, Field(ge=1, le=LEASES_PER_TASK_MAX)]


class _ActionModel(Strict):
    effect: Effect
    adapter: Word
    recipe: Annotated[dict[str, JsonValue], AfterValidator(_without_floats)]
    ttl_seconds_default: _TtlSeconds
    ttl_seconds_max: _TtlSeconds

    @model_validator(mode="after")
    def _default_within_ceiling(self) -> Self:
        if self.ttl_seconds_default > self.ttl_seconds_max:
            raise ValueError("ttl_seconds_default is above ttl_seconds_max")
        return self


class _ResourceModel(Strict):
    title: Text
    classification: Classification
    environment: Word
    owner: Word
    tags: list[Word] = Field(default_factory=list, max_length=32)
    external: bool = False
    actions: dict[Word, _ActionModel] = Field(min_length=1, max_length=ACTIONS_PER_RESOURCE_MAX)


class _CeilingsModel(Strict):
    deadline_seconds_max: _DeadlineSeconds
    budget_leases_max: _Budget


class _PurposeModel(Strict):
    title: Text
    teams: list[Word] = Field(min_length=1, max_length=100)
    deadline_seconds_max: _DeadlineSeconds | None = None
    budget_leases_max: _Budget | None = None


class _RootModel(Strict):
    version: Literal[1]
    ceilings: _CeilingsModel
    environments: list[Word] = Field(min_length=1, max_length=32)
    teams: dict[Word, Text] = Field(min_length=1, max_length=1000)
    purposes: dict[Word, object] = Field(min_length=1, max_length=PURPOSES_MAX)
    resources: dict[Word, object] = Field(min_length=1, max_length=RESOURCES_MAX)


@dataclass(frozen=True, slots=True)
class _Parts:
    actions: Mapping[tuple[str, str], CatalogAction]
    purposes: Mapping[str, Purpose]
    teams: Mapping[str, str]
    environments: tuple[str, ...]


class _Reader:
    """Validates entry by entry, so that one bad resource hides no mistake in the next."""

    def __init__(self, document: Document, problems: list[str]) -> None:
        self._document = document
        self._problems = problems

    def read(self) -> _Parts | None:
        root = self._document.validate(_RootModel, self._document.content, (), self._problems)
        if root is None:
            return None
        actions: dict[tuple[str, str], CatalogAction] = {}
        for name, entry in root.resources.items():
            actions.update(self._resource(root, name, entry))
        purposes = {word: self._purpose(root, word, entry) for word, entry in root.purposes.items()}
        known = {word: purpose for word, purpose in purposes.items() if purpose is not None}
        return _Parts(actions, known, root.teams, tuple(root.environments))

    def _expect(self, word: str, known: object, place: Place, what: str) -> None:
        if not isinstance(known, (list, dict)) or word not in known:
            self._problems.append(f"{self._document.at(place)}: is not one of the catalog's {what}")

    def _resource(
        self, root: _RootModel, name: str, entry: object
    ) -> Iterator[tuple[tuple[str, str], CatalogAction]]:
        place: Place = ("resources", name)
        model = self._document.validate(_ResourceModel, entry, place, self._problems)
        if model is None:
            return
        self._expect(model.environment, root.environments, (*place, "environment"), "environments")
        self._expect(model.owner, root.teams, (*place, "owner"), "teams")
        resource = CatalogResource(
            id=name,
            title=model.title,
            classification=model.classification,
            environment=model.environment,
            owner=model.owner,
            tags=tuple(sorted(set(model.tags))),
            external=model.external,
        )
        for word, action in model.actions.items():
            yield (
                (name, word),
                CatalogAction(
                    resource=resource,
                    name=word,
                    effect=action.effect,
                    adapter=action.adapter,
                    recipe=MappingProxyType(dict(action.recipe)),
                    ttl_seconds_default=action.ttl_seconds_default,
                    ttl_seconds_max=action.ttl_seconds_max,
                ),
            )

    def _purpose(self, root: _RootModel, word: str, entry: object) -> Purpose | None:
        place: Place = ("purposes", word)
        model = self._document.validate(_PurposeModel, entry, place, self._problems)
        if model is None:
            return None
        for index, team in enumerate(model.teams):
            self._expect(team, root.teams, (*place, "teams", index), "teams")
        deadline = model.deadline_seconds_max or root.ceilings.deadline_seconds_max
        budget = model.budget_leases_max or root.ceilings.budget_leases_max
        if deadline > root.ceilings.deadline_seconds_max:
            where = self._document.at((*place, "deadline_seconds_max"))
            self._problems.append(f"{where}: is above the catalog's own ceiling")
        if budget > root.ceilings.budget_leases_max:
            where = self._document.at((*place, "budget_leases_max"))
            self._problems.append(f"{where}: is above the catalog's own ceiling")
        return Purpose(
            word=word,
            title=model.title,
            teams=tuple(sorted(set(model.teams))),
            deadline_seconds_max=deadline,
            budget_leases_max=budget,
        )
