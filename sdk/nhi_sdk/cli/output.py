"""What `nhi` prints: tables for people, JSON for programs, errors on stderr."""

from __future__ import annotations

import dataclasses
import json
import sys
import unicodedata
from datetime import datetime
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nhi_sdk import errors
from nhi_sdk.models import AccessToken, OtherSecret, PostgresLogin

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class ExitCode(IntEnum):
    """What `nhi`'s client commands exit with."""

    OK = 0
    FAILED = 1
    USAGE = 2
    DENIED = 3
    UNAUTHENTICATED = 4
    NOT_FOUND = 5
    CONFLICT = 6
    TRY_LATER = 7
    NOT_PROVEN = 8
    EXEC_FAILED = 125
    EXEC_NOT_EXECUTABLE = 126
    EXEC_NOT_FOUND = 127


_CODE_OF: Final[Sequence[tuple[type[errors.NhiError], ExitCode]]] = (
    (errors.ConfigurationError, ExitCode.USAGE),
    (errors.InvalidRequest, ExitCode.USAGE),
    (errors.Denied, ExitCode.DENIED),
    (errors.Unauthenticated, ExitCode.UNAUTHENTICATED),
    (errors.SvidError, ExitCode.UNAUTHENTICATED),
    (errors.NotFound, ExitCode.NOT_FOUND),
    (errors.Conflict, ExitCode.CONFLICT),
    (errors.RateLimited, ExitCode.TRY_LATER),
    (errors.Unavailable, ExitCode.TRY_LATER),
    (errors.TransportError, ExitCode.TRY_LATER),
)

# Control, format (bidirectional overrides among them), surrogate, private and unassigned
# characters, line and paragraph separators: what moves a cursor or reorders what is read.
_UNPRINTABLE: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_BYTE: Final = 0x100
_PLANE: Final = 0x10000


def printable(text: str) -> str:
    """Return `text` with every character that could act on a terminal written as an escape."""
    return "".join(_escaped(one) if unicodedata.category(one) in _UNPRINTABLE else one for one in text)


def _escaped(character: str) -> str:
    number = ord(character)
    if number < _BYTE:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < _PLANE else f"\\U{number:08x}"


def exit_code_of(error: errors.NhiError) -> ExitCode:
    """Return the exit code an error of the SDK comes to."""
    for kind, code in _CODE_OF:
        if isinstance(error, kind):
            return code
    return ExitCode.FAILED


def say(text: str) -> None:
    """Print one line for people on stderr."""
    sys.stderr.write(f"nhi: {printable(text)}\n")
    sys.stderr.flush()


def explain(error: errors.NhiError) -> None:
    """Print an error on stderr with what helps to follow it up."""
    say(str(error))
    if not isinstance(error, errors.ProblemError):
        return
    problem = error.problem
    for one in problem.errors:
        say(f"  {one.field}: {one.message}")
    details = {
        "policies": ", ".join(problem.policy_ids),
        "decision": problem.decision_id,
        "task": problem.task_id,
        "lease": problem.lease_id,
        "trace": problem.trace_id,
        "try again in": None if problem.retry_after_seconds is None else f"{problem.retry_after_seconds:g} s",
    }
    for name, value in details.items():
        if value:
            say(f"  {name}: {value}")


def fail(message: str, code: ExitCode) -> NoReturn:
    """Print a line on stderr and leave with a code."""
    say(message)
    raise typer.Exit(code)


def print_json(value: object) -> None:
    """Print JSON in ASCII, which no terminal acts on."""
    sys.stdout.write(json.dumps(plain(value), indent=2) + "\n")


def plain(value: object) -> Any:  # noqa: ANN401  whatever JSON holds
    """Return an answer as JSON values, secrets in clear; private fields are left out."""
    if isinstance(value, OtherSecret):
        return {"kind": value.kind, **value.fields}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = {PostgresLogin: "postgresql_login", AccessToken: "access_token"}.get(type(value))
        fields = {
            one.name: plain(getattr(value, one.name))
            for one in dataclasses.fields(value)
            if not one.name.startswith("_")
        }
        return fields if kind is None else {"kind": kind, **fields}
    if isinstance(value, datetime):
        return moment(value)
    if isinstance(value, dict):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, tuple | list):
        return [plain(one) for one in value]
    return value


def moment(value: datetime) -> str:
    """Return a time as the broker writes it."""
    return value.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def cell(value: object) -> str:
    """Return a value as a person reads it, harmless to a terminal."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, datetime):
        return moment(value)
    if isinstance(value, dict):
        return printable(", ".join(f"{name}={one}" for name, one in value.items())) or "-"
    if isinstance(value, tuple | list):
        return printable(", ".join(str(one) for one in value)) or "-"
    return printable(str(value)) or "-"


def print_fields(fields: Mapping[str, object]) -> None:
    """Print one thing, a line for each of its fields."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in fields.items():
        table.add_row(Text(printable(name)), Text(cell(value)))
    _console().print(table)


_PIPED_WIDTH: Final = 1000
"""Where no terminal bounds it, a row is one line: what follows in the pipe reads lines."""


def print_rows(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print many things of a kind; the first column is never broken, a row in a pipe is one line."""
    console = _console()
    if not console.is_terminal:
        console.width = _PIPED_WIDTH
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, name in enumerate(columns):
        table.add_column(Text(name), overflow="fold", no_wrap=number == 0)
    for row in rows:
        table.add_row(*(Text(cell(value)) for value in row))
    with console.capture() as drawn:
        console.print(table)
    # A table is filled up with blanks to its width, which nobody wants in a pipe.
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in drawn.get().splitlines()))


def _console() -> Console:
    return Console(markup=False, highlight=False, emoji=False)
