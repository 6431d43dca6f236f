"""Identities as code: who answers for which SPIFFE ID, from ``policies/identities.yaml``."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Final, Literal, Self

from pydantic import Field, StringConstraints

from broker.core.registration import Registration
from broker.core.spiffe_id import SpiffeId, SpiffeIdError
from broker.policy.documents import Document, Place, Strict, Word, read_document
from broker.policy.errors import PolicyError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from broker.policy.catalog import Catalog

REGISTRATIONS_MAX: Final = 10_000

Criticality = Literal["low", "medium", "high", "critical"]
_Owner = Annotated[str, StringConstraints(pattern=r"^[\x21-\x7e]{1,254}$")]


class Registrations:
    """Registrations by SPIFFE ID. Immutable."""

    def __init__(self, entries: Mapping[str, Registration]) -> None:
        self._entries = MappingProxyType(dict(entries))

    @classmethod
    def load(cls, path: Path, *, catalog: Catalog | None = None) -> Self:
        """Read ``identities.yaml``; with a catalog, teams, environments and purposes must be in it.

        Raises:
            PolicyError: listing everything wrong with the file, each with its line and place.

        """
        problems: list[str] = []
        document = read_document(path, problems)
        if document is None:
            raise PolicyError(problems)
        root = document.validate(_RootModel, document.content, (), problems)
        if root is None:
            raise PolicyError(problems)
        found = [_read(document, key, entry, catalog, problems) for key, entry in root.identities.items()]
        if problems:
            raise PolicyError(problems)
        return cls({entry.spiffe_id: entry for entry in found if entry is not None})

    def get(self, spiffe_id: str) -> Registration | None:
        """Return what is registered for a SPIFFE ID, byte for byte, or None."""
        return self._entries.get(spiffe_id)

    def __iter__(self) -> Iterator[Registration]:
        return iter(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)


class _RegistrationModel(Strict):
    owner: _Owner
    team: Word
    environment: Word
    kind: Word = "workload"
    backup_owner: _Owner | None = None
    purpose: Word | None = None
    criticality: Criticality | None = None


class _RootModel(Strict):
    version: Literal[1]
    identities: dict[str, object] = Field(max_length=REGISTRATIONS_MAX)


def _read(
    document: Document, key: str, entry: object, catalog: Catalog | None, problems: list[str]
) -> Registration | None:
    place: Place = ("identities", key)
    spiffe_id: SpiffeId | None = None
    try:
        spiffe_id = SpiffeId.parse(key)
    except SpiffeIdError as error:
        problems.append(f"{document.at(place)}: {error}")
    model = document.validate(_RegistrationModel, entry, place, problems)
    if model is None or spiffe_id is None:
        return None
    if catalog is not None:
        for name, word, known in (
            ("team", model.team, catalog.teams),
            ("environment", model.environment, catalog.environments),
            ("purpose", model.purpose, catalog.purposes),
        ):
            if word is not None and word not in known:
                problems.append(f"{document.at((*place, name))}: is not in the catalog")
    return Registration(
        spiffe_id=spiffe_id,
        owner=model.owner,
        team=model.team,
        environment=model.environment,
        kind=model.kind,
        backup_owner=model.backup_owner or "",
        purpose=model.purpose or "",
        criticality=model.criticality or "",
    )
