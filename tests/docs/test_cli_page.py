"""docs/cli.md names every command there is, and every exit code."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest

from nhi_sdk.cli.output import ExitCode
from tests.support.commands import command_tree
from tests.support.documents import text_of

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = text_of("docs/cli.md")


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    if not hasattr(command, "commands"):
        yield " ".join(path)
        return
    for name, below in command.commands.items():
        yield from commands(below, (*path, name))


@pytest.mark.parametrize("command", sorted(commands(command_tree())))
def test_every_command_has_a_row(command: str) -> None:
    assert f"| `nhi {command}` |" in PAGE


def test_no_row_is_about_a_command_that_does_not_exist() -> None:
    rows = set(re.findall(r"^\| `nhi ([a-z -]+)` \|", PAGE, re.MULTILINE))
    assert rows == set(commands(command_tree()))


def test_every_exit_code_is_explained() -> None:
    rows = {
        (int(code), name) for code, name in re.findall(r"^\| (\d+) \| `([A-Z_]+)` \|", PAGE, re.MULTILINE)
    }
    assert rows == {(one.value, one.name) for one in ExitCode}
