"""``nhi leases``: what is alive, what is stuck, and what to do about it."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import quote

import typer

from broker.cli import tables
from broker.cli.kill import confirm
from broker.cli.operator_client import OperatorClient
from broker.cli.options import Json, Limit, Reason, Socket, Yes  # noqa: TC001  Typer reads annotations at run time
from nhi_sdk.cli.output import print_fields, print_json, say

_LIVE = ("intent", "prepared", "active", "revoke_pending", "verifying")

LeaseId = Annotated[str, typer.Argument(metavar="LEASE", help="lse_…")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(no_args_is_help=True, help="List, show, retry and abandon leases.")
    group.command("list")(list_)
    group.command("show")(show)
    group.command("retry")(retry)
    group.command("abandon")(abandon)
    app.add_typer(group, name="leases")


def list_(
    *,
    stuck: Annotated[
        bool, typer.Option("--stuck", help="Only those whose revocation keeps failing.")
    ] = False,
    live: Annotated[bool, typer.Option("--live", help="Only those that have not reached their end.")] = False,
    state: Annotated[str | None, typer.Option("--state", help="Only this state, e.g. active.")] = None,
    limit: Limit = 1000,
    socket: Socket = None,
    as_json: Json = False,
) -> None:
    """List leases with their cause, and when the broker tries next to end them."""
    found: list[dict[str, Any]] = []
    more = False
    states: tuple[str | None, ...] = _LIVE if live and state is None else (state,)
    with OperatorClient.at(socket) as broker:
        for each in states:
            query = {"stuck": "true" if stuck else None, "state": each}
            some, cut = broker.items("/leases", query, limit=limit)
            found += some
            more = more or cut
    if as_json:
        print_json({"items": found, "more": more})
        return
    columns = ("LEASE", "FOR", "IDENTITY", "STATE", "CAUSE", "EXPIRES", "NEXT TRY", "LAST ERROR")
    tables.show(columns, [_row(one) for one in found])
    if more:
        say(f"the first {limit} are shown; --limit takes more")


def _row(one: dict[str, Any]) -> tuple[object, ...]:
    state = one.get("state")
    return (
        one.get("lease_id"),
        f"{one.get('resource')}:{one.get('action')}",
        one.get("identity"),
        f"{state} (stuck)" if one.get("stuck") else state,
        one.get("cause"),
        tables.when(one.get("expires_at")),
        tables.when(one.get("next_try_at")),
        one.get("last_error"),
    )


def show(lease: LeaseId, *, socket: Socket = None, as_json: Json = False) -> None:
    """Show everything the ledger holds about one lease; never its secret."""
    with OperatorClient.at(socket) as broker:
        _print(broker.get(f"/leases/{_in_path(lease)}"), as_json=as_json)


def retry(lease: LeaseId, *, socket: Socket = None, as_json: Json = False) -> None:
    """Try to revoke a lease now instead of at its next time."""
    with OperatorClient.at(socket) as broker:
        _print(broker.post(f"/leases/{_in_path(lease)}/retry"), as_json=as_json)


def abandon(
    lease: LeaseId, *, reason: Reason, yes: Yes = False, socket: Socket = None, as_json: Json = False
) -> None:
    """Stop trying to end a stuck lease. Its credential may still work; the reason is kept for ever."""
    with OperatorClient.at(socket) as broker:
        confirm(
            f"Give {lease} up? Its credential may still work, and nobody will try to end it.", assumed=yes
        )
        _print(broker.post(f"/leases/{_in_path(lease)}/abandon", {"reason": reason}), as_json=as_json)


def _print(document: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(document)
    else:
        print_fields(document)


def _in_path(text: str) -> str:
    return quote(text, safe="")
