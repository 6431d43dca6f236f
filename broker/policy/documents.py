"""Strict YAML: the files people write, read so that no mistake in them passes in silence.

A key given twice, an alias, a date where a word was meant: YAML takes each without a
word, and each has opened a door somewhere. Here every one is named with file and line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

BYTES_MAX: Final = 4 * 1024 * 1024
DEPTH_MAX: Final = 32

Place = tuple[str | int, ...]
"""Where something stands in a document: keys and positions from the root."""

Word = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
"""The name of anything registered: lower case, digits, ``. _ -``, at most 63 characters."""

Text = Annotated[str, StringConstraints(min_length=1, max_length=200)]

ModelT = TypeVar("ModelT", bound="Strict")


class Strict(BaseModel):
    """A model that coerces nothing and takes no key it does not know."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


@dataclass(frozen=True, slots=True)
class Document:
    """One file's content and the line of each of its places."""

    path: Path
    content: object
    lines: Mapping[Place, int]

    def at(self, place: Place) -> str:
        """Render a place for a person: ``catalog.yaml:12: resources.orders-db.owner``."""
        known = place
        while known and known not in self.lines:
            known = known[:-1]  # a missing key has no line of its own: its parent's is the nearest
        return f"{self.path.name}:{self.lines.get(known, 1)}: {_dotted(place)}"

    def validate(
        self, model: type[ModelT], value: object, place: Place, problems: list[str]
    ) -> ModelT | None:
        """Return the model, or None after adding everything wrong with `value` to `problems`."""
        try:
            return model.model_validate(value)
        except ValidationError as error:
            problems.extend(
                f"{self.at((*place, *found['loc']))}: {found['msg']}"
                for found in error.errors(include_url=False, include_context=False, include_input=False)
            )
            return None


def _dotted(place: Place) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return text.removeprefix(".") or "(the whole file)"


def read_document(path: Path, problems: list[str]) -> Document | None:
    """Read one YAML file, or return None after adding everything wrong with it to `problems`."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        problems.append(f"{path.name}: cannot be read: {error.strerror}")
        return None
    if len(raw) > BYTES_MAX:
        problems.append(f"{path.name}: larger than {BYTES_MAX} bytes")
        return None
    try:
        return _parse(path, raw, problems)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problems.append(f"{path.name}:{line}: {error.problem or 'is not YAML'}")
    except (yaml.YAMLError, ValueError):
        # ValueError: a scalar shaped like a date or a number that is none (2026-13-45)
        problems.append(f"{path.name}: is not readable as YAML in UTF-8")
    except RecursionError:
        problems.append(f"{path.name}: is nested too deeply")
    return None


def _parse(path: Path, raw: bytes, problems: list[str]) -> Document | None:
    loader = yaml.SafeLoader(raw)
    root = loader.get_single_node()
    if root is None:
        problems.append(f"{path.name}: is empty")
        return None
    walk = _Walk(path.name)
    walk.visit(root, ())
    problems.extend(walk.problems)
    return None if walk.problems else Document(path, loader.construct_document(root), walk.lines)


class _Walk:
    """Notes the line of every place and what a strict reader refuses."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: dict[Place, int] = {}
        self.problems: list[str] = []
        self._seen: set[int] = set()

    def visit(self, node: yaml.Node, place: Place) -> None:
        line = node.start_mark.line + 1
        self.lines.setdefault(place, line)
        if id(node) in self._seen:  # an alias composes to the very node it names
            self.problems.append(f"{self.name}:{line}: {_dotted(place)}: aliases are not used here")
            return
        self._seen.add(id(node))
        if len(place) > DEPTH_MAX:
            self.problems.append(f"{self.name}:{line}: nested deeper than {DEPTH_MAX} levels")
        elif isinstance(node, yaml.MappingNode):
            self._visit_mapping(node, place)
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self.visit(item, (*place, index))

    def _visit_mapping(self, node: yaml.MappingNode, place: Place) -> None:
        keys: set[str] = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                self.problems.append(
                    f"{self.name}:{line}: {_dotted(place)}: a key is not plain text; quote it"
                )
                continue
            here = (*place, key.value)
            if key.value in keys:
                self.problems.append(f"{self.name}:{line}: {_dotted(here)}: the key is given twice")
            keys.add(key.value)
            self.lines[here] = line
            self.visit(value, here)
