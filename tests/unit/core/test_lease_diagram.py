from __future__ import annotations

import re
from pathlib import Path

import pytest

from broker.core.lease import MOVES, TERMINAL, LeaseState
from broker.core.lease_diagram import BEGIN, END, diagram, main, renewed, table

PAGE = Path(__file__).parents[3] / "docs" / "lease-life.md"


def test_the_page_is_what_the_table_makes_of_it() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert renewed(page) == page, "run: python -m broker.core.lease_diagram docs/lease-life.md"


def test_the_page_explains_every_state() -> None:
    page = PAGE.read_text(encoding="utf-8")
    explained = page.partition("## What each state means")[2].partition("## Every move")[0]
    rows = re.findall(r"^\| `(\w+)`( \(end\))? \|", explained, flags=re.MULTILINE)
    assert [name for name, _ in rows] == [str(state) for state in LeaseState]
    assert {name for name, end in rows if end} == {str(state) for state in TERMINAL}


def test_the_diagram_draws_every_move_and_every_end() -> None:
    arrows = re.findall(r"^    (\S+) --> (\S+)$", diagram(), flags=re.MULTILINE)
    moves = [(str(move.source or "[*]"), str(move.target)) for move in MOVES]
    ends = [(str(state), "[*]") for state in LeaseState if state in TERMINAL]
    assert arrows == moves + ends


def test_the_table_has_a_line_for_every_move() -> None:
    assert len(table().splitlines()) == len(MOVES) + 2


def test_only_the_part_between_the_markers_changes(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# before\n\n{BEGIN}\nold\n{END}\n\nafter\n", encoding="utf-8")
    main(page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# before\n\n")
    assert text.endswith(f"{END}\n\nafter\n")
    assert "old" not in text
    main(page)
    assert page.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    "page",
    ["", BEGIN, END, f"{END}{BEGIN}", f"{BEGIN}{BEGIN}{END}", f"{BEGIN}{END}{END}", f"{BEGIN}{END}{BEGIN}"],
)
def test_a_page_without_exactly_its_markers_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match="marker"):
        renewed(page)
