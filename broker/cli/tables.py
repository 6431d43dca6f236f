"""Tables of operators: ids whole, times relative, everything harmless to a terminal."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from nhi_sdk.cli.output import cell

if TYPE_CHECKING:
    from collections.abc import Sequence

_PIPED_WIDTH: Final = 1000
"""Where no terminal bounds it, a row is one line: what follows in the pipe reads lines."""

_UNITS: Final = ((86_400, "d"), (3_600, "h"), (60, "m"), (1, "s"))


def show(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows; the first column is never broken."""
    from rich.console import Console  # noqa: PLC0415  heavy: see the package
    from rich.table import Table  # noqa: PLC0415  same
    from rich.text import Text  # noqa: PLC0415  same

    console = Console(markup=False, highlight=False, emoji=False)
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


def when(moment: object, now: datetime | None = None) -> str:
    """Return a time of the broker's as a person reads it in a hurry: ``in 4m59s``, ``12s ago``."""
    if not isinstance(moment, str):
        return "-"
    try:
        at = datetime.fromisoformat(moment)
    except ValueError:
        return moment
    seconds = round((at - (now or datetime.now(UTC))).total_seconds())
    return f"in {_span(seconds)}" if seconds >= 0 else f"{_span(-seconds)} ago"


def _span(seconds: int) -> str:
    parts: list[str] = []
    for size, unit in _UNITS:
        count, seconds = divmod(seconds, size)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts[:2]) or "0s"
