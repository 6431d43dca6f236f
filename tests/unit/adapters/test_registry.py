from __future__ import annotations

import secrets
import subprocess
import sys

import pytest

from adapters import registry
from adapters.fake import FakeAdapter, FakeServer
from adapters.postgres import PostgresAdapter
from adapters.registry import AdapterUnavailableError, build, build_all, factories
from broker.core.ids import InstanceTag
from broker.core.secret import Secret

INSTANCE = InstanceTag.parse("abcdef")
CLEAR = secrets.token_hex()


def test_every_registered_kind_loads() -> None:
    for kind, path in factories().items():
        assert callable(registry._load(kind, path))


def test_a_factory_gets_its_settings_and_only_the_parts_it_names() -> None:
    server = FakeServer()
    adapter = build("fake", {"name": "shop"}, INSTANCE, server=server, keys=object())
    assert isinstance(adapter, FakeAdapter)
    assert adapter.name == "shop"
    assert adapter.server is server


def test_a_postgres_backend_is_built_from_settings() -> None:
    settings = {"name": "orders-pg", "host": "db.example", "broker_password": Secret("pw")}
    assert isinstance(build("postgres", settings, INSTANCE), PostgresAdapter)


def test_what_is_not_configured_is_not_loaded() -> None:
    program = "import sys, adapters.registry; print([m for m in sys.modules if m.startswith('adapters.')])"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "['adapters.registry']"


def test_an_unknown_kind_stops_the_start_and_names_the_known() -> None:
    with pytest.raises(AdapterUnavailableError, match=r"'oracle'.*fake, jwt_issuer, postgres"):
        build("oracle", {"name": "x"}, INSTANCE)


def test_a_kind_registered_twice_stops_the_start() -> None:
    with pytest.raises(AdapterUnavailableError, match="'one' is registered twice: a:b and c:d"):
        factories([("one", "a:b"), ("one", "c:d")])


def test_two_backends_of_one_name_stop_the_start() -> None:
    with pytest.raises(AdapterUnavailableError, match="two backends are named 'same'"):
        build_all([("fake", {"name": "same"}), ("fake", {"name": "same"})], INSTANCE)


@pytest.mark.parametrize("path", ["adapters.no_such_module:X", "adapters.fake:NoSuchFactory"])
def test_a_module_that_does_not_load_stops_the_start_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(registry, "factories", lambda: {"broken": path})
    with pytest.raises(AdapterUnavailableError, match="'broken' does not load from adapters") as refused:
        build("broken", {"name": "x"}, INSTANCE)
    assert "Error" in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("postgres", {"name": "p", "host": "h", "broker_password": CLEAR}),
        ("fake", {"nome": "typo"}),
    ],
)
def test_bad_settings_stop_the_start_and_are_named_without_secrets(
    kind: str, settings: dict[str, object]
) -> None:
    with pytest.raises(AdapterUnavailableError, match=f"backend .* \\({kind}\\): ") as refused:
        build(kind, settings, INSTANCE)
    assert CLEAR not in str(refused.value)
