"""``nhi inventory``: who was seen, who answers for them, who may still ask."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from broker.cli import tables
from broker.cli.kill import confirm
from broker.cli.operator_client import OperatorClient
from broker.cli.options import Json, Limit, Reason, Socket, Yes  # noqa: TC001  Typer reads annotations at run time
from nhi_sdk.cli.output import print_fields, print_json, say

IdentityId = Annotated[str, typer.Argument(metavar="SPIFFE_ID", help="spiffe://…")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(
        no_args_is_help=True, help="List identities, give them owners, suspend and resume them."
    )
    group.command("list")(list_)
    group.command("show")(show)
    group.command("set-owner")(set_owner)
    group.command("suspend")(suspend)
    group.command("resume")(resume)
    app.add_typer(group, name="inventory")


def list_(
    query: Annotated[
        str | None, typer.Argument(metavar="[PREFIX]", help="Of the SPIFFE ID, the owner or the team.")
    ] = None,
    *,
    orphans: Annotated[bool, typer.Option("--orphans", help="Only identities without an owner.")] = False,
    limit: Limit = 1000,
    socket: Socket = None,
    as_json: Json = False,
) -> None:
    """List identities."""
    with OperatorClient.at(socket) as broker:
        found, more = broker.items("/identities", {"q": query}, limit=limit)
    if orphans:
        found = [one for one in found if one.get("orphan")]
    if as_json:
        print_json({"items": found, "more": more})
        return
    columns = ("IDENTITY", "KIND", "OWNER", "TEAM", "ENVIRONMENT", "LIFECYCLE", "LAST USED")
    tables.show(columns, [_row(one) for one in found])
    if more:
        say(f"the first {limit} are looked at; --limit takes more")


def _row(one: dict[str, Any]) -> tuple[object, ...]:
    return (
        one.get("spiffe_id"),
        one.get("kind"),
        "nobody (orphan)" if one.get("orphan") else one.get("owner"),
        one.get("team"),
        one.get("environment"),
        one.get("lifecycle"),
        tables.when(one.get("last_used_at")),
    )


def show(identity: IdentityId, *, socket: Socket = None, as_json: Json = False) -> None:
    """Show one identity and the leases it holds now."""
    with OperatorClient.at(socket) as broker:
        document = broker.get("/identity", {"spiffe_id": identity})
    if as_json:
        print_json(document)
        return
    leases = document.pop("leases", None) or []
    print_fields(document)
    if leases:
        columns = ("LEASE", "FOR", "STATE", "EXPIRES")
        rows = [
            (
                one.get("lease_id"),
                f"{one.get('resource')}:{one.get('action')}",
                one.get("state"),
                tables.when(one.get("expires_at")),
            )
            for one in leases
        ]
        tables.show(columns, rows)


def set_owner(
    identity: IdentityId,
    owner: Annotated[str, typer.Argument(metavar="OWNER", help="The accountable person or team.")],
    *,
    team: Annotated[str | None, typer.Option("--team", help="Leaves it as it is unless given.")] = None,
    environment: Annotated[
        str | None, typer.Option("--environment", help="Leaves it as it is unless given.")
    ] = None,
    socket: Socket = None,
    as_json: Json = False,
) -> None:
    """Make somebody accountable for an identity."""
    body = {"spiffe_id": identity, "owner": owner, "team": team, "environment": environment}
    with OperatorClient.at(socket) as broker:
        given = {name: value for name, value in body.items() if value is not None}
        _print(broker.post("/identity/owner", given), as_json=as_json)


def suspend(
    identity: IdentityId, *, reason: Reason, yes: Yes = False, socket: Socket = None, as_json: Json = False
) -> None:
    """Suspend an identity: it gets nothing more, and loses what it has."""
    with OperatorClient.at(socket) as broker:
        confirm(f"Suspend {identity}? Every credential it holds is revoked.", assumed=yes)
        body = {"spiffe_id": identity, "reason": reason}
        _print(broker.post("/identity/suspend", body), as_json=as_json)


def resume(identity: IdentityId, *, reason: Reason, socket: Socket = None, as_json: Json = False) -> None:
    """Let a suspended identity ask again; what it lost stays lost."""
    with OperatorClient.at(socket) as broker:
        _print(broker.post("/identity/resume", {"spiffe_id": identity, "reason": reason}), as_json=as_json)


def _print(document: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(document)
    else:
        print_fields({name: value for name, value in document.items() if name != "leases"})
