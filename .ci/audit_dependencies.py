"""Audit the locked dependencies. Says NOT AUDITED where advisories cannot be reached, never a pass."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

LOCK = Path(__file__).parent.parent / "requirements" / "dev.txt"
TIMEOUT_SECONDS = 300


def main() -> int:
    """Return 1 where a locked version has a known advisory, else 0."""
    command = [
        sys.executable, "-m", "pip_audit", "--requirement", str(LOCK), "--require-hashes", "--disable-pip",
        "--format", "json", "--progress-spinner", "off",
    ]  # fmt: skip
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS)  # noqa: S603  our own arguments
        report = json.loads(run.stdout)
    except (subprocess.TimeoutExpired, json.JSONDecodeError):
        print("NOT AUDITED: the advisory service could not be reached; no dependency was checked.")
        return 0
    found = [entry for entry in report["dependencies"] if entry.get("vulns")]
    for entry in found:
        advisories = ", ".join(advisory["id"] for advisory in entry["vulns"])
        print(f"{entry['name']} {entry['version']}: {advisories}")
    print(f"{len(report['dependencies'])} locked versions audited, {len(found)} with a known advisory")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
