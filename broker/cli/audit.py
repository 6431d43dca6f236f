"""``nhi audit``: export the log, fetch its public keys, and verify it with nothing else."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path  # noqa: TC003  Typer reads annotations at run time
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from broker.cli import tables
from broker.cli.operator_client import OperatorClient
from broker.cli.options import Json, Socket  # noqa: TC001  Typer reads annotations at run time
from broker.cli.progress import counting
from nhi_sdk.cli.output import ExitCode, fail, print_fields, print_json, say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from inventory.audit.heads import HeadCopy
    from inventory.audit.public_keys import PublicKeys
    from inventory.audit.report import VerificationReport

_END = b'"type":"end"}\n'
_TAIL_BYTES = 256


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(no_args_is_help=True, help="Export and verify the audit log.")
    group.command("export")(export)
    group.command("keys")(keys)
    group.command("verify")(verify)
    app.add_typer(group, name="audit")


# --- export --------------------------------------------------------------------------------------


def export(
    *,
    lease: Annotated[str | None, typer.Option("--lease", help="Only this lease.")] = None,
    task: Annotated[str | None, typer.Option("--task", help="Only this task.")] = None,
    identity: Annotated[str | None, typer.Option("--identity", help="Only this identity.")] = None,
    since: Annotated[
        str | None, typer.Option("--from", help="At or after this time (RFC 3339; UTC unless it says).")
    ] = None,
    until: Annotated[str | None, typer.Option("--to", help="Before this time.")] = None,
    texts: Annotated[bool, typer.Option("--texts", help="Show free texts in clear, too.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write here instead of to standard output.")
    ] = None,
    socket: Socket = None,
) -> None:
    """Export the audit log, or a part of it, as JSON lines. The export is itself audited."""
    query = {
        "lease": lease,
        "task": task,
        "identity": identity,
        "from": _moment(since, "--from"),
        "to": _moment(until, "--to"),
        "texts": "true" if texts else None,
    }
    with OperatorClient.at(socket) as broker, _destination(output) as sink:
        with broker.stream("/audit/export", query) as chunks, counting("exporting, bytes") as tell:
            tail = _copy(chunks, sink, tell)
        if not tail.endswith(_END):
            fail("the export was cut off before its end: what was written is not whole", ExitCode.TRY_LATER)


def _copy(chunks: Iterator[bytes], sink: BinaryIO, tell: Callable[[int], None]) -> bytes:
    done, tail = 0, b""
    for chunk in chunks:
        sink.write(chunk)
        done += len(chunk)
        tail = (tail + chunk)[-_TAIL_BYTES:]
        tell(done)
    sink.flush()
    return tail


@contextmanager
def _destination(output: Path | None) -> Iterator[BinaryIO]:
    """Give where to write; a file appears under its name only once it is whole."""
    if output is None:
        yield sys.stdout.buffer
        return
    fresh = output.with_name(output.name + ".part")
    try:
        with fresh.open("wb") as sink:
            fresh.chmod(0o600)
            yield sink
        fresh.replace(output)
    except OSError as error:
        fail(f"cannot write {output}: {error.strerror}", ExitCode.FAILED)
    finally:
        fresh.unlink(missing_ok=True)


def _moment(text: str | None, option: str) -> str | None:
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        fail(f"{option}: {text!r} is not a time such as 2026-11-20 or 2026-11-20T12:00:00Z", ExitCode.USAGE)
    moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


# --- keys ----------------------------------------------------------------------------------------


def keys(
    *,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write here instead of to standard output.")
    ] = None,
    socket: Socket = None,
) -> None:
    """Fetch the public keys file that nhi audit verify needs. Keep it apart from the log."""
    with OperatorClient.at(socket) as broker, _destination(output) as sink:
        document = json.dumps(broker.get("/audit/keys"), sort_keys=True, separators=(",", ":"))
        sink.write(document.encode("ascii") + b"\n")


# --- verify --------------------------------------------------------------------------------------


def verify(
    *,
    ledger: Annotated[
        Path | None, typer.Option("--ledger", help="The ledger's database file; the broker may be running.")
    ] = None,
    exported: Annotated[Path | None, typer.Option("--export", help="An export, whole or filtered.")] = None,
    keys_file: Annotated[
        Path | None, typer.Option("--keys", help="The public keys file, from nhi audit keys.")
    ] = None,
    heads: Annotated[
        Path | None,
        typer.Option("--heads", help="Where the signed heads were copied to (audit.copy_directory)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Verify the audit log offline, with public keys only.

    Exits 0 when nothing is wrong, 1 with each finding by name, 2 when it cannot be read. Mind the limits
    printed: without the copied heads a cut tail goes unseen.
    """
    if (ledger is None) == (exported is None):
        fail("give exactly one of --ledger and --export", ExitCode.USAGE)
    if ledger is not None and keys_file is None:
        fail("--ledger needs --keys: a ledger does not vouch for itself", ExitCode.USAGE)
    report = _verified(ledger, exported, keys_file, heads)
    if as_json:
        print_json(_as_json(report))
    else:
        _show(report)
    if not report.intact:
        raise typer.Exit(ExitCode.FAILED)


def _verified(
    ledger: Path | None, exported: Path | None, keys_file: Path | None, heads: Path | None
) -> VerificationReport:
    from inventory.audit.entries import AuditSourceError  # noqa: PLC0415  heavy: see the package
    from inventory.audit.heads import HeadCopyError  # noqa: PLC0415  same
    from inventory.audit.public_keys import PublicKeysError  # noqa: PLC0415  same
    from inventory.audit.verify import verify_database, verify_export  # noqa: PLC0415  same

    try:
        public, copy = _public_keys(keys_file), _head_copy(heads)
        lines = None if copy is None else copy.read_all()
        with counting("verifying, records") as tell:
            if exported is not None:
                return verify_export(exported, public, lines, progress=tell)
            assert ledger is not None  # noqa: S101  exactly one was given
            assert public is not None  # noqa: S101  needed with a ledger
            return verify_database(ledger, public, lines, progress=tell)
    except (AuditSourceError, HeadCopyError, PublicKeysError) as error:
        fail(str(error), ExitCode.USAGE)


def _public_keys(path: Path | None) -> PublicKeys | None:
    from inventory.audit.public_keys import read_public_keys  # noqa: PLC0415  heavy: see the package

    return None if path is None else read_public_keys(path)


def _head_copy(directory: Path | None) -> HeadCopy | None:
    if directory is None:
        return None
    from inventory.audit.heads import HeadCopy  # noqa: PLC0415  heavy: see the package

    if not directory.is_dir():
        fail(f"--heads: {directory} is not a directory", ExitCode.USAGE)
    return HeadCopy(directory)


def _as_json(report: VerificationReport) -> dict[str, Any]:
    return {
        "intact": report.intact,
        "complete": report.complete,
        "records": report.records,
        "records_anchored": report.records_anchored,
        "heads_checked": report.heads_checked,
        "texts_checked": report.texts_checked,
        "texts_erased": report.texts_erased,
        "slots": list(report.slots),
        "findings": [
            {"kind": str(one.kind), "slot": one.slot, "seq": one.seq, "detail": one.detail}
            for one in report.findings
        ],
        "findings_omitted": report.findings_omitted,
        "limits": list(report.limits),
    }


def _show(report: VerificationReport) -> None:
    print_fields(
        {
            "verdict": "intact" if report.intact else "NOT INTACT",
            "records": report.records,
            "tied to a signed head": report.records_anchored,
            "signed heads checked": report.heads_checked,
            "free texts checked": report.texts_checked,
            "free texts erased": report.texts_erased,
        }
    )
    if report.findings:
        columns = ("FINDING", "SLOT", "RECORD", "DETAIL")
        tables.show(columns, [(str(one.kind), one.slot, one.seq, one.detail) for one in report.findings])
    if report.findings_omitted:
        say(f"and {report.findings_omitted} more")
    for limit in report.limits:
        say(f"could not be seen: {limit}")
