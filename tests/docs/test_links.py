"""Links between pages lead somewhere, and pages and files give away no place of their making."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from posixpath import normpath

import pytest

from tests.support.documents import ROOT, blocks_in, is_tracked, pages, prose_of, tracked_files

_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_PUBLIC = re.compile(r"https://(?!localhost)[a-z0-9.-]+\.[a-z]+(/|$)")


def _anchor(heading: str) -> str:
    """Return the anchor that renderers give a heading."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")


def _anchors(page: str) -> set[str]:
    return {_anchor(heading) for heading in _HEADING.findall(prose_of(page))}


@pytest.mark.parametrize("page", pages())
def test_every_link_of_a_page_leads_somewhere(page: str) -> None:
    broken = []
    for target in _LINK.findall(prose_of(page)):
        if _PUBLIC.match(target):
            continue
        path, _, anchor = target.partition("#")
        resolved = normpath(str(PurePosixPath(page).parent / path)) if path else page
        there = is_tracked(resolved)
        if not there or (anchor and anchor not in _anchors(resolved)):
            broken.append(target)
    assert not broken, f"{page} links to {broken}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen, todo = set[str](), ["README.md"]
    while todo:
        page = todo.pop()
        if page in seen:
            continue
        seen.add(page)
        for target in _LINK.findall(prose_of(page)):
            path = normpath(str(PurePosixPath(page).parent / target.partition("#")[0]))
            if (ROOT / path).is_dir():
                path = f"{path}/README.md"
            if path in pages():
                todo.append(path)
    assert set(pages()) - seen == set()


@pytest.mark.parametrize("block", blocks_in("mermaid"), ids=lambda block: block.page)
def test_a_diagram_draws_something(block: object) -> None:
    lines = [line for line in str(getattr(block, "text", "")).splitlines() if line.strip()]
    assert len(lines) >= 4
    assert re.match(r"(sequenceDiagram|stateDiagram-v2|flowchart (LR|TD|TB))$", lines[0].strip())
    assert any(re.search(r"--|->|: ", line) for line in lines[1:])


def test_the_readme_has_its_diagram() -> None:
    assert "README.md" in {block.page for block in blocks_in("mermaid")}


# --- nothing of the place it was made at --------------------------------------------------------

_HERE = re.compile(
    rb"(?<![\w.])/(?:work|root|home|Users)/[\w.-]"  # somebody's machine
    rb"|https?://[\w.-]*(?:pypi|pythonhosted|artifactory|nexus|jfrog|npmjs|proxy)[\w.-]*"  # a registry
    rb"|index-url\s*[=:]?\s*http|extra-index-url\s*[=:]?\s*http",
)


@pytest.mark.parametrize("path", tracked_files())
def test_no_file_names_a_machine_or_a_registry(path: str) -> None:
    found = [match.decode(errors="replace") for match in _HERE.findall((ROOT / path).read_bytes())]
    assert found == []


def test_such_a_name_would_be_found() -> None:
    # Spelled in two parts, so that this file does not contain what it looks for.
    for example in (b"see /ro" + b"ot/x", b'"/wo' + b'rk/main"', b"https://py" + b"pi.org/simple"):
        assert _HERE.search(example)
    for harmless in (b"/run/nhi-broker", b"/var/lib", b"policies/work/x", b"below ``/root``"):
        assert not _HERE.search(harmless)
