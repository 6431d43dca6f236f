"""`nhi` as a person uses it: real processes, a real broker, a real PostgreSQL."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import ssl
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from broker.dev.environment import DevParts, write_settings
from broker.dev.postgres_binaries import PostgresMissing, find_postgres
from broker.dev.postgres_home import NoServerAccount, server_account
from tests.support.parts import part_missing
from tests.support.pki import Authority, der

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

CHURN = "spiffe://dev.nhi.internal/agent/churn-report"
NHI = (sys.executable, "-m", "nhi_sdk")
SECONDS = 60

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("cli")]


@dataclass
class Ran:
    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


def run(*words: str, environ: dict[str, str] | None = None) -> Ran:
    done = subprocess.run(
        [*NHI, *words],
        env={**os.environ, "COLUMNS": "200", **(environ or {})},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


def processes_of_session(session: int) -> list[str]:
    """Command lines of what still runs in a session: a child that became a group leader is still in it."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(stat.with_name("cmdline").read_text().replace("\0", " "))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


@contextmanager
def started(*words: str, home: Path) -> Iterator[subprocess.Popen[str]]:
    """A command in a session of its own, with its temporary files in a directory of its own."""
    home.chmod(0o711)
    process = subprocess.Popen(
        [*NHI, *words],
        env={**os.environ, "TMPDIR": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        with process:
            yield process
            process.kill()
    finally:
        process.kill()


def leaves_nothing(process: subprocess.Popen[str], home: Path) -> None:
    assert processes_of_session(process.pid) == []
    assert list(home.iterdir()) == []


@pytest.fixture(scope="module", autouse=True)
def _parts() -> None:
    try:
        find_postgres()
        server_account()
    except (PostgresMissing, NoServerAccount) as missing:
        part_missing(str(missing))


# --- nhi demo ------------------------------------------------------------------------------------


def test_demo_as_json_is_one_object_that_held_and_leaves_nothing(short_dir: Path) -> None:
    with started("demo", "--json", home=short_dir) as process:
        out, err = process.communicate(timeout=SECONDS)
    document = json.loads(out)
    assert process.returncode == 0, err
    assert document["ok"] is True
    assert len(document["lease_ids"]) == 2
    assert document["milliseconds"].keys() >= {"request", "first_use", "task_end_to_proven_dead"}
    assert set(document["after_the_end"].values()) == {True}
    assert document["audit"]["intact"] is True
    leaves_nothing(process, short_dir)


@pytest.mark.parametrize(
    ("until", "number"),
    [("Starting real parts", signal.SIGTERM), ("An agent works", signal.SIGINT), ("asked to", signal.SIGINT)],
)
def test_an_interrupted_demo_leaves_nothing(short_dir: Path, until: str, number: signal.Signals) -> None:
    with started("demo", home=short_dir) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if until in line:
                break
        process.send_signal(number)
        process.communicate(timeout=SECONDS)
    assert process.returncode == 128 + number
    leaves_nothing(process, short_dir)


# --- nhi dev, and everything that talks to it ----------------------------------------------------


@dataclass
class Dev:
    process: subprocess.Popen[str]
    environ: dict[str, str]
    curls: list[str]
    directory: Path

    def nhi(self, *words: str, **more: str) -> Ran:
        return run(*words, environ={**self.environ, **more})

    def request(self) -> dict[str, Any]:
        asked = ("request", "orders-db:read", "--purpose", "churn-report", "--reason", "e2e", "--json")
        answer = self.nhi(*asked)
        assert answer.code == 0, answer.err
        document: dict[str, Any] = answer.json()
        return document


def read_instructions(process: subprocess.Popen[str]) -> tuple[dict[str, str], list[str], Path]:
    environ: dict[str, str] = {}
    curls: list[str] = []
    directory = Path()
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("export "):
            name, _, value = shlex.split(line)[1].partition("=")
            environ[name] = value
        if found := re.match(r"# Ready\. State: (\S+)\. ", line):
            directory = Path(found[1])
        if line.startswith("curl "):
            curls.append(line)
            if line.rstrip().endswith("/credentials/request"):
                return environ, curls, directory
    assert process.stderr is not None
    pytest.fail(f"nhi dev ended: {process.stderr.read()}")


@pytest.fixture(scope="module")
def dev() -> Iterator[Dev]:
    home = Path(tempfile.mkdtemp(prefix="nhi-e2e-", dir="/tmp"))
    with started("dev", "--temporary", "--port", "0", home=home) as process:
        environ, curls, directory = read_instructions(process)
        yield Dev(process, environ, curls, directory)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, err
    leaves_nothing(process, home)
    home.rmdir()


def test_the_curl_lines_that_dev_prints_work_as_pasted(dev: Dev) -> None:
    for line, expected in zip(dev.curls, ('"items"', '"postgresql_login"'), strict=True):
        done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True)
        assert expected in done.stdout
    header = dev.directory / "agent" / "authorization.header"
    assert header.stat().st_mode & 0o077 == 0
    assert "eyJ" not in " ".join(dev.curls)


def test_the_variables_that_dev_prints_make_an_agent_and_an_operator(dev: Dev) -> None:
    who = dev.nhi("whoami", "--json").json()
    assert (who["identity"], who["accepted"]) == (CHURN, True)
    status = dev.nhi("status", "--json")
    assert status.code == 0
    assert status.json()["readiness"]["ready"] is True
    doctor = dev.nhi("doctor")
    assert doctor.code == 0, doctor.out
    assert CHURN in doctor.out
    assert "everything that was looked at is right" in doctor.out


@pytest.mark.parametrize(
    ("changed", "seen", "mend"),
    [
        ({"NHI_AUDIENCE": ""}, "NHI_AUDIENCE is not set", "nhi dev prints"),
        ({"NHI_AUDIENCE": "spiffe://elsewhere/broker"}, "No valid SVID", "dev.nhi.internal/broker"),
        ({"SPIFFE_ENDPOINT_SOCKET": "unix:///no/such.sock"}, "does not exist", "SPIFFE_ENDPOINT_SOCKET"),
        ({"NHI_SPIFFE_ID": "spiffe://dev.nhi.internal/other"}, "it offers", "NHI_SPIFFE_ID"),
        ({"NHI_BROKER_URL": "https://127.0.0.1:1"}, "nobody answers", "NHI_BROKER_URL"),
        ({"NHI_BROKER_URL": "http://127.0.0.1:1"}, "not an https address", "NHI_BROKER_URL"),
        ({"NHI_CA_FILE": "/etc/hostname"}, "no PEM certificate", "NHI_CA_FILE"),
        ({"NHI_OPERATOR_SOCKET": "/etc/hostname"}, "is not a socket", "operator.socket"),
    ],
)
def test_doctor_finds_what_is_wrong_and_says_the_mend(
    dev: Dev, changed: dict[str, str], seen: str, mend: str
) -> None:
    found = dev.nhi("doctor", "--json", **changed)
    assert found.code == 1
    wrong = [one for one in found.json()["findings"] if one["verdict"] == "wrong"]
    assert any(seen in one["seen"] and mend in one["mend"] for one in wrong), wrong


def test_doctor_tells_an_untrusted_certificate(dev: Dev, tmp_path: Path) -> None:
    foreign = tmp_path / "ca.pem"
    foreign.write_text(ssl.DER_cert_to_PEM_cert(der(Authority.root("elsewhere.example").certificate)))
    findings = dev.nhi("doctor", "--json", NHI_CA_FILE=str(foreign)).json()["findings"]
    (certificate,) = [one for one in findings if one["name"] == "broker's certificate"]
    assert certificate["verdict"] == "wrong"
    assert "not trusted" in certificate["seen"]


def test_an_operator_follows_a_lease_from_list_to_kill_and_back(dev: Dev) -> None:
    lease_id = dev.request()["lease_id"]
    live = dev.nhi("leases", "list", "--live", "--json").json()["items"]
    assert lease_id in [one["lease_id"] for one in live]
    shown = dev.nhi("leases", "show", lease_id, "--json").json()
    assert (shown["identity"], shown["state"]) == (CHURN, "active")
    refused = dev.nhi("kill", "--identity", CHURN, "--reason", "e2e")
    assert refused.code == 2
    assert "--yes" in refused.err
    killed = dev.nhi("kill", "--identity", CHURN, "--reason", "e2e", "--yes", "--json")
    assert killed.code == 0, killed.err
    assert killed.json()["tasks_ended"] + killed.json()["leases_moved"] >= 1
    denied = dev.nhi("request", "orders-db:read", "--purpose", "churn-report", "--reason", "again")
    assert denied.code == 3
    assert "killed" in denied.err
    assert CHURN in dev.nhi("status").err
    lifted = dev.nhi("kill", "--identity", CHURN, "--reason", "e2e is over", "--lift")
    assert lifted.code == 0, lifted.err
    assert dev.request()["state"] == "active"
    ended = dev.nhi("revoke", lease_id, "--wait", "10", "--json").json()
    assert (ended["state"], ended["cause"]) == ("revoked", "kill")
    retried = dev.nhi("leases", "retry", lease_id)
    assert retried.code == 2
    assert "revoked" in retried.err


def test_an_identity_is_suspended_and_resumed(dev: Dev) -> None:
    dev.request()
    assert dev.nhi("inventory", "suspend", CHURN, "--reason", "e2e", "--yes").code == 0
    assert dev.nhi("inventory", "show", CHURN, "--json").json()["lifecycle"] == "suspended"
    assert dev.nhi("catalog").code == 3
    assert dev.nhi("inventory", "resume", CHURN, "--reason", "e2e is over").code == 0
    dev.request()
    listed = dev.nhi("inventory", "list", CHURN, "--json").json()["items"]
    assert {one["lifecycle"] for one in listed if one["spiffe_id"] == CHURN} == {"active"}
    owned = dev.nhi("inventory", "set-owner", CHURN, "e2e-team", "--json").json()
    assert owned["owner"] == "e2e-team"
    assert dev.nhi("findings", "--json").json()["more"] is False
    assert dev.nhi("scan", "--json").json()["failed"] == []


def test_an_export_verifies_with_public_keys_alone_and_not_after_an_edit(dev: Dev, tmp_path: Path) -> None:
    log, keys = tmp_path / "log.jsonl", tmp_path / "keys.json"
    dev.request()
    assert dev.nhi("audit", "keys", "--output", str(keys)).code == 0
    assert dev.nhi("audit", "export", "--output", str(log)).code == 0
    intact = run("audit", "verify", "--export", str(log), "--keys", str(keys), "--json")
    assert intact.code == 0, intact.out
    assert intact.json()["records"] > 5
    log.write_bytes(log.read_bytes().replace(b"orders-db", b"orders-dB", 1))
    edited = run("audit", "verify", "--export", str(log), "--keys", str(keys))
    assert edited.code == 1
    assert "NOT INTACT" in edited.out
    assert "edited" in edited.out
    part = dev.nhi("audit", "export", "--identity", CHURN, "--from", "2020-01-01")
    assert part.code == 0
    assert json.loads(part.out.splitlines()[0])["complete"] is False


def test_a_running_broker_proves_a_backend(dev: Dev) -> None:
    proof = dev.nhi("adapter", "prove", "orders-db", "--action", "write", "--json")
    assert proof.code == 0, proof.err
    document = proof.json()
    assert document["proven"] is True
    shown = dev.nhi("leases", "show", document["lease_id"], "--json").json()
    assert shown["state"] == "revoked"
    assert dev.nhi("adapter", "prove", "reports-api").code == 2


# --- nhi serve, and what works while it does not run ----------------------------------------------


@pytest.fixture
async def parts() -> AsyncIterator[DevParts]:
    async with DevParts() as around:
        write_settings(around.settings, around.directory / "nhi.toml")
        yield around


@contextmanager
def served(config: Path, home: Path) -> Iterator[str]:
    """A broker that is stopped in good order; gives its line of addresses."""
    with started("serve", "--config", str(config), home=home) as process:
        assert process.stdout is not None
        yield process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, err


async def test_serve_says_when_it_is_ready_and_stops_in_good_order(parts: DevParts, short_dir: Path) -> None:
    config = parts.directory / "nhi.toml"
    with served(config, short_dir) as line:
        assert line == (
            f"nhi serve: ready: workload https://127.0.0.1:{parts.settings.workload.port}, "
            f"operator unix:{parts.operator_socket}, ops http://127.0.0.1:{parts.settings.ops.port}\n"
        )
        second = run("serve", "--config", str(config))
        assert second.code == 1
        assert "serves one process" in second.err
        assert run("status", "--socket", str(parts.operator_socket)).code == 0
    assert not parts.operator_socket.exists()
    gone = run("status", "--socket", str(parts.operator_socket))
    assert gone.code == 7
    assert "does not exist" in gone.err


def files_of(parts: DevParts) -> list[str]:
    # SQLite makes its index of a write-ahead log for readers, too.
    names = (str(path) for path in parts.directory.rglob("*") if "/td/" not in str(path))
    return sorted(name for name in names if not name.endswith(("-shm", "-wal")))


async def test_a_check_names_everything_that_is_wrong_at_once(parts: DevParts) -> None:
    config = parts.directory / "nhi.toml"
    before = files_of(parts)
    right = run("serve", "--check", "--config", str(config))
    assert right.code == 0, right.out
    assert "nhi serve would start" in right.out
    assert files_of(parts) == before
    text = config.read_text()
    text = text.replace('mode = "development"', 'mode = "production"')
    text = text.replace(
        f'"{parts.settings.audit.copy_directory}"', f'"{parts.settings.ledger.path.parent}/copy"'
    )
    text = text.replace("broker_user =", "broker_usr =")
    text = re.sub(r'workload_api_socket = ".*"', 'workload_api_socket = "unix:///no/such.sock"', text)
    text += '[limits]\nrequire_owner = false\n[[backends]]\nkind = "nonsense"\nname = "more"\n'
    config.write_text(text)
    wrong = run("serve", "--check", "--config", str(config))
    assert wrong.code == 1
    for expected in ("audit.copy_directory", "require_owner", "broker_usr", "such.sock", "'nonsense'"):
        assert expected in wrong.out, wrong.out


async def test_a_backend_is_proven_through_the_ledger_of_a_broker_that_does_not_run(parts: DevParts) -> None:
    config = str(parts.directory / "nhi.toml")
    proof = run("adapter", "prove", "orders-db", "--config", config, "--json")
    assert proof.code == 0, proof.err
    document = proof.json()
    assert document["proven"] is True
    assert [one["name"] for one in document["steps"]] == [
        "minted",
        "it works",
        "revoked and verified dead",
        "it no longer works",
        "revoking it again is harmless",
    ]
    looked = run("fsck", "--config", config, "--json")
    assert looked.code == 0, looked.out
    assert looked.json()["audit"]["intact"] is True
    keys = parts.directory / "nowhere.json"
    assert run("audit", "verify", "--ledger", str(parts.settings.ledger.path), "--keys", str(keys)).code == 2


async def test_prove_names_a_missing_right_and_mints_nothing(parts: DevParts) -> None:
    config = str(parts.directory / "nhi.toml")
    connection = await parts.postgres.connect("postgres")
    await connection.execute("DROP DATABASE nhi_fence WITH (FORCE)")
    await connection.close()
    proof = run("adapter", "prove", "orders-db", "--config", config)
    assert proof.code == 1
    assert "missing" in proof.err
    assert "nothing was minted" in proof.out


async def test_install_prints_the_script_and_connects_to_nothing(parts: DevParts) -> None:
    config = str(parts.directory / "nhi.toml")
    printed = run("adapter", "postgres", "install", "orders-postgres", "--config", config)
    assert printed.code == 0, printed.err
    assert "nhi.mint" in printed.out
    assert '\\connect "orders"' in printed.out
    password = (parts.directory / "broker-password").read_text()
    with_password = run(
        "adapter", "postgres", "install", "orders-postgres", "--config", config, "--set-password"
    )
    assert "SCRAM-SHA-256$" in with_password.out
    assert password not in with_password.out
    unknown = run("adapter", "postgres", "install", "elsewhere", "--config", config)
    assert unknown.code == 5
    assert "orders-postgres" in unknown.err
