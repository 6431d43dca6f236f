"""``nhi fsck``: look through the ledger for contradictions, read-only."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import typer

from broker.cli import tables
from broker.cli.options import Config, Json  # noqa: TC001  Typer reads annotations at run time
from broker.cli.progress import counting
from broker.cli.serve import load_settings
from nhi_sdk.cli.output import ExitCode, fail, print_fields, print_json, say

if TYPE_CHECKING:
    from broker.settings import Settings
    from inventory.audit.report import VerificationReport
    from inventory.fsck import Contradiction

_SHOWN_MAX = 1000


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("fsck")(fsck)


def fsck(config: Config, *, as_json: Json = False) -> None:
    """Check the ledger against its own rules, its history and its audit log, without writing.

    A broker may be running. Exits 1 when the ledger contradicts itself; what is merely late because no
    broker runs is printed and does not count.
    """
    settings = load_settings(config)
    if not settings.ledger.path.exists():
        fail(f"there is no ledger at {settings.ledger.path} (ledger.path)", ExitCode.NOT_FOUND)
    wrong, late, omitted = _look_through(settings)
    report = _verify(settings)
    audit = [f"{one.kind}: slot {one.slot}, record {one.seq}: {one.detail}" for one in report.findings]
    if as_json:
        print_json(
            {
                "ok": not wrong and not audit,
                "wrong": [_as_json(one) for one in wrong],
                "late": [_as_json(one) for one in late],
                "omitted": omitted,
                "audit": {"intact": report.intact, "records": report.records, "findings": audit},
                "limits": list(report.limits),
            }
        )
    else:
        _show(wrong, late, omitted, report)
    if wrong or audit:
        raise typer.Exit(ExitCode.FAILED)


def _look_through(settings: Settings) -> tuple[list[Contradiction], list[Contradiction], int]:
    from broker.core.clock import SystemClock  # noqa: PLC0415  heavy: see the package
    from inventory.fsck import NotALedgerError, Severity, look_through  # noqa: PLC0415  same

    found: dict[Severity, list[Contradiction]] = {Severity.WRONG: [], Severity.LATE: []}
    omitted = 0
    try:
        with counting("looking through the ledger, rows") as tell:
            for one in look_through(
                settings.ledger.path,
                now_ms=SystemClock().now_ms(),
                progress=lambda _check, rows: tell(rows),
            ):
                if len(found[one.severity]) < _SHOWN_MAX:
                    found[one.severity].append(one)
                else:
                    omitted += 1
    except NotALedgerError as error:
        fail(str(error), ExitCode.FAILED)
    return found[Severity.WRONG], found[Severity.LATE], omitted


def _verify(settings: Settings) -> VerificationReport:
    from broker.core.clock import SystemClock  # noqa: PLC0415  heavy: see the package
    from broker.keys.file_store import FileKeyStore  # noqa: PLC0415  same
    from broker.keys.key_file import KeyStoreError  # noqa: PLC0415  same
    from inventory.audit.entries import AuditSourceError  # noqa: PLC0415  same
    from inventory.audit.heads import HeadCopy, HeadCopyError  # noqa: PLC0415  same
    from inventory.audit.public_keys import PublicKeys  # noqa: PLC0415  same
    from inventory.audit.verify import verify_database  # noqa: PLC0415  same
    from inventory.fsck import NotALedgerError, instance_of  # noqa: PLC0415  same

    copies = settings.audit.copy_directory
    try:
        keys = FileKeyStore(settings.keys.path, SystemClock(), create=False)
        public = PublicKeys(instance_of(settings.ledger.path), dict(keys.audit_keys()))
        heads = HeadCopy(copies).read_all() if copies.is_dir() else None
        with counting("verifying the audit log, records") as tell:
            return verify_database(settings.ledger.path, public, heads, progress=tell)
    except (KeyStoreError, AuditSourceError, HeadCopyError, NotALedgerError) as error:
        fail(f"the audit log cannot be verified: {error}", ExitCode.FAILED)


def _as_json(one: Contradiction) -> dict[str, Any]:
    return {"check": one.check, "subject": one.subject, "detail": one.detail}


def _show(
    wrong: list[Contradiction], late: list[Contradiction], omitted: int, report: VerificationReport
) -> None:
    rows = [(one.subject, "WRONG", one.check, one.detail) for one in wrong]
    rows += [(f"record {one.seq}", "WRONG", f"audit: {one.kind}", one.detail) for one in report.findings]
    rows += [(one.subject, "late", one.check, one.detail) for one in late]
    if rows:
        tables.show(("SUBJECT", "", "CHECK", "DETAIL"), rows)
    if omitted or report.findings_omitted:
        say(f"and {omitted + report.findings_omitted} more")
    for limit in report.limits:
        say(f"could not be seen: {limit}")
    print_fields(
        {
            "verdict": "consistent" if not wrong and report.intact else "NOT CONSISTENT",
            "late": len(late),
            "audit records": report.records,
        }
    )
    sys.stdout.flush()
