"""docs/sdk.md says what there is."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import nhi_sdk
from nhi_sdk import environment, errors
from nhi_sdk.cli.app import build_app
from nhi_sdk.cli.output import ExitCode

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/sdk.md").read_text()
README = (ROOT / "sdk/README.md").read_text()


@pytest.mark.parametrize("code", list(ExitCode))
def test_every_exit_code_is_documented(code: ExitCode) -> None:
    assert re.search(rf"^\| {code.value} \|", PAGE, re.MULTILINE)


@pytest.mark.parametrize(
    "variable", ["BROKER_URL", "AUDIENCE", "SOCKET", "TOKEN_FILE", "CA_FILE", "SPIFFE_ID", "MTLS"]
)
def test_every_variable_is_documented(variable: str) -> None:
    assert f"| `{getattr(environment, variable)}` |" in PAGE


def test_the_tree_of_errors_is_the_modules() -> None:
    tree = inspect.cleandoc(errors.__doc__ or "").partition("::\n\n")[2]
    drawn = [line.strip() for line in tree.splitlines() if line.startswith("    ")]
    assert drawn
    assert all(line in PAGE for line in drawn)
    classes = {
        name
        for name, one in vars(errors).items()
        if inspect.isclass(one) and issubclass(one, errors.NhiError)
    }
    assert all(any(name in line for line in drawn) for name in classes)


def test_every_client_command_is_documented() -> None:
    listed = CliRunner().invoke(build_app(), ["--help"]).output
    for command in ("exec", "request", "revoke", "task", "catalog", "whoami"):
        assert f"`nhi {command}" in PAGE
        assert re.search(rf"^\s+{command}\b", listed, re.MULTILINE)


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", PAGE + README, re.DOTALL))
def test_every_example_uses_names_that_exist(block: str) -> None:
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom):
            assert node.module == "nhi_sdk"
            assert all(hasattr(nhi_sdk, one.name) for one in node.names)


def test_all_names_every_public_name_once() -> None:
    assert sorted(nhi_sdk.__all__) == sorted(set(nhi_sdk.__all__))
    assert all(hasattr(nhi_sdk, name) for name in nhi_sdk.__all__)
    assert {
        name
        for name, one in vars(errors).items()
        if inspect.isclass(one) and issubclass(one, errors.NhiError)
    } <= set(nhi_sdk.__all__)
