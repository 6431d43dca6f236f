"""``nhi doctor``: what a newcomer got wrong, and how to mend it."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import TYPE_CHECKING

import typer

from broker.cli.options import (  # noqa: TC001  Typer reads annotations at run time
    Json,
    MaybeConfig,
    Socket,
)
from nhi_sdk.cli.output import ExitCode, print_json, printable

if TYPE_CHECKING:
    from pathlib import Path

    from broker.cli.diagnosis import Diagnosis


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("doctor")(doctor)


def doctor(*, config: MaybeConfig = None, socket: Socket = None, as_json: Json = False) -> None:
    """Try every step an agent takes, and say what is wrong with the first that fails and how to mend it.

    With --socket it looks at the operator's way in, too; with --config at the settings file. Exits 1 when
    something is to mend.
    """
    from broker.cli import diagnosis, diagnosis_agent  # noqa: PLC0415  heavy: see the package

    found = diagnosis.Diagnosis()
    diagnosis_agent.examine(found, dict(os.environ))
    if socket is not None:
        _examine_socket(found, socket)
    if config is not None:
        _examine_config(found, config)
    if as_json:
        print_json(found.as_json())
    else:
        _show(found)
    if found.to_mend:
        raise typer.Exit(ExitCode.FAILED)


def _examine_socket(found: Diagnosis, socket: Path) -> None:
    from broker.cli.operator_client import OperatorClient  # noqa: PLC0415  heavy: see the package
    from broker.cli.sockets import why_unreachable  # noqa: PLC0415  same
    from nhi_sdk.errors import NhiError  # noqa: PLC0415  same

    name = "operator socket"
    why = why_unreachable(socket)
    if why is not None:
        mend = (
            "Is the broker running? The path is its settings' operator.socket; it is for root and its user."
        )
        found.wrong(name, why, mend)
        return
    try:
        with OperatorClient(socket) as broker:
            status = broker.get("/status")
    except NhiError as error:
        found.wrong(name, str(error), "Run it as root or as the broker's own user.")
        return
    problems = (status.get("readiness") or {}).get("problems") or {}
    found.right(name, f"{socket} answers, version {status.get('version')}")
    for part, problem in problems.items():
        found.wrong(f"broker: {part}", str(problem), "See the broker's log.")
    if status.get("stuck"):
        mend = "See nhi leases list --stuck, mend the backend, then nhi leases retry."
        found.wrong("stuck leases", f"{status['stuck']} cannot be revoked", mend)


def _examine_config(found: Diagnosis, config: Path) -> None:
    from broker.cli import settings_check  # noqa: PLC0415  heavy: see the package

    report = asyncio.run(settings_check.check(config))
    for problem in report.problems:
        found.wrong("settings", problem, "")
    if not report.problems:
        found.right("settings", f"{config}: nhi serve would start")


def _show(found: Diagnosis) -> None:
    marks = {"right": "ok   ", "wrong": "WRONG", "unknown": "?    "}
    for one in found.findings:
        sys.stdout.write(f"{marks[one.verdict]} {printable(one.name)}: {printable(one.seen)}\n")
        if one.mend:
            sys.stdout.write(f"      mend: {printable(one.mend)}\n")
    if not found.to_mend:
        sys.stdout.write("everything that was looked at is right\n")
