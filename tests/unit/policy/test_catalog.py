from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from broker.core.facts import Grant
from broker.policy.catalog import Catalog
from broker.policy.errors import PolicyError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def load_with(folder: Path) -> Callable[[str, str], Catalog]:
    """Load the starter catalog with one text replaced by another, once."""

    def load(old: str, new: str) -> Catalog:
        path = folder / "catalog.yaml"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
        return Catalog.load(path)

    return load


def test_an_action_knows_its_resource_effect_recipe_and_ceilings(catalog: Catalog) -> None:
    found = catalog.action("payments-ledger", "close-period")

    assert found is not None
    assert found.key == Grant("payments-ledger", "close-period")
    assert (found.effect, found.adapter) == ("admin", "tokens")
    assert (found.ttl_seconds_default, found.ttl_seconds_max) == (60, 120)
    assert found.recipe["scope"] == "ledger:close"
    assert (found.resource.owner, found.resource.classification_rank) == ("payments", 4)


@pytest.mark.parametrize(
    ("resource", "action"), [("orders-db", "drop"), ("none", "read"), ("", ""), ("ORDERS-DB", "read")]
)
def test_an_unknown_name_is_none(catalog: Catalog, resource: str, action: str) -> None:
    assert catalog.action(resource, action) is None


def test_iteration_yields_every_action_once(catalog: Catalog) -> None:
    keys = [action.key for action in catalog]
    assert len(keys) == len(set(keys)) == len(catalog)
    assert all(catalog.action(key.resource, key.action) is not None for key in keys)


def test_recipes_by_adapter_hold_each_recipe_once(load_with: Callable[[str, str], Catalog]) -> None:
    catalog = load_with("group: orders_writer", "group: orders_reader")
    assert [dict(recipe) for recipe in catalog.recipes_by_adapter()["orders-postgres"]] == [
        {"database": "orders", "group": "orders_reader"}
    ]


def test_a_purpose_without_ceilings_takes_the_catalogs(catalog: Catalog) -> None:
    assert catalog.purposes["churn-report"].deadline_seconds_max == 28_800
    assert catalog.purposes["support-ticket"].budget_leases_max == 50


def test_the_hash_names_the_content_not_the_spelling(
    load_with: Callable[[str, str], Catalog], catalog: Catalog
) -> None:
    assert load_with("version: 1", "# a comment\nversion: 1").sha256 == catalog.sha256


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("ttl_seconds_max: 900", "ttl_seconds_max: 901"),
        ("classification: confidential", "classification: internal"),
        ("tags: [customer-data]", "tags: []"),
        ("external: true", "external: false"),
        ("group: orders_writer", "group: orders_reader"),
        ("teams: [support]", "teams: [support, analytics]"),
        ("budget_leases_max: 50", "budget_leases_max: 49"),
        ("environments: [dev,", "environments: [test, dev,"),
        ("title: Orders database", "title: Orders"),
    ],
)
def test_the_hash_changes_with_what_decisions_or_mints_depend_on(
    load_with: Callable[[str, str], Catalog], catalog: Catalog, old: str, new: str
) -> None:
    assert load_with(old, new).sha256 != catalog.sha256


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "classification: confidential",
            "classification: secret",
            "resources.orders-db.classification: Input",
        ),
        ("owner: commerce", "owner: nobody", "resources.orders-db.owner: is not one of the catalog's teams"),
        ("environment: prod", "environment: qa", "orders-db.environment: is not one of the catalog's envir"),
        ("teams: [support]", "teams: [helpers]", "purposes.support-ticket.teams[0]: is not one of the cat"),
        ("effect: read", "effect: peek", "resources.orders-db.actions.read.effect: "),
        ("adapter: orders-postgres", "adapter: ''", "resources.orders-db.actions.read.adapter: "),
        ("ttl_seconds_max: 3600", "ttl_seconds_max: 299", "ttl_seconds_default is above ttl_seconds_max"),
        ("ttl_seconds_max: 3600", "ttl_seconds_max: 86401", "actions.read.ttl_seconds_max: "),
        ("ttl_seconds_default: 300", "ttl_seconds_default: 0", "actions.read.ttl_seconds_default: "),
        ("ttl_seconds_default: 300", "ttl_seconds_default: '300'", "valid integer"),
        ("ttl_seconds_default: 300", "ttl_seconds_default: yes", "valid integer"),
        ("external: true", "external: 'yes'", "resources.partner-export.external: "),
        ("budget_leases_max: 1000", "budget_leases_max: 1001", "ceilings.budget_leases_max: "),
        ("deadline_seconds_max: 3600", "deadline_seconds_max: 28801", "is above the catalog's own ceiling"),
        ("version: 1", "version: 2", "version: "),
        ("version: 1", "version: 1\nextra: 1", "extra: Extra inputs are not permitted"),
        ("tags: [customer-data]", "tag: [customer-data]", "resources.orders-db.tag: Extra inputs are not"),
        ("database: orders,", "database: 1.5,", "a recipe holds no fractions"),
        ("database: orders,", "database: [{a: 1.5}],", "a recipe holds no fractions"),
        ("database: orders,", "database: 2026-01-01,", "resources.orders-db.actions.read.recipe"),
        ("  orders-db:", "  Orders DB:", "resources.Orders DB"),
    ],
)
def test_a_mistake_stops_the_load_and_is_named_with_its_place(
    load_with: Callable[[str, str], Catalog], old: str, new: str, said: str
) -> None:
    with pytest.raises(PolicyError) as caught:
        load_with(old, new)
    assert said in str(caught.value)
    assert all(problem.startswith("catalog.yaml:") for problem in caught.value.problems)


def test_all_mistakes_are_told_at_once(folder: Path) -> None:
    path = folder / "catalog.yaml"
    text = path.read_text()
    for old, new in (
        ("classification: confidential", "classification: secret"),
        ("owner: platform", "owner: nobody"),
        ("teams: [support]", "teams: [helpers]"),
        ("ttl_seconds_max: 120", "ttl_seconds_max: 12"),
    ):
        text = text.replace(old, new, 1)
    path.write_text(text)

    with pytest.raises(PolicyError) as caught:
        Catalog.load(path)

    assert len(caught.value.problems) == 4


def test_a_mistake_never_repeats_the_value(load_with: Callable[[str, str], Catalog]) -> None:
    with pytest.raises(PolicyError) as caught:
        load_with("ttl_seconds_default: 300", "ttl_seconds_default: hunter2")
    assert "hunter2" not in str(caught.value)
