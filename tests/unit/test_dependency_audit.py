from __future__ import annotations

import importlib.util
from typing import Any

from tests.support.documents import ROOT


def verdict(report: Any) -> tuple[str, int]:
    spec = importlib.util.spec_from_file_location("audit_dependencies", ROOT / ".ci/audit_dependencies.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    lines, status = module.verdict(report)
    return "\n".join(lines), status


def clean(name: str) -> dict[str, Any]:
    return {"name": name, "version": "1", "vulns": []}


def test_an_advisory_fails_and_is_named() -> None:
    bad = {"name": "bad", "version": "2", "vulns": [{"id": "GHSA-1"}, {"id": "CVE-2"}]}
    assert verdict({"dependencies": [clean("good"), bad]}) == (
        "bad 2: GHSA-1, CVE-2\n2 locked versions audited, 1 with a known advisory",
        1,
    )


def test_nothing_found_in_what_was_looked_up_passes() -> None:
    assert verdict({"dependencies": [clean("good")]}) == (
        "1 locked versions audited, 0 with a known advisory",
        0,
    )


def test_no_report_is_no_pass() -> None:
    text, _ = verdict(None)
    assert text.startswith("NOT AUDITED")
    assert "0 with a known advisory" not in text


def test_a_version_the_service_does_not_know_is_no_pass() -> None:
    skipped = [{"name": f"p{number}", "skip_reason": "not found"} for number in range(7)]
    text, _ = verdict({"dependencies": [clean("good"), *skipped]})
    assert "NOT AUDITED: no advisories to be had for 7 locked versions: p0, p1, p2, p3, p4 and 2 more" in text
    assert "1 locked versions audited" in text
