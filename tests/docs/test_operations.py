"""docs/operations.md, the sample settings and the unit say what the code does."""

from __future__ import annotations

import ast
import configparser
import re
import shlex
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from broker.api.metrics import PrometheusTelemetry
from broker.app import configure
from broker.core.clock import SystemClock
from broker.core.ids import InstanceTag
from broker.keys.file_store import FileKeyStore
from broker.settings import Settings, production_problems
from tests.support.documents import ROOT, blocks, prose_of, section, table, text_of, tracked_files

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = "docs/operations.md"
CONFIG = ROOT / "deploy" / "config" / "broker.toml"
UNIT = ROOT / "deploy" / "systemd" / "nhi-broker.service"


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for section_name in Settings.model_fields:
        monkeypatch.delenv(f"NHI_{section_name.upper()}", raising=False)


# --- the sample settings ------------------------------------------------------------------------


def test_the_sample_settings_are_fit_for_production() -> None:
    settings = Settings.load(CONFIG)
    assert settings.mode == "production"
    assert production_problems(settings) == []


def test_the_sample_settings_serve_the_starter_policies(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NHI_POLICY__DIRECTORY", str(ROOT / "policies"))
    keys = FileKeyStore(tmp_path / "keys.json", SystemClock())
    settings = Settings.load(CONFIG)
    assert settings.policy.directory == ROOT / "policies"  # a variable wins over the file
    configured = configure(settings, InstanceTag.new(), keys)
    assert {granted.adapter for granted in configured.catalog} <= set(configured.adapters)


def test_what_the_page_says_production_refuses_is_refused(tmp_path: Path) -> None:
    good = CONFIG.read_text()
    shortcuts = {
        '"/mnt/nhi-audit/heads"': '"/var/lib/nhi-broker/ledger/heads"',
        '"/var/lib/nhi-broker/keys/keys.json"': '"/var/lib/nhi-broker/ledger/keys.json"',
        "require_owner = true": "require_owner = false",
        'host = "127.0.0.1"': 'host = "0.0.0.0"',
        'kind = "jwt_issuer"': 'kind = "fake"',
        'sslmode = "verify-full"': 'sslmode = "disable"',
    }
    for number, (before, after) in enumerate(shortcuts.items()):
        assert good.count(before) == 1, before
        path = tmp_path / f"{number}.toml"
        path.write_text(good.replace(before, after))
        assert len(production_problems(Settings.load(path))) == 1, after


# --- the unit -----------------------------------------------------------------------------------


def _unit() -> dict[str, dict[str, list[str]]]:
    """Return the unit's settings; systemd lets a key come more than once."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    name = ""
    for line in UNIT.read_text().splitlines():
        if line.startswith("["):
            name = line.strip("[]")
        elif line and not line.startswith("#"):
            key, equals, value = line.partition("=")
            assert equals, line
            found[name][key].append(value)
    return found


def test_the_unit_reads_as_one() -> None:
    parser = configparser.ConfigParser(strict=False, interpolation=None, allow_no_value=False)
    parser.read_string(UNIT.read_text())
    assert parser.sections() == ["Unit", "Service", "Install"]


def test_the_unit_runs_the_sample_settings() -> None:
    (command,) = _unit()["Service"]["ExecStart"]
    words = shlex.split(command)
    assert words[0] == "/opt/nhi-broker/bin/nhi"
    assert words[1] == "serve"
    assert words[words.index("--config") + 1] == "/etc/nhi-broker/broker.toml"


def test_the_unit_lets_the_sample_settings_write_where_they_must_and_nowhere_else() -> None:
    service = _unit()["Service"]
    settings = Settings.load(CONFIG)
    state = {Path("/var/lib") / name for name in service["StateDirectory"][0].split()}
    assert {settings.ledger.path.parent, settings.keys.path.parent} <= state
    assert settings.operator.socket.parent == Path("/run") / service["RuntimeDirectory"][0]
    (second_place,) = service["ReadWritePaths"]
    assert Path(second_place) in settings.audit.copy_directory.parents
    assert _unit()["Unit"]["RequiresMountsFor"] == [second_place]
    assert service["ProtectSystem"] == ["strict"]


def test_the_units_directories_are_private() -> None:
    service = _unit()["Service"]
    assert service["StateDirectoryMode"] == service["RuntimeDirectoryMode"] == ["0700"]
    assert service["UMask"] == ["0077"]


def test_the_unit_waits_longer_than_the_broker_takes_to_stop() -> None:
    (seconds,) = _unit()["Service"]["TimeoutStopSec"]
    limits = Settings.load(CONFIG).limits
    assert int(seconds) > limits.shutdown_seconds + 60  # a claim on a lease lasts a minute


@pytest.mark.parametrize(
    "setting",
    [
        "NoNewPrivileges",
        "PrivateTmp",
        "PrivateDevices",
        "ProtectHome",
        "RestrictNamespaces",
        "LockPersonality",
    ],
)
def test_the_unit_takes_rights_away(setting: str) -> None:
    assert _unit()["Service"][setting] == ["yes"]


def test_the_unit_leaves_no_secret_on_a_disk_and_no_capability() -> None:
    service = _unit()["Service"]
    assert service["LimitCORE"] == service["MemorySwapMax"] == ["0"]
    assert service["CapabilityBoundingSet"] == [""]


# --- what the page says -------------------------------------------------------------------------


def _series() -> set[str]:
    exposed = PrometheusTelemetry(["a"], ["workload"]).exposition().decode()
    types = re.findall(r"^# TYPE (nhi_\w+) (\w+)$", exposed, re.MULTILINE)
    names = {name for name, _ in types}
    for name, kind in types:
        if kind == "histogram":
            names |= {f"{name}_{part}" for part in ("bucket", "count", "sum")}
    return names


def test_every_metric_of_the_page_is_exposed_and_every_exposed_one_is_on_the_page() -> None:
    rows = table(section(PAGE, "Watching"))
    listed = {row[0].strip("`") for row in rows if row[0].startswith("`nhi_")}
    base = {re.sub(r"_(bucket|count|sum)$", "", name) for name in _series()}
    assert listed == base
    assert set(re.findall(r"\bnhi_[a-z_]+\b", prose_of(PAGE))) - {"nhi_fence", "nhi_broker"} <= _series()


def test_every_name_that_readyz_can_give_is_explained() -> None:
    sources = "".join(text_of(path) for path in tracked_files() if re.fullmatch(r"broker/.*\.py", path))
    names = set(re.findall(r'readiness\.add\(\s*"([^"]+)"', sources)) | {"drain"}
    rows = table(section(PAGE, "Watching"))
    explained = {row[0].strip("`") for row in rows if len(row) == 3 and row[0].startswith("`")}
    assert names == {name for name in explained if not name.startswith("nhi_")}


def test_every_event_worth_an_alarm_is_logged() -> None:
    events = set(re.findall(r"`([a-z_]+\.[a-z_]+)`", section(PAGE, "Logs")))
    assert events
    sources = "".join(
        text_of(path) for path in tracked_files() if re.match(r"(broker|inventory)/.*\.py", path)
    )
    assert {event for event in events if f'"{event}"' not in sources} == set()


def test_every_finding_of_the_page_is_one_that_is_opened() -> None:
    defined: set[str] = set()
    for path in tracked_files():
        if re.fullmatch(r"broker/service/\w+\.py", path):
            defined |= set(_findings(text_of(path)))
    listed = set(re.findall(r"`([a-z]+-[a-z-]+)`", section(PAGE, "Watching"))) - {"trace-id"}
    assert defined == listed


def _findings(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        match node:
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str(value)))
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.Constant(value=str(value)))
            ) if name.startswith("FINDING_"):
                yield value


def test_the_key_commands_of_the_page_run(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    store = FileKeyStore(path, SystemClock())
    before = (dict(store.audit_keys()), [key.kid for key in store.token_keys()], store.digest(b"x"))
    snippets = [block for block in blocks(PAGE) if block.language == "python"]
    assert len(snippets) == 2
    for snippet in snippets:
        assert snippet.text.count("/var/lib/nhi-broker/keys/keys.json") == 1
        source = snippet.text.replace("/var/lib/nhi-broker/keys/keys.json", str(path))
        exec(compile(source, PAGE, "exec"), {})  # noqa: S102  the page's own lines
    assert before[0].keys() < dict(store.audit_keys()).keys()
    assert not set(before[1]) & {key.kid for key in store.token_keys()}
    assert before[2] != store.digest(b"x")
