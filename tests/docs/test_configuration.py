"""docs/configuration.md holds every setting, its values and its default, and nothing else."""

from __future__ import annotations

import re
import types
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from adapters.jwt_issuer import JwtIssuer
from broker.settings import Settings
from tests.support.documents import text_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic.fields import FieldInfo

PAGE = "docs/configuration.md"
_ROW = re.compile(r"^\| `([a-z_.]+)` \| ([^|]*) \| ([^|]*) \| ([^|]+) \|$", re.MULTILINE)


def settings(model: type[BaseModel] = Settings, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from settings(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def values(field: FieldInfo) -> str:
    """What a setting takes, in the words of the page."""
    return f"{_kind(field.annotation)}{_bounds(field)}"


def _kind(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{one}`" for one in get_args(annotation))
    if get_origin(annotation) in {Union, types.UnionType}:
        return _kind(next(one for one in get_args(annotation) if one is not type(None)))
    if get_origin(annotation) is dict:
        return "table of paths"
    if get_origin(annotation) is list:
        return "tables"
    words = {"Path": "path", "str": "text", "int": "integer", "float": "number", "bool": "true or false"}
    return words[annotation.__name__]


def _bounds(field: FieldInfo) -> str:
    found = {type(one).__name__: one for one in field.metadata}
    low, high = found.get("Ge") or found.get("Gt"), found.get("Le")
    if low is None or high is None:
        return ""
    return f" {low.ge if hasattr(low, 'ge') else 'above ' + str(low.gt)} to {high.le}"


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    assert value is not PydanticUndefined
    if value is None or value == {}:
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


ROWS = {match[1]: match for match in _ROW.finditer(text_of(PAGE))}
SETTINGS = dict(settings())


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_every_setting_is_on_the_page_as_it_is(name: str) -> None:
    assert name in ROWS, f"| `{name}` | {values(SETTINGS[name])} | {default(SETTINGS[name])} | … |"
    row = ROWS[name]
    assert (row[2], row[3]) == (values(SETTINGS[name]), default(SETTINGS[name]))


def test_the_page_holds_no_setting_that_does_not_exist() -> None:
    assert sorted(ROWS.keys() - SETTINGS.keys()) == []


def test_the_sample_on_the_page_loads(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    sample = re.search(r"```toml\n(.*?)```", text_of(PAGE), re.DOTALL)
    assert sample is not None
    path = tmp_path / "broker.toml"
    path.write_text(sample[1])
    loaded = Settings.load(path)
    assert {str(one["kind"]) for one in loaded.backends} == {"postgres", "jwt_issuer"}
    monkeypatch.setenv("NHI_WORKLOAD__PORT", "9443")
    assert Settings.load(path).workload.port == 9443


def test_the_issuers_own_settings_are_those_of_the_page() -> None:
    assert "ttl_seconds_max" in JwtIssuer.__init__.__annotations__
    assert "`ttl_seconds_max`" in text_of(PAGE)
