"""The root of `nhi`: client commands, and whatever other distributions register."""

from __future__ import annotations

import sys
from importlib import metadata
from typing import Annotated, Final

import typer

from nhi_sdk._version import VERSION
from nhi_sdk.cli import commands, execute, tasks
from nhi_sdk.cli.output import exit_code_of, explain, say
from nhi_sdk.errors import NhiError

ENTRY_POINTS: Final = "nhi.commands"


def _version(asked: bool) -> None:  # noqa: FBT001  Typer's signature
    if asked:
        sys.stdout.write(f"nhi {VERSION}\n")
        raise typer.Exit


def _root(
    *,
    _show: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """A credential for one task, and proof that it is dead afterwards."""


def build_app() -> typer.Typer:
    """Return the whole command: the SDK's client commands and those of each entry point.

    An entry point of the group ``nhi.commands`` names a function ``register(app: typer.Typer)``.
    """
    app = typer.Typer(
        name="nhi",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,  # free text must not become markup
        pretty_exceptions_enable=False,  # they can show local variables, secrets among them
        callback=_root,
    )
    commands.register(app)
    tasks.register(app)
    execute.register(app)
    for entry in sorted(metadata.entry_points(group=ENTRY_POINTS), key=lambda one: one.name):
        _register(app, entry)
    return app


def _register(app: typer.Typer, entry: metadata.EntryPoint) -> None:
    try:
        entry.load()(app)
    except Exception as error:  # noqa: BLE001  a broken extension must not take the client commands with it
        say(f"the commands of {entry.value} are not available: {type(error).__name__}: {error}")


def run() -> None:
    """Run the command line and leave the process."""
    try:
        build_app()()
    except NhiError as error:
        explain(error)
        raise SystemExit(exit_code_of(error)) from None
