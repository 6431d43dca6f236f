"""The page on policy shows what loads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from broker.policy.cases import run_cases
from broker.policy.engine import PolicyEngine
from broker.policy.policyset import GUARDS, PLACEHOLDERS

if TYPE_CHECKING:
    from broker.policy.catalog import Catalog

PAGE = (Path(__file__).parents[3] / "docs" / "policy.md").read_text()


def _block(language: str) -> str:
    found = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert len(found) == 1
    return str(found[0])


def test_the_example_policy_loads(folder: Path, catalog: Catalog) -> None:
    (folder / "example.cedar").write_text(_block("cedar"))
    assert "no-exports-at-night" in PolicyEngine.load(folder, catalog).policies


def test_the_example_case_holds(engine: PolicyEngine, tmp_path: Path) -> None:
    (tmp_path / "example.yaml").write_text(_block("yaml"))
    assert [result.problems for result in run_cases(engine, tmp_path)] == [()]


def test_the_page_names_every_placeholder(engine: PolicyEngine) -> None:
    named = set(re.findall(r"`\{(\w+)\}`", PAGE))
    assert named == set().union(*PLACEHOLDERS.values())


def test_the_guards_are_the_policies_of_one_file(engine: PolicyEngine) -> None:
    assert {name for name, policy in engine.policies.items() if policy.file == "guards.cedar"} == GUARDS
