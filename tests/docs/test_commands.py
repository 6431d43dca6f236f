"""Every command that a page shows exists, with the options shown."""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING

import pytest

from tests.support.commands import command_tree, make_targets, problems, words_of
from tests.support.documents import ROOT, blocks, code_spans, pages, text_of, tracked_files

if TYPE_CHECKING:
    from collections.abc import Iterator

SHELL = frozenset({"console", "sh", "bash", "shell"})

COMMANDS = (
    "serve", "dev", "demo", "doctor", "kill", "leases list", "leases show", "leases retry", "leases abandon",
    "inventory list", "inventory show", "inventory set-owner", "inventory suspend", "inventory resume",
    "status", "findings", "audit export", "audit verify", "audit keys", "policy test", "policy check",
    "adapter postgres install", "adapter prove", "fsck",
    "request", "exec", "task open", "task show", "task end", "catalog",
)  # fmt: skip


def _lines(page: str) -> Iterator[str]:
    """Whole command lines of a page's shell blocks, continued ones joined."""
    for block in blocks(page):
        if block.language in SHELL:
            yield from re.sub(r"\\\n\s*", " ", block.text).splitlines()


def _spans(page: str) -> Iterator[str]:
    """What stands between backticks and is a command of ours; placeholders are upper case or an ellipsis."""
    for span in code_spans(page):
        if re.match(r"nhi [a-z-]", span):
            yield span


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_is_promised_exists(command: str) -> None:
    assert list(_unknown(command.split())) == []


def _unknown(words: list[str]) -> list[str]:
    """What is wrong with a line that may leave out what has to be given."""
    return [problem for problem in problems(words) if " wants " not in problem]


@pytest.mark.parametrize("page", pages())
def test_every_command_line_of_a_page_would_be_taken(page: str) -> None:
    found = [
        problem
        for line in _lines(page)
        if (words := words_of(line)) is not None
        for problem in problems(words)
    ]
    assert found == []


@pytest.mark.parametrize("page", pages())
def test_every_command_named_in_a_sentence_exists(page: str) -> None:
    found = [problem for span in _spans(page) for problem in _unknown(words_of(span) or [])]
    assert found == []


def test_the_commands_of_the_readme_are_seen() -> None:
    seen = {tuple(words[:2]) for line in _lines("README.md") if (words := words_of(line)) is not None}
    assert {("leases", "list"), ("inventory", "list"), ("kill", "--identity")} <= seen


# --- what our own messages tell people to run ---------------------------------------------------


def _messages() -> Iterator[tuple[str, str]]:
    """(file, text) of every string in the code that ships."""
    for path in tracked_files():
        if re.match(r"(broker|inventory|adapters|sdk/nhi_sdk)/.*\.py$", path):
            for node in ast.walk(ast.parse(text_of(path))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield path, " ".join(node.value.split())


def _advised(text: str) -> Iterator[list[str]]:
    """The command lines in a text: known commands only, since `nhi` is a word of sentences too."""
    for match in re.finditer(r"\bnhi ((?:-{0,2}[a-z][a-z-]*)(?: -{0,2}[a-z][a-z-]*)*)", text):
        words = match[1].split()
        if words[0] in command_tree().commands:
            yield _command_and_options(words)


def _command_and_options(words: list[str]) -> list[str]:
    """Keep the path of commands and the options right behind it; the rest may be prose."""
    kept, command = [], command_tree()
    rest = list(words)
    while rest and hasattr(command, "commands") and rest[0] in command.commands:
        command = command.commands[rest[0]]
        kept.append(rest.pop(0))
    while rest and rest[0].startswith("--"):
        kept.append(rest.pop(0))
    return kept


def test_every_option_that_a_message_advises_exists() -> None:
    found = [
        f"{path}: {problem}"
        for path, text in _messages()
        for words in _advised(text)
        for problem in problems(words)
        if " has no option " in problem
    ]
    assert found == []


# --- make ---------------------------------------------------------------------------------------

MAKEFILE = (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("page", [*pages(), ".ci/run"])
def test_every_make_target_that_is_named_exists(page: str) -> None:
    text = text_of(page)
    shell = [block.text for block in blocks(page) if block.language in SHELL]
    spans = [span for span in code_spans(page) if span.startswith("make ")]
    lines = "\n".join([*shell, *spans]) if page.endswith(".md") else text
    named = set(re.findall(r"^\s*(?:exec )?make ([a-z-]+)", lines, re.MULTILINE))
    assert named <= make_targets(MAKEFILE)


def test_every_make_target_is_phony_listed_and_described() -> None:
    targets = make_targets(MAKEFILE)
    phony = set(re.search(r"^\.PHONY: (.+)$", MAKEFILE, re.MULTILINE)[1].split())  # type: ignore[index]  # it is there
    described = set(re.findall(r"^([a-z-]+):.*## \S", MAKEFILE, re.MULTILINE))
    assert targets == phony == described


def test_ci_makefile_and_readme_name_the_same_commands() -> None:
    in_ci = set(re.findall(r"\bmake ([a-z-]+)", (ROOT / ".ci" / "run").read_text()))
    in_readme = {
        name
        for block in blocks("README.md")
        for name in re.findall(r"^make ([a-z-]+)", block.text, re.MULTILINE)
    }
    assert in_ci == {"check", "test"}
    assert in_ci <= in_readme <= make_targets(MAKEFILE)
    # What the README does not show is for those who read CONTRIBUTING or `make help`.
    assert make_targets(MAKEFILE) - in_readme == {"help", "openapi", "lock", "format", "clean"}


def test_a_wrong_command_is_noticed() -> None:
    assert list(problems(["leeses"])) == ["nhi has no command 'leeses'"]
    assert list(problems(["kill", "--identiti", "x", "--reason", "y"]))[:1] == [
        "nhi kill has no option --identiti"
    ]
    assert list(problems(["kill", "--identity", "x"])) == ["nhi kill wants --reason"]
    assert words_of(".venv/bin/nhi exec --cred a:b --purpose p --reason 'a b' -- psql -c x | cat") == [
        "exec", "--cred", "a:b", "--purpose", "p", "--reason", "a b", "--", "psql", "-c", "x",
    ]  # fmt: skip
    assert words_of("sudo -u nhi-broker nhi status # look") == ["status"]
    assert words_of("the nhi command") is None
