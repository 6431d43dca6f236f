"""The threat model names tests and threats that exist."""

from __future__ import annotations

import ast
import re

import pytest

from tests.support.documents import ROOT, blocks, code_spans, pages, section, table

PAGE = "docs/threat-model.md"
_TEST = re.compile(r"(tests/[\w/]+\.py)::(\w+)")


def _cited(page: str) -> list[tuple[str, str]]:
    return [(found[1], found[2]) for span in code_spans(page) if (found := _TEST.fullmatch(span)) is not None]


def _tests_in(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    }


@pytest.mark.parametrize("page", pages())
def test_every_test_that_a_page_cites_exists(page: str) -> None:
    missing = [
        f"{path}::{name}"
        for path, name in _cited(page)
        if not (ROOT / path).is_file() or name not in _tests_in(path)
    ]
    assert not missing


def test_every_threat_has_its_own_number_an_answer_and_a_test() -> None:
    rows = table(section(PAGE, "Threats and answers"))
    assert [row[0] for row in rows] == [f"T-{number:02}" for number in range(1, len(rows) + 1)]
    for row in rows:
        assert len(row) == 4
        assert _TEST.search(row[3]), f"{row[0]} is shown by nothing"


def test_it_says_what_is_not_covered() -> None:
    assert section(PAGE, "What is not covered").count("\n- ") >= 10


def test_the_boundaries_are_drawn() -> None:
    assert [block.language for block in blocks(PAGE)] == ["mermaid"]
