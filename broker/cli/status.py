"""``nhi status``, ``nhi findings`` and ``nhi scan``: how the broker is, and what it found wrong."""

from __future__ import annotations

import typer

from broker.cli import tables
from broker.cli.operator_client import OperatorClient
from broker.cli.options import Json, Limit, Socket  # noqa: TC001  Typer reads annotations at run time
from nhi_sdk.cli.output import ExitCode, print_fields, print_json, say


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("status")(status)
    app.command("findings")(findings)
    app.command("scan")(scan)


def status(*, socket: Socket = None, as_json: Json = False) -> None:
    """Show the broker at a glance. Exits 1 while something keeps it from being ready."""
    with OperatorClient.at(socket) as broker:
        document = broker.get("/status")
        killed, _ = broker.items("/kills", limit=1000)
    readiness = document.get("readiness") or {}
    ready = bool(readiness.get("ready"))
    if as_json:
        print_json({**document, "kills": killed})
    else:
        ledger = document.get("ledger") or {}
        fields = {
            "ready": ready,
            "version": document.get("version"),
            "instance": document.get("instance"),
            "policy": document.get("policy_hash"),
            "live leases": document.get("live"),
            "stuck leases": document.get("stuck"),
            "audit records": ledger.get("audit_seq"),
            "ledger queue": ledger.get("waiting"),
            "ledger failure": ledger.get("failure"),
        }
        print_fields(fields)
        columns = ("BACKEND", "KIND", "LIVE", "STUCK", "BREAKER")
        names = ("name", "kind", "live", "stuck", "breaker")
        backends = document.get("backends") or []
        tables.show(columns, [tuple(one.get(name) for name in names) for one in backends])
        for one in killed:
            say(
                f"killed {tables.when(one.get('at'))}: {one.get('scope')} {one.get('value')}: "
                f"{one.get('reason')}"
            )
        for name, problem in (readiness.get("problems") or {}).items():
            say(f"not ready: {name}: {problem}")
    if not ready:
        raise typer.Exit(ExitCode.FAILED)


def findings(*, limit: Limit = 1000, socket: Socket = None, as_json: Json = False) -> None:
    """List failed checks that are still open, oldest first."""
    with OperatorClient.at(socket) as broker:
        found, more = broker.items("/findings", limit=limit)
    if as_json:
        print_json({"items": found, "more": more})
        return
    rows = [
        (one.get("check"), one.get("subject"), tables.when(one.get("opened_at")), one.get("evidence"))
        for one in found
    ]
    tables.show(("CHECK", "SUBJECT", "OPENED", "EVIDENCE"), rows)
    if more:
        say(f"the first {limit} are shown; --limit takes more")


def scan(*, socket: Socket = None, as_json: Json = False) -> None:
    """Look for orphans now: objects of ours without a live lease, and leases whose object is gone."""
    with OperatorClient.at(socket) as broker:
        document = broker.post("/scan")
    failed = document.get("failed") or []
    if as_json:
        print_json(document)
    else:
        names = ("backend", "seen", "orphans", "gone")
        rows = [tuple(one.get(name) for name in names) for one in document.get("scanned") or []]
        tables.show(("BACKEND", "SEEN", "ORPHANS", "GONE"), rows)
        for name in failed:
            say(f"{name} could not be scanned; see nhi status and the broker's log")
    if failed:
        raise typer.Exit(ExitCode.FAILED)
