"""Figures, processes and the table."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results.json"
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Figure:
    """One measured figure against its goal.

    Attributes:
        peer: what it is compared with in the same run, empty for an absolute figure.
        ratio: figure over the peer's, None for an absolute figure.
        goal: the goal in words.

    """

    name: str
    figure: float
    unit: str
    goal: str
    met: bool
    peer: str = ""
    ratio: float | None = None


def percentile(values: list[float], share: float) -> float:
    """Return the value below which `share` of all values lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def cpu_seconds(pid: int) -> float:
    """Return the user and system time a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND


def resident_mib_max(pid: int) -> float:
    """Return the largest resident size a process ever had."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0.0


def report(figures: list[Figure]) -> None:
    """Print the table and leave results.json."""
    RESULTS.write_text(json.dumps([asdict(figure) for figure in figures], indent=2) + "\n")
    width = max(len(figure.name) for figure in figures)
    for figure in figures:
        ratio = "" if figure.ratio is None else f"  {figure.ratio:.2f} x {figure.peer}"
        verdict = "met" if figure.met else "MISSED"
        line = f"{figure.name:<{width}}  {figure.figure:>10,.1f} {figure.unit:<6} {verdict:<7}"
        print(f"{line} goal: {figure.goal}{ratio}")
