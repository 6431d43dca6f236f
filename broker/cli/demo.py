"""``nhi demo``: one credential's whole life, told; or as one JSON object."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from broker.cli.options import Json  # noqa: TC001  Typer reads annotations at run time
from nhi_sdk.cli.output import ExitCode, print_json, printable, say

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("demo")(demo)


def demo(*, as_json: Json = False) -> None:
    """Issue a credential, use it, end its task, and prove it dead, with real parts on this machine.

    Exits 0 only if every step held. Leaves no process behind, also when interrupted.
    """
    from broker.cli.development import PartsFailedError, parts_explained  # noqa: PLC0415  heavy: see the package

    try:
        with parts_explained():
            outcome = _logged(as_json=as_json)
    except PartsFailedError as error:
        outcome = {"ok": False, "error": str(error)}
    if as_json:
        print_json(outcome)
    elif outcome["ok"]:
        _where_next()
    else:
        say(str(outcome["error"]))
    if not outcome["ok"]:
        raise typer.Exit(ExitCode.FAILED)


def _logged(*, as_json: bool) -> dict[str, Any]:
    """Run the story with the broker's log in a file, which is named only where it may help."""
    # First of all what takes long, so that who gives up meanwhile leaves no file behind.
    from broker.api.logs import configure_logging  # noqa: PLC0415  heavy: see the package
    from broker.dev import demo as story  # noqa: PLC0415  same

    descriptor, name = tempfile.mkstemp(prefix="nhi-demo-", suffix=".log")
    log = Path(name)
    held = False
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            configure_logging(level="INFO", log_format="text", stream=stream)
            outcome = _told(story, lambda: log.unlink(missing_ok=True), as_json=as_json)
        held = outcome["ok"]
    finally:
        if held:
            log.unlink(missing_ok=True)
        else:
            say(f"what the broker had to say is in {log}")
    return outcome


def _told(story: ModuleType, before_leaving: Callable[[], None], *, as_json: bool) -> dict[str, Any]:
    from broker.cli.interruptible import run_until_signalled  # noqa: PLC0415  heavy: see the package

    narrator = story.Narrator(None if as_json else _storyteller())
    try:
        run = run_until_signalled(story.run_demo(narrator), before_leaving=before_leaving)
    except story.DemoFailed as error:
        return {"ok": False, "error": str(error)}
    document: dict[str, Any] = run.as_json()
    return document


def _storyteller() -> Callable[[str], None]:
    from rich.console import Console  # noqa: PLC0415  heavy: see the package

    console = Console(highlight=False, soft_wrap=True, emoji=False)

    def tell(line: str) -> None:
        console.print("\n".join(printable(part) for part in line.split("\n")))

    return tell


def _where_next() -> None:
    sys.stdout.write(
        "\nNothing of it is left running. Where to look next:\n"
        "  nhi dev        the same, kept running, with the variables for an agent of your own\n"
        "  docs/          how a request flows, how a lease lives, how to write policy\n"
    )
