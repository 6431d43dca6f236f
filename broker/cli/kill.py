"""``nhi kill``: stop a task, an identity, everything of an owner, or a resource, at once."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from broker.cli.operator_client import OperatorClient
from broker.cli.options import Json, Reason, Socket, Yes  # noqa: TC001  Typer reads annotations at run time
from nhi_sdk.cli.output import ExitCode, fail, print_fields, print_json, printable, say

_WHAT = {
    "task": "This ends the task and every credential issued under it.",
    "identity": "Nothing more is issued to it, and every credential it holds is revoked.",
    "owner": "Nothing more is issued to any identity of theirs, and every credential those hold is revoked.",
    "resource": "Nothing more is issued for it to anybody, and every credential for it is revoked.",
}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("kill")(kill)


def kill(
    *,
    task: Annotated[str | None, typer.Option("--task", help="tsk_…")] = None,
    identity: Annotated[str | None, typer.Option("--identity", help="spiffe://…")] = None,
    owner: Annotated[str | None, typer.Option("--owner", help="An owner in the inventory.")] = None,
    resource: Annotated[str | None, typer.Option("--resource", help="A resource in the catalog.")] = None,
    reason: Reason,
    lift: Annotated[bool, typer.Option("--lift", help="Lift a kill; what it ended stays ended.")] = False,
    yes: Yes = False,
    socket: Socket = None,
    as_json: Json = False,
) -> None:
    """Kill one scope: one commit stops issue and introspection at once, the credentials are then revoked.

    A killed identity, owner or resource stays killed until it is lifted.
    """
    given = {"task": task, "identity": identity, "owner": owner, "resource": resource}
    chosen = [(scope, value) for scope, value in given.items() if value]
    if len(chosen) != 1:
        fail("name exactly one of --task, --identity, --owner, --resource", ExitCode.USAGE)
    scope, value = chosen[0]
    if lift and scope == "task":
        fail("a task that was killed has ended and stays ended: open another", ExitCode.USAGE)
    with OperatorClient.at(socket) as broker:
        if not lift:
            confirm(f"Kill {scope} {value}? {_WHAT[scope]}", assumed=yes)
        answer = broker.post("/kill/lift" if lift else "/kill", {scope: value, "reason": reason})
    if as_json:
        print_json(answer)
        return
    print_fields(answer)
    if not lift:
        say("killed; what is not proven dead yet: nhi leases list --live")
    if not lift and scope != "task":
        say(f"it stays killed until somebody lifts it: nhi kill --{scope} {value} --lift --reason TEXT")


def confirm(question: str, *, assumed: bool) -> None:
    """Ask on the terminal; leaves the process where the answer is no, or nobody is there to answer."""
    if assumed:
        return
    if not sys.stdin.isatty():
        fail("nobody is there to confirm this: repeat it with --yes", ExitCode.USAGE)
    if not typer.confirm(printable(question), err=True):
        fail("nothing was done", ExitCode.FAILED)
