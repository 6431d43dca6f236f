"""The project's own pages, as the tests of the documentation read them."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parents[2]

_FENCE = re.compile(
    r"^(?P<indent> *)(?P<mark>```+)(?P<language>[\w+-]*)[^\n]*\n(?P<text>.*?)^(?P=indent)(?P=mark)[ \t]*$",
    re.MULTILINE | re.DOTALL,
)
_TABLE_ROW = re.compile(r"^\|(.+)\|$")


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block of a page."""

    page: str
    language: str
    text: str


@cache
def tracked_files() -> tuple[str, ...]:
    """Paths of every file that git tracks, or would, from the root."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    return tuple(sorted(path for path in set(listed.split("\0")) if path and (ROOT / path).is_file()))


def is_tracked(path: str) -> bool:
    """Whether a file, or a folder with something in it, belongs to the repository."""
    return path in tracked_files() or any(name.startswith(f"{path.rstrip('/')}/") for name in tracked_files())


def pages() -> tuple[str, ...]:
    """Paths of every Markdown page."""
    return tuple(path for path in tracked_files() if path.endswith(".md"))


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    found = _FENCE.finditer(text_of(page))
    return [Block(page, match["language"], dedent(match["text"])) for match in found]


def blocks_in(*languages: str) -> list[Block]:
    return [block for page in pages() for block in blocks(page) if block.language in languages]


def prose_of(page: str) -> str:
    """The page without its fenced blocks."""
    return _FENCE.sub("", text_of(page))


def code_spans(page: str) -> list[str]:
    """What stands between single backticks, line breaks folded."""
    return [re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", prose_of(page))]


def section(page: str, heading: str) -> str:
    """The text below one heading, up to the next of any level."""
    found = re.search(
        rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", prose_of(page), re.MULTILINE | re.DOTALL
    )
    assert found is not None, f"{page} has no heading {heading!r}"
    return found[1]


def table(text: str) -> list[list[str]]:
    """Rows of the tables in a text, without their headers, cell by cell."""
    rows: list[list[str]] = []
    lines = text.splitlines()
    for number, line in enumerate(lines):
        found = _TABLE_ROW.match(line.strip())
        after = lines[number + 1].strip() if number + 1 < len(lines) else ""
        if found is None or set(line) <= set("|- :") or (after and set(after) <= set("|- :")):
            continue
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", found[1])])
    return rows
