"""Command lines of `nhi` and make, as pages and messages show them, held against what exists."""

from __future__ import annotations

import re
import shlex
from functools import cache
from typing import TYPE_CHECKING, Any

import typer.main

from nhi_sdk.cli.app import build_app

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_PROMPT = re.compile(r"^\s*(?:\$ )?(?:sudo (?:-u \S+ )?)?(?:[A-Z_]+=\S+ )*(?:\.venv/bin/|/opt/\S+/bin/)?nhi ")
_STOP = frozenset({"|", "||", "&&", ";", ">", "<", "#"})


@cache
def command_tree() -> Any:
    """The root command with all that is registered."""
    return typer.main.get_command(build_app())


def words_of(line: str) -> list[str] | None:
    """The words after `nhi` of a line that runs it, up to a pipe or comment; None for any other line."""
    found = _PROMPT.match(line)
    if found is None:
        return None
    lexer = shlex.shlex(line[found.end() :], posix=True, punctuation_chars="|;&<>")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in lexer:
        if word in _STOP:
            break
        words.append(word)
    return words


def problems(words: Sequence[str]) -> Iterator[str]:
    """Say what a command line names that does not exist: commands, options, missing required options."""
    command, rest = command_tree(), list(words)
    path = ["nhi"]
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        name = rest.pop(0)
        if name not in command.commands:
            yield f"{' '.join(path)} has no command {name!r}"
            return
        command = command.commands[name]
        path.append(name)
    options, takes_value = _options(command)
    given: set[str] = set()
    while rest:
        word = rest.pop(0)
        if word == "--":
            break  # what follows belongs to another program
        name, equals, _ = word.partition("=")
        if name in {"--help", "-h"}:
            return
        if not name.startswith("-"):
            if not command.allow_interspersed_args:
                break
            continue
        if name not in options:
            yield f"{' '.join(path)} has no option {name}"
            continue
        given.add(name)
        if takes_value[name] and not equals:
            if not rest:
                yield f"{' '.join(path)} {name} wants a value"
                return
            rest.pop(0)
    yield from (
        f"{' '.join(path)} wants {spellings[0]}"
        for spellings in _required(command)
        if not given & set(spellings)
    )


def _options(command: Any) -> tuple[set[str], dict[str, bool]]:
    takes_value: dict[str, bool] = {}
    for parameter in command.params:
        if parameter.param_type_name == "option":
            for name in (*parameter.opts, *parameter.secondary_opts):
                takes_value[name] = not parameter.is_flag
    return set(takes_value), takes_value


def _required(command: Any) -> list[list[str]]:
    """Options that must be given: those with a variable of the environment may come from there."""
    return [
        list(parameter.opts)
        for parameter in command.params
        if parameter.param_type_name == "option" and parameter.required and not parameter.envvar
    ]


_TARGET = re.compile(r"^([a-z][a-z-]*):", re.MULTILINE)


def make_targets(makefile: str) -> set[str]:
    return set(_TARGET.findall(makefile))
