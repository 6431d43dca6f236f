"""Mistakes that YAML takes without a word are named with file and line."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from broker.policy.documents import BYTES_MAX, read_document

if TYPE_CHECKING:
    from pathlib import Path


def _problems(tmp_path: Path, text: str | bytes) -> list[str]:
    path = tmp_path / "file.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    problems: list[str] = []
    assert (read_document(path, problems) is None) == bool(problems)
    return problems


def test_a_clean_document_has_no_problem(tmp_path: Path) -> None:
    assert _problems(tmp_path, "a: 1\nb: {c: [1, 2]}\n") == []


def test_every_key_given_twice_is_named_with_its_line(tmp_path: Path) -> None:
    assert _problems(tmp_path, "a:\n  b: 1\n  b: 2\nc: 1\nc: 2\n") == [
        "file.yaml:3: a.b: the key is given twice",
        "file.yaml:5: c: the key is given twice",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &x 1\nb: *x\n", "file.yaml:1: b: aliases are not used here"),
        ("a: &x [*x]\n", "aliases are not used here"),
        ("a: {<<: {b: 1}}\n", "file.yaml:1: a: a key is not plain text; quote it"),
        ("on: 1\n", "a key is not plain text; quote it"),
        ("1: 1\n", "a key is not plain text; quote it"),
        ("[a]: 1\n", "a key is not plain text; quote it"),
        ("a: [1\n", "file.yaml:2: "),
        ("a: 1\n---\nb: 2\n", "but found another document"),
        ("", "file.yaml: is empty"),
        ("a: !!python/object:os.system {}\n", "could not determine a constructor"),
        ("a: 2026-13-45\n", "not readable as YAML"),
        (b"a: \xff\n", "not readable as YAML"),
        ("a: \x00\n", "not readable as YAML"),
        ("[" * 5000, "nested too deeply"),
        ("[" * 40 + "]" * 40, "nested deeper than 32 levels"),
        ("#" * (BYTES_MAX + 1), "larger than"),
    ],
)
def test_what_a_strict_reader_refuses(tmp_path: Path, text: str | bytes, said: str) -> None:
    assert said in "\n".join(_problems(tmp_path, text))


def test_a_missing_file_is_a_problem_without_its_path(tmp_path: Path) -> None:
    problems: list[str] = []
    assert read_document(tmp_path / "none.yaml", problems) is None
    assert problems == ["none.yaml: cannot be read: No such file or directory"]
