"""What a diagnosis is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what.
        verdict: whether it is right; ``unknown`` where something before it has to be mended first.
        seen: what was there.
        mend: what to do, empty where there is nothing to do.

    """

    name: str
    verdict: Literal["right", "wrong", "unknown"]
    seen: str
    mend: str = ""


@dataclass(slots=True)
class Diagnosis:
    """Everything that was looked at, in the order of looking."""

    findings: list[Finding] = field(default_factory=list)

    @property
    def to_mend(self) -> bool:
        """Whether anything is wrong."""
        return any(one.verdict == "wrong" for one in self.findings)

    def right(self, name: str, seen: str) -> None:
        """Note what is as it should be."""
        self.findings.append(Finding(name, "right", seen))

    def wrong(self, name: str, seen: str, mend: str) -> None:
        """Note what is not, and how to mend it."""
        self.findings.append(Finding(name, "wrong", seen, mend))

    def unknown(self, name: str, why: str) -> None:
        """Note what could not be looked at."""
        self.findings.append(Finding(name, "unknown", why))

    def as_json(self) -> dict[str, Any]:
        """Return it for programs."""
        return {
            "ok": not self.to_mend,
            "findings": [
                {"name": one.name, "verdict": one.verdict, "seen": one.seen, "mend": one.mend}
                for one in self.findings
            ],
        }
