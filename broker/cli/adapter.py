"""``nhi adapter``: prepare a backend for the broker, and prove that it works."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from broker.cli import tables
from broker.cli.operator_client import OperatorClient
from broker.cli.options import (  # noqa: TC001  Typer reads annotations at run time
    Config,
    Json,
    MaybeConfig,
    Socket,
)
from broker.cli.serve import load_settings
from broker.cli.sockets import why_unreachable
from nhi_sdk.cli.output import ExitCode, fail, print_fields, print_json, say

if TYPE_CHECKING:
    from pathlib import Path

    from broker.settings import Settings


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(no_args_is_help=True, help="Prepare backends and prove them.")
    postgres = typer.Typer(no_args_is_help=True, help="PostgreSQL backends.")
    postgres.command("install")(install)
    group.add_typer(postgres, name="postgres")
    group.command("prove")(prove)
    app.add_typer(group, name="adapter")


# --- postgres install ----------------------------------------------------------------------------


def install(
    name: Annotated[str, typer.Argument(metavar="BACKEND", help="Its name in the settings.")],
    *,
    config: Config,
    set_password: Annotated[
        bool,
        typer.Option("--set-password", help="Also set the login's configured password, as a verifier."),
    ] = False,
) -> None:
    """Print the SQL that an administrator runs once with psql; nothing is connected to.

    Run it again after an upgrade, or when the catalog names other groups or databases.
    """
    from pydantic import ValidationError  # noqa: PLC0415  same

    from adapters.postgres import install_sql  # noqa: PLC0415  heavy: see the package
    from adapters.postgres_config import PostgresConfig, RecipeError, faults  # noqa: PLC0415  same
    from broker.policy.catalog import Catalog  # noqa: PLC0415  same
    from broker.policy.errors import PolicyError  # noqa: PLC0415  same

    settings = load_settings(config)
    backend = _backend(settings, name)
    try:
        recipes = Catalog.load(settings.policy.directory / "catalog.yaml").recipes_by_adapter().get(name, ())
        chosen = PostgresConfig(**backend, instance=_instance(settings.ledger.path))
        script = install_sql(chosen, recipes, set_password=set_password)
    except PolicyError as error:
        fail("; ".join(error.problems), ExitCode.FAILED)
    except ValidationError as error:
        fail(f"backend {name}: {'; '.join(faults(error))}", ExitCode.FAILED)
    except (RecipeError, OSError) as error:
        fail(f"backend {name}: {error}", ExitCode.FAILED)
    if not recipes:
        say(f"no action in the catalog names {name} yet: run this again when one does")
    sys.stdout.write(script)


def _backend(settings: Settings, name: str) -> dict[str, Any]:
    postgres = {
        str(one.get("name")): {key: value for key, value in one.items() if key != "kind"}
        for one in settings.backends
        if one.get("kind") == "postgres"
    }
    if name not in postgres:
        known = ", ".join(sorted(postgres)) or "none"
        fail(f"the settings have no PostgreSQL backend named {name}; they have: {known}", ExitCode.NOT_FOUND)
    return postgres[name]


def _instance(ledger: Path) -> Any:  # noqa: ANN401  an InstanceTag, whose import is heavy
    """Return the deployment's tag, which is in the ledger; makes the ledger where there is none yet."""
    from inventory.fsck import NotALedgerError, instance_of  # noqa: PLC0415  heavy: see the package
    from inventory.store import engine  # noqa: PLC0415  same

    if ledger.exists():
        try:
            return instance_of(ledger)
        except NotALedgerError as error:
            fail(str(error), ExitCode.FAILED)
    say(f"there is no ledger yet: made {ledger} as user {os.geteuid()}, which must be the broker's user")
    return engine.prepare(ledger)


# --- prove ---------------------------------------------------------------------------------------


def prove(
    resource: Annotated[str, typer.Argument(metavar="RESOURCE", help="As in the catalog.")],
    *,
    action: Annotated[str | None, typer.Option("--action", help="The resource's first unless given.")] = None,
    config: MaybeConfig = None,
    socket: Socket = None,
    as_json: Json = False,
) -> None:
    """Mint one credential on the resource's own backend, use it, kill it, use it again, kill it again.

    Asks the running broker; where none runs, opens its ledger itself (--config). Either way the lease is in
    the ledger before anything is minted. Exits 0 only if everything held.
    """
    document = _prove(resource, action, config, socket)
    if as_json:
        print_json(document)
    else:
        _show(document)
    if not document.get("proven"):
        raise typer.Exit(ExitCode.FAILED)


def _prove(resource: str, action: str | None, config: Path | None, socket: Path | None) -> dict[str, Any]:
    settings = None if config is None else load_settings(config)
    if settings is not None and socket is None:
        socket = settings.operator.socket
    if settings is None or (socket is not None and why_unreachable(socket) is None):
        with OperatorClient.at(socket) as broker:
            asked = {"resource": resource} if action is None else {"resource": resource, "action": action}
            return broker.post("/adapters/prove", asked)
    say("no broker is running: working on its ledger directly")
    return _prove_offline(settings, resource, action)


def _prove_offline(settings: Settings, resource: str, action: str | None) -> dict[str, Any]:
    from broker.cli.interruptible import run_until_signalled  # noqa: PLC0415  heavy: see the package
    from broker.cli.offline import prove_offline  # noqa: PLC0415  same
    from broker.cli.start_errors import problems_of  # noqa: PLC0415  same

    try:
        return run_until_signalled(prove_offline(settings, resource, action))
    except Exception as error:
        problems = problems_of(error)
        if problems is None:
            raise
        fail("; ".join(problems), ExitCode.FAILED)


def _show(document: dict[str, Any]) -> None:
    missing = [one for one in document["checks"] if not one["ok"]]
    for one in missing:
        say(f"missing: {one['name']}: {one['remedy']}")
    steps = document["steps"]
    if steps:
        rows = [
            (one["name"], "yes" if one["ok"] else "NO", f"{one['milliseconds']} ms", _seen(one["detail"]))
            for one in steps
        ]
        tables.show(("STEP", "HELD", "TOOK", "SEEN"), rows)
    dead = next((one["milliseconds"] for one in steps if "evidence" in one["detail"]), None)
    print_fields(
        {
            "verdict": "proven" if document.get("proven") else "NOT PROVEN",
            "backend": document["backend"],
            "rights checked": len(document["checks"]),
            "rights missing": len(missing),
            "lease": document["lease_id"] or "none: nothing was minted",
            "time to dead": None if dead is None else f"{dead} ms",
        }
    )


def _seen(detail: dict[str, Any]) -> dict[str, Any]:
    """Return what a step saw, its evidence among it."""
    return {**{name: one for name, one in detail.items() if name != "evidence"}, **detail.get("evidence", {})}
