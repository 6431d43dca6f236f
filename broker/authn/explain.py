"""Foreign text made safe to put into an explanation, which ends in logs, audit and terminals."""

from __future__ import annotations

from typing import Final

SHOWN_CHARACTERS_MAX: Final = 120


def shown(text: object) -> str:
    """Return printable ASCII on one line: everything else escaped, the rest cut off."""
    whole = str(text)
    escaped = whole[:SHOWN_CHARACTERS_MAX].encode("ascii", "backslashreplace").decode("ascii")
    safe = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in escaped)
    return safe if len(whole) <= SHOWN_CHARACTERS_MAX else safe + "..."
