"""What the shared fixtures do where a real part cannot be had."""

from __future__ import annotations

import pytest

from tests.support.parts import part_missing


def test_a_missing_part_skips_and_names_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NHI_REQUIRE_ALL", raising=False)
    with pytest.raises(pytest.skip.Exception, match="install it"):
        part_missing("no such part: install it")


def test_a_missing_part_fails_where_all_are_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NHI_REQUIRE_ALL", "1")
    with pytest.raises(pytest.fail.Exception, match="install it"):
        part_missing("no such part: install it")
