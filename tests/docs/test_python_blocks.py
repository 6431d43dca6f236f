"""Python on our pages compiles. The examples that promise something run in ``tests/e2e``."""

from __future__ import annotations

import ast
import warnings
from typing import TYPE_CHECKING

import pytest

from tests.support.documents import blocks_in

if TYPE_CHECKING:
    from tests.support.documents import Block


@pytest.mark.parametrize("block", blocks_in("python", "py"), ids=lambda block: block.page)
def test_python_on_a_page_compiles(block: Block) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # an ellipsis stands for what is left out
        compile(block.text, block.page, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
