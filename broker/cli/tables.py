"""Tables of operators: ids whole, times relative, everything harmless to a terminal."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

from nhi_sdk.cli.output import print_rows as show

__all__ = ["show", "when"]

_UNITS: Final = ((86_400, "d"), (3_600, "h"), (60, "m"), (1, "s"))


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
