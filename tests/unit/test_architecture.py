"""What the import contracts cannot say: read off the source itself."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("broker", "inventory", "adapters", "sdk/nhi_sdk")


def modules(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert found
    return found


def caller_constructions(source: str) -> list[int]:
    """Return the lines that call ``Caller``, under whatever name it was imported."""
    tree = ast.parse(source)
    names = {"Caller"} | {
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name == "Caller" and alias.asname is not None
    }
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and (
            (isinstance(node.func, ast.Name) and node.func.id in names)
            or (isinstance(node.func, ast.Attribute) and node.func.attr == "Caller")
        )
    ]


def imported_modules(source: str) -> set[str]:
    """Return every absolute module name that is imported, anywhere in the source."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.add(node.module or "")
    return names


def test_only_authn_constructs_a_caller() -> None:
    makers = {
        path.relative_to(ROOT).as_posix()
        for path in modules(*PACKAGES)
        if caller_constructions(path.read_text(encoding="utf-8"))
    }
    assert makers == {"broker/authn/authenticator.py"}


@pytest.mark.parametrize(
    "source",
    [
        "from broker.core.caller import Caller\nCaller()",
        "from broker.core.caller import Caller as C\nC()",
        "from broker.core import caller\ncaller.Caller()",
    ],
)
def test_a_construction_is_seen_under_any_name(source: str) -> None:
    assert caller_constructions(source) == [2]


def test_core_imports_the_standard_library_only() -> None:
    foreign = {
        f"{path.name}: {name}"
        for path in modules("broker/core")
        for name in imported_modules(path.read_text(encoding="utf-8"))
        if name.partition(".")[0] not in sys.stdlib_module_names and not name.startswith("broker.core")
    }
    assert foreign == set()
