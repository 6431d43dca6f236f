"""`nhi policy` on good and broken directories."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

if TYPE_CHECKING:
    from tests.unit.cli.conftest import Nhi

POLICIES = Path(__file__).parents[3] / "policies"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a copy of the starter set that a test may break."""
    return Path(shutil.copytree(POLICIES, tmp_path / "policies"))


def test_the_starter_set_passes(nhi: Nhi, folder: Path) -> None:
    assert nhi("policy", "check") == 0  # the default directory is ./policies
    assert nhi("policy", "check", "--directory", folder, "--json") == 0
    assert nhi.json()["ok"] is True
    assert nhi("policy", "test", "-d", folder) == 0
    assert nhi("policy", "test", "-d", folder, "--json") == 0
    assert nhi.json()["uncovered"] == []
    assert all(one["passed"] for one in nhi.json()["cases"])


def test_everything_wrong_is_said_at_once(nhi: Nhi, folder: Path) -> None:
    (folder / "grants.cedar").write_text("permit nonsense;")
    identities = yaml.safe_load((folder / "identities.yaml").read_text())
    next(iter(identities["identities"].values()))["team"] = "nobody-knows"
    (folder / "identities.yaml").write_text(yaml.safe_dump(identities))
    assert nhi("policy", "check", "-d", folder) == 1
    assert "grants.cedar" in nhi.err
    assert "nobody-knows" in nhi.err or "team" in nhi.err
    assert nhi("policy", "check", "-d", folder, "--json") == 1
    assert len(nhi.json()["problems"]) >= 2
    assert nhi("policy", "test", "-d", folder) == 1


def test_a_case_that_fails_is_shown_with_what_differed(nhi: Nhi, folder: Path) -> None:
    cases = folder / "cases" / "grants.yaml"
    document = yaml.safe_load(cases.read_text())
    document["cases"][0]["expect"] = "deny"
    cases.write_text(yaml.safe_dump(document))
    assert nhi("policy", "test", "-d", folder) == 1
    assert document["cases"][0]["name"] in nhi.out
    assert "expected deny, got allow" in nhi.out


def test_a_policy_without_cases_fails_the_test(nhi: Nhi, folder: Path) -> None:
    (folder / "cases" / "approvals.yaml").unlink()
    assert nhi("policy", "test", "-d", folder) == 1
    assert "no case in which it" in nhi.err
    assert nhi("policy", "test", "-d", folder, "--json") == 1
    assert nhi.json()["ok"] is False


def test_a_directory_that_holds_nothing_is_refused(nhi: Nhi, tmp_path: Path) -> None:
    assert nhi("policy", "check", "-d", tmp_path / "nowhere") == 1
    assert "catalog.yaml" in nhi.err
