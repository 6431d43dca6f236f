from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from broker.core.spiffe_id import SpiffeId
from broker.policy.errors import PolicyError
from broker.policy.registrations import Registration, Registrations

if TYPE_CHECKING:
    from pathlib import Path

    from broker.policy.catalog import Catalog

ID = "spiffe://dev.nhi.internal/agent/one"


def _load(tmp_path: Path, body: str, catalog: Catalog | None = None) -> Registrations:
    path = tmp_path / "identities.yaml"
    path.write_text("version: 1\nidentities:\n" + body)
    return Registrations.load(path, catalog=catalog)


def test_the_starter_file_fits_the_starter_catalog(starter: Path, catalog: Catalog) -> None:
    found = Registrations.load(starter / "identities.yaml", catalog=catalog)

    churn = found.get("spiffe://dev.nhi.internal/agent/churn-report")
    assert churn is not None
    assert (churn.team, churn.environment, churn.kind) == ("analytics", "prod", "agent")
    assert len(list(found)) == len(found) > 10


def test_what_is_left_out_is_empty(tmp_path: Path) -> None:
    body = f"  {ID}: {{owner: jo@example.com, team: analytics, environment: prod}}\n"
    assert list(_load(tmp_path, body)) == [
        Registration(
            spiffe_id=SpiffeId.parse(ID),
            owner="jo@example.com",
            team="analytics",
            environment="prod",
            kind="workload",
        )
    ]


@pytest.mark.parametrize("other", [ID + "/", ID.upper(), ID + "x", ID[:-1], ""], ids="ID-5-{}".format)
def test_registrations_match_byte_for_byte(tmp_path: Path, other: str) -> None:
    found = _load(tmp_path, f"  {ID}: {{owner: jo, team: analytics, environment: prod}}\n")
    assert found.get(other) is None


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("  spiffe://Dev/agent: {owner: jo, team: t, environment: prod}\n", "ID-2"),
        ("  spiffe://dev/a//b: {owner: jo, team: t, environment: prod}\n", "ID-3"),
        (f"  {ID}: {{team: t, environment: prod}}\n", "owner: Field required"),
        (f"  {ID}: {{owner: '', team: t, environment: prod}}\n", "owner: "),
        (f"  {ID}: {{owner: jo b, team: t, environment: prod}}\n", "owner: "),
        (f"  {ID}: {{owner: jo, team: t, environment: prod, criticality: huge}}\n", "criticality: "),
        (f"  {ID}: {{owner: jo, team: t, environment: prod, teem: t}}\n", "teem: Extra inputs"),
        (f"  {ID}: {{owner: jo, owner: al, team: t, environment: prod}}\n", "the key is given twice"),
        (f"  {ID}: 7\n", ID),
    ],
)
def test_a_mistake_is_named_with_its_place(tmp_path: Path, body: str, said: str) -> None:
    with pytest.raises(PolicyError) as caught:
        _load(tmp_path, body)
    assert said in str(caught.value)
    assert all(problem.startswith("identities.yaml:3") for problem in caught.value.problems)


def test_words_the_catalog_does_not_know_are_named_all_at_once(tmp_path: Path, catalog: Catalog) -> None:
    body = f"  {ID}: {{owner: jo, team: astronauts, environment: moon, purpose: fly}}\n"
    with pytest.raises(PolicyError) as caught:
        _load(tmp_path, body, catalog)
    assert len(caught.value.problems) == 3
