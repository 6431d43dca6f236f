"""What a start needs: fast help, settings errors in words, checks that start nothing."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from broker.api.listeners import ListenerError
from broker.app import StartError
from broker.cli import tables
from broker.cli.start_errors import problems_of
from broker.core.errors import LedgerUnavailable
from broker.keys.key_file import KeyStoreError
from inventory.store.engine import LedgerInUseError

if TYPE_CHECKING:
    from tests.unit.cli.conftest import Nhi

POLICIES = Path(__file__).parents[3] / "policies"

HEAVY = (
    "fastapi", "starlette", "uvicorn", "uvloop", "sqlalchemy", "sqlmodel", "alembic", "asyncpg", "cedarpy",
    "cryptography", "grpc", "pydantic", "psycopg", "prometheus_client", "apscheduler", "aiohttp", "structlog",
    "broker.app", "broker.settings", "broker.dev", "inventory", "adapters",
)  # fmt: skip


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from nhi_sdk.cli.app import build_app\n"
        "app = build_app()\n"
        "import typer.main\n"
        "assert 'serve' in typer.main.get_command(app).commands\n"
        f"print(sorted(set(sys.modules) & set({HEAVY!r})))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (StartError(["one", "two"]), ("one", "two")),
        (LedgerUnavailable("The ledger cannot be opened."), ("The ledger cannot be opened.",)),
        (ListenerError("no port"), ("no port",)),
        (KeyStoreError("no keys"), ("no keys",)),
        (LedgerInUseError("taken"), ("taken",)),
        (PermissionError(13, "Permission denied", "/x"), ("/x: Permission denied",)),
        (RuntimeError("a defect"), None),
    ],
)
def test_what_a_person_can_mend_is_told_from_a_defect(
    error: Exception, expected: tuple[str, ...] | None
) -> None:
    assert problems_of(error) == expected


def test_a_settings_file_that_is_none_is_explained(nhi: Nhi, tmp_path: Path) -> None:
    assert nhi("serve", "--config", tmp_path / "absent.toml") == 1
    assert "cannot be read" in nhi.err
    config = tmp_path / "nhi.toml"
    config.write_text('mode = "development"\nnonsense = 1\n')
    assert nhi("serve", "--check", "--config", config) == 1
    assert "nonsense" in nhi.out
    assert "policy" in nhi.out
    assert "The rest was not looked at" in nhi.out
    assert nhi("fsck", "--config", config) == 1
    assert nhi("serve", "--config", config, "--log-level", "LOUD") == 2


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Settings that are right but for what is not there: no Workload API, no ledger, no keys."""
    path = tmp_path / "nhi.toml"
    path.write_text(
        f"""
        [ledger]
        path = "{tmp_path}/ledger/ledger.db"
        [keys]
        path = "{tmp_path}/keys/keys.json"
        [audit]
        copy_directory = "{tmp_path}/copies"
        [policy]
        directory = "{POLICIES}"
        [identity]
        workload_api_socket = "unix://{tmp_path}/none.sock"
        audience = "spiffe://dev.nhi.internal/broker"
        [workload]
        port = 0
        issuer = "https://localhost:8443"
        [operator]
        socket = "{tmp_path}/run/operator.sock"
        [ops]
        port = 0
        [[backends]]
        kind = "jwt_issuer"
        name = "tokens"
        """
    )
    return path


def test_a_check_names_backends_that_the_catalog_wants_and_starts_nothing(
    nhi: Nhi, config: Path, tmp_path: Path
) -> None:
    assert nhi("serve", "--check", "--config", config) == 1
    assert "there is no backend named 'orders-postgres'" in nhi.out
    assert "none.sock does not exist" in nhi.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nhi.toml"]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ("ledger.mkdir(mode=0o755); ledger.chmod(0o755)", "chmod 700"),
        ("ledger.mkdir(0o700); (ledger / 'ledger.db').write_text('x' * 9999)", "cannot be read as a ledger"),
        ("keys.mkdir(0o700); (keys / 'keys.json').write_text('{}')", "keys.path"),
        ("run.mkdir(); run.chmod(0o777)", "chmod go-w"),
        ("ledger.write_text('')", "is not a directory"),
    ],
)
def test_a_check_looks_at_files_and_modes(
    nhi: Nhi, config: Path, tmp_path: Path, damage: str, expected: str
) -> None:
    places = {name: tmp_path / name for name in ("ledger", "keys", "run")}
    exec(damage, places)  # noqa: S102  the test's own words
    assert nhi("serve", "--check", "--config", config) == 1
    assert expected in nhi.out


def test_fsck_says_where_there_is_no_ledger(nhi: Nhi, config: Path) -> None:
    assert nhi("fsck", "--config", config) == 5
    assert "there is no ledger" in nhi.err


def test_prove_without_a_broker_and_without_settings_says_what_it_needs(nhi: Nhi) -> None:
    assert nhi("adapter", "prove", "orders-db") == 2
    assert "--socket" in nhi.err


# --- how times read ------------------------------------------------------------------------------

NOW = datetime(2026, 11, 20, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("moment", "expected"),
    [
        ("2026-11-20T12:04:59.000Z", "in 4m59s"),
        ("2026-11-20T11:59:48.000Z", "12s ago"),
        ("2026-11-20T12:00:00.000Z", "in 0s"),
        ("2026-11-22T15:00:00.000Z", "in 2d3h"),
        (None, "-"),
        ("soon", "soon"),
    ],
)
def test_a_time_reads_as_a_distance(moment: object, expected: str) -> None:
    assert tables.when(moment, NOW) == expected


def test_a_table_in_a_pipe_keeps_each_row_on_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    tables.show(("ID", "TEXT"), [("lse_" + "a" * 16, "word " * 100), ("x", "\x1b[2J")])
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 3
    assert "\x1b" not in out
