"""Does what is installed suffice to mint and to revoke, and if not, what is missing?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from adapters import postgres_sql as sql
from adapters.postgres_sql import quote_identifier as quoted
from broker.core.ports import Check

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapters.postgres_config import PostgresConfig, PostgresRecipe

_FUNCTIONS: Final = (
    "nhi.mint(text,text,text,bigint,bigint,integer)",
    "nhi.revoke(text[])",
    "nhi.cut(text[])",
    "nhi.inspect(text[])",
    "nhi.list(text,text,integer)",
    "nhi.reap(text)",
    "nhi.report(text,text[],text[])",
    "nhi.version()",
)

_OLDEST_SERVER: Final = 140000

_MISSING_FUNCTIONS: Final = (
    "SELECT f FROM unnest($1::text[]) AS f WHERE to_regprocedure(f) IS NULL"
    " OR NOT has_function_privilege(to_regprocedure(f), 'EXECUTE')"
)


class Findings:
    """Collects checks; knows the statement that mends each."""

    def __init__(self, config: PostgresConfig) -> None:
        self._config = config
        self.checks: list[Check] = []

    def add(self, name: str, *, ok: bool, remedy: str) -> None:
        """Record one check; the remedy is kept only where it is needed."""
        self.checks.append(Check(name=name, ok=ok, remedy="" if ok else remedy))

    def unreachable(self, error: Exception) -> None:
        """Record that the server could not be asked; never shows the error's own text."""
        config = self._config
        reason = getattr(error, "sqlstate", None) or type(error).__name__
        self.add(
            f"the broker logs in to {config.fence_database} at {config.host}:{config.port}",
            ok=False,
            remedy=(
                f"it did not ({reason}): check address, TLS and pg_hba.conf; CREATE DATABASE "
                f"{quoted(config.fence_database)}; run {self._install}; and give the login its password "
                f"with ALTER ROLE {quoted(config.broker_user)} PASSWORD '…'"
            ),
        )

    def disown_installed(self, database: str, *, ok: bool) -> None:
        """Record whether what leased logins leave behind in `database` can be taken from them."""
        self.add(
            f"left-over objects in database {database} can be taken from revoked logins",
            ok=ok,
            remedy=f"run {self._install} in database {quoted(database)}",
        )

    @property
    def _install(self) -> str:
        return f"the output of `nhi adapter postgres install {self._config.name}`"

    def reported(self, item: str, subject: str, *, ok: bool) -> None:
        """Record one row of ``nhi.report``."""
        fence, login = quoted(self._config.fence_database), quoted(self._config.broker_user)
        who = quoted(subject)
        name, remedy = {
            "instance": (
                f"the login acts for instance {self._config.instance}",
                f"run {self._install}: it registers the instance",
            ),
            "login_is_plain": (
                "the broker's login holds no powers of its own",
                f"ALTER ROLE {login} NOSUPERUSER NOCREATEROLE NOBYPASSRLS NOREPLICATION",
            ),
            "owner_creates_roles": (
                f"the functions' owner {subject} may create roles",
                f"ALTER ROLE {who} CREATEROLE",
            ),
            "owner_ends_sessions": (
                f"the functions' owner {subject} may end sessions",
                f"GRANT pg_signal_backend TO {who}",
            ),
            "fence_is_closed": (
                "the fence database is closed to leased logins",
                f"REVOKE ALL ON DATABASE {fence} FROM PUBLIC",
            ),
            "group_exists": (f"group {subject} exists", f"CREATE ROLE {who} NOLOGIN"),
            "group_allowed": (
                f"group {subject} is on the allow-list",
                f"run {self._install}: it lists the groups of the catalog",
            ),
            "group_is_plain": (
                f"group {subject} holds no power over roles or the server",
                f"ALTER ROLE {who} NOSUPERUSER NOCREATEROLE NOCREATEDB NOBYPASSRLS NOREPLICATION",
            ),
            "group_grantable": (
                f"the functions' owner may grant group {subject}",
                f"GRANT {who} TO the owner of schema nhi WITH ADMIN OPTION",
            ),
            "group_kept_out": (
                f"group {subject} cannot reach the fence database",
                f"REVOKE ALL ON DATABASE {fence} FROM {who}",
            ),
            "database_exists": (f"database {subject} exists", f"CREATE DATABASE {who}"),
        }[item]
        self.add(name, ok=ok, remedy=remedy)


async def check_installation(
    connection: Any,  # noqa: ANN401  a pooled or a plain asyncpg connection; this file does not import asyncpg
    recipes: Sequence[PostgresRecipe],
    findings: Findings,
) -> None:
    """Ask the server, over the broker's own connection, and record what it answers."""
    version = int(await connection.fetchval("SELECT current_setting('server_version_num')"))
    findings.add(
        "the server is PostgreSQL 14 or later", ok=version >= _OLDEST_SERVER, remedy="upgrade the server"
    )
    backend_pid = await connection.fetchval("SELECT pg_backend_pid()")
    findings.add(
        "the broker connects directly, not through a pooler",
        ok=backend_pid == connection.get_server_pid(),
        remedy="set host and port to the server's own; poolers rewrite what the fence relies on",
    )
    missing = [row["f"] for row in await connection.fetch(_MISSING_FUNCTIONS, list(_FUNCTIONS))]
    findings.add(
        "the broker may execute the installed functions",
        ok=not missing,
        remedy=f"run {findings._install} in the fence database; missing: {', '.join(missing)}",  # noqa: SLF001
    )
    if missing:
        return
    installed = await connection.fetchval("SELECT nhi.version()")
    findings.add(
        f"the installed functions are version {sql.INSTALL_VERSION}",
        ok=installed == sql.INSTALL_VERSION,
        remedy=f"run {findings._install} again: version {installed} is installed",  # noqa: SLF001
    )
    groups = sorted({recipe.group for recipe in recipes})
    databases = sorted({recipe.database for recipe in recipes})
    for row in await connection.fetch(sql.REPORT, findings._config.instance, groups, databases):  # noqa: SLF001
        findings.reported(row["item"], row["subject"], ok=row["ok"])
