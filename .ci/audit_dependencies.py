"""Audit the locked dependencies. What could not be looked up is NOT AUDITED, never a pass."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

LOCK = Path(__file__).parent.parent / "requirements" / "dev.txt"
TIMEOUT_SECONDS = 300
NAMED_MAX = 5
"""How many versions without an answer are named; the others are counted."""


def verdict(report: Any) -> tuple[list[str], int]:  # noqa: ANN401  another program's JSON
    """Return what to print of pip-audit's report (None: there is none), and the exit status.

    pip-audit passes a version that its service does not know. We do not: an index that has
    the files and no advisories answers so for every one of them.
    """
    if report is None:
        return ["NOT AUDITED: the advisory service could not be reached; no dependency was checked."], 0
    entries = report["dependencies"]
    found = [entry for entry in entries if entry.get("vulns")]
    skipped = sorted(entry["name"] for entry in entries if "vulns" not in entry)
    lines = [
        f"{entry['name']} {entry['version']}: {', '.join(advisory['id'] for advisory in entry['vulns'])}"
        for entry in found
    ]
    if skipped:
        rest = len(skipped) - NAMED_MAX
        named = ", ".join(skipped[:NAMED_MAX]) + (f" and {rest} more" if rest > 0 else "")
        lines.append(f"NOT AUDITED: no advisories to be had for {len(skipped)} locked versions: {named}")
    lines.append(f"{len(entries) - len(skipped)} locked versions audited, {len(found)} with a known advisory")
    return lines, 1 if found else 0


def _report() -> Any:  # noqa: ANN401  another program's JSON
    command = [
        sys.executable, "-m", "pip_audit", "--requirement", str(LOCK), "--require-hashes", "--disable-pip",
        "--format", "json", "--progress-spinner", "off",
    ]  # fmt: skip
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS)  # noqa: S603  our own arguments
        return json.loads(run.stdout)
    except (subprocess.TimeoutExpired, json.JSONDecodeError):
        return None


def main() -> int:
    """Return 1 where a locked version has a known advisory, else 0."""
    lines, status = verdict(_report())
    print("\n".join(lines))
    return status


if __name__ == "__main__":
    sys.exit(main())
