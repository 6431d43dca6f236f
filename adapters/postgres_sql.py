"""The SQL an administrator runs once, and the names by which the adapter calls it."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING, Final

from adapters.postgres_config import PostgresConfig, PostgresRecipe
from adapters.postgres_scram import scram_verifier
from broker.core.secret import Secret

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

INSTALL_VERSION: Final = 1
"""Raised with every change to the functions; the adapter's check compares it."""

TTL_MS_MAX: Final = 7 * 24 * 3600 * 1000
"""How far ahead a leased login's VALID UNTIL may lie; the server refuses more."""

MINT_AGE_MS_MAX: Final = 30 * 60 * 1000
"""The server refuses a mint whose broker time is further off than this."""

TOMBSTONE_MS_MIN: Final = 2 * MINT_AGE_MS_MAX
"""A tombstone is kept at least this long, so that no mint still accepted can outlive it."""

MINT: Final = "SELECT nhi.mint($1, $2, $3, $4, $5, $6)"
REVOKE: Final = "SELECT role, outcome, databases FROM nhi.revoke($1)"
CUT: Final = "SELECT nhi.cut($1)"
INSPECT: Final = (
    "SELECT role, role_exists, can_login, sessions, tombstone_ms, checked_ms FROM nhi.inspect($1)"
)
LIST: Final = "SELECT role, created_ms FROM nhi.list($1, $2, $3)"
REAP: Final = "SELECT nhi.reap($1)"
REPORT: Final = "SELECT item, subject, ok FROM nhi.report($1, $2, $3)"
DISOWN: Final = "SELECT nhi.disown($1)"


def quote_identifier(name: str) -> str:
    """Quote a name for use as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def quote_literal(text: str) -> str:
    """Quote a text for use as an SQL string literal, whatever ``standard_conforming_strings`` says."""
    escaped = text.replace("'", "''").replace("\\", "\\\\")
    return f" E'{escaped}'" if "\\" in text else f"'{escaped}'"


def install_scripts(
    config: PostgresConfig, recipes: Iterable[Mapping[str, object]], *, set_password: bool = False
) -> dict[str, str]:
    """Return what an administrator runs once: the SQL by database, the fence database first.

    Args:
        config: the backend.
        recipes: every recipe of it in the catalog: they name the groups and the databases.
        set_password: whether the script gives the login its configured password, as a verifier.

    Raises:
        RecipeError: a recipe is not valid.

    """
    parsed = [PostgresRecipe.parse(recipe) for recipe in recipes]
    groups = ", ".join(quote_literal(group) for group in sorted({recipe.group for recipe in parsed}))
    login = quote_identifier(config.broker_user)
    set_it = ""
    if set_password:
        verifier = scram_verifier(Secret(config.password()))
        set_it = f"ALTER ROLE {login} PASSWORD {quote_literal(verifier)};\n"
    fence = {
        "groups": f"ARRAY[{groups}]::name[]",
        "set_password": set_it,
        "ttl_ms_max": str(TTL_MS_MAX),
        "mint_age_ms_max": str(MINT_AGE_MS_MAX),
        "tombstone_ms_min": str(TOMBSTONE_MS_MIN),
        "version": str(INSTALL_VERSION),
    }
    common = {
        "login": login,
        "login_literal": quote_literal(config.broker_user),
        "tag_literal": quote_literal(config.instance),
    }
    scripts: dict[str, str] = {}
    for database in [
        config.fence_database,
        *sorted({recipe.database for recipe in parsed} - {config.fence_database}),
    ]:
        template = "postgres_database.sql" if scripts else "postgres_fence.sql"
        names = {"database": quote_identifier(database), "database_literal": quote_literal(database)}
        scripts[database] = _render(template, {**fence, **common, **names})
    return scripts


def install_sql(
    config: PostgresConfig, recipes: Iterable[Mapping[str, object]], *, set_password: bool = False
) -> str:
    """Return `install_scripts` as one script for ``psql``, which changes databases as it goes."""
    create = f"CREATE DATABASE {quote_identifier(config.fence_database)}"
    names = {
        "create_literal": quote_literal(create),
        "database_literal": quote_literal(config.fence_database),
    }
    parts = [_render("postgres_preamble.sql", names)]
    for database, script in install_scripts(config, recipes, set_password=set_password).items():
        parts += [f"\n\\connect {quote_identifier(database)}\n", script]
    return "".join(parts)


def _render(template: str, values: Mapping[str, str]) -> str:
    # Split on the marks rather than replacing one after the other, so that a value that happens
    # to contain a mark is never taken for one.
    parts = resources.files("adapters").joinpath("sql", template).read_text("utf-8").split("@")
    return "".join(part if i % 2 == 0 else values[part] for i, part in enumerate(parts))
