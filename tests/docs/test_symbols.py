"""Every name of our own code that a page mentions can be imported."""

from __future__ import annotations

import importlib
import re

import pytest

from tests.support.documents import code_spans, is_tracked, pages

_SYMBOL = re.compile(r"(?:broker|inventory|adapters|nhi_sdk)(?:\.\w+)+")
_CLIENT_PAGE = "docs/sdk.md"
"""There `broker` is a variable: the client."""


def _symbols(page: str) -> list[str]:
    found = (span.removesuffix("()") for span in code_spans(page))
    symbols = {span for span in found if _SYMBOL.fullmatch(span) and not span.endswith(".toml")}
    if page == _CLIENT_PAGE:
        symbols = {symbol for symbol in symbols if symbol.startswith("nhi_sdk.")}
    return sorted(symbols)


def _resolve(symbol: str) -> object:
    """Import the longest module in the name and walk the rest."""
    parts = symbol.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[length:]:
            found = getattr(found, attribute)
        return found
    raise ModuleNotFoundError(symbol)


_PAGES = [page for page in pages() if _symbols(page)]


@pytest.mark.parametrize("page", _PAGES)
def test_every_symbol_of_a_page_exists(page: str) -> None:
    missing = []
    for symbol in _symbols(page):
        try:
            _resolve(symbol)
        except (ModuleNotFoundError, AttributeError):
            missing.append(symbol)
    assert not missing, f"{page} names what does not exist: {missing}"


@pytest.mark.parametrize("page", pages())
def test_every_file_of_ours_that_a_page_names_exists(page: str) -> None:
    # Only names below a folder of this repository: others are files on a reader's machine.
    folders = "broker|inventory|adapters|policies|sdk|tests|docs|benchmarks|requirements|deploy"
    named = {span for span in code_spans(page) if re.fullmatch(rf"(?:{folders})/[\w./-]*\w", span)}
    assert not [name for name in sorted(named) if not is_tracked(name)]


def test_a_name_that_does_not_exist_is_noticed() -> None:
    with pytest.raises(AttributeError):
        _resolve("broker.core.lease.Leese")
    with pytest.raises(ModuleNotFoundError):
        _resolve("brooker.core")
