"""The picture and the table of a lease's life in ``docs/lease-life.md``, made from `lease.MOVES`.

``python -m broker.core.lease_diagram docs/lease-life.md`` renews the part of the page between
the markers; a test compares the two, so the page cannot fall behind the code.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from broker.core.lease import MOVES, TERMINAL, LeaseState

BEGIN: Final = "<!-- generated from broker/core/lease.py: begin -->"
END: Final = "<!-- generated from broker/core/lease.py: end -->"

_OUTSIDE: Final = "[*]"


def diagram() -> str:
    """Return the moves as a mermaid state diagram; the ends lead out of it."""
    lines = ["stateDiagram-v2"]
    lines += [f"    {move.source or _OUTSIDE} --> {move.target}" for move in MOVES]
    lines += [f"    {state} --> {_OUTSIDE}" for state in LeaseState if state in TERMINAL]
    return "\n".join(lines)


def table() -> str:
    """Return the moves as a Markdown table."""
    lines = ["| from | to | when |", "| --- | --- | --- |"]
    for move in MOVES:
        source = "nothing" if move.source is None else f"`{move.source}`"
        end = " (end)" if move.target in TERMINAL else ""
        lines.append(f"| {source} | `{move.target}`{end} | {move.when} |")
    return "\n".join(lines)


def renewed(page: str) -> str:
    """Return the page with the part between the markers made anew.

    Raises:
        ValueError: a marker is missing, doubled, or they stand in the wrong order.

    """
    before, _, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end or BEGIN in rest or END in before + after:
        raise ValueError("the page needs one begin marker and one end marker after it")
    return f"{before}{BEGIN}\n\n```mermaid\n{diagram()}\n```\n\n{table()}\n\n{END}{after}"


def main(path: Path) -> None:
    """Renew a page in place."""
    path.write_text(renewed(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
