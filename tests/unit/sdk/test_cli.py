from __future__ import annotations

import json
import sys
from importlib import metadata
from typing import TYPE_CHECKING, Any

import pytest
import typer
from typer.testing import CliRunner

from nhi_sdk.cli import app as app_module
from nhi_sdk.cli import main
from nhi_sdk.cli.commands import tool_name
from nhi_sdk.cli.output import printable
from tests.unit.sdk.contract_server import ContractServer, catalog_item

if TYPE_CHECKING:
    from collections.abc import Callable

INTENT = ("--purpose", "churn-report", "--reason", "churn by plan")


class Nhi:
    """Runs the command in this process; `code`, `out` and `err` are of the last run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: str) -> int:
        self._monkeypatch.setattr(sys, "argv", ["nhi", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        self.out, self.err = self._capsys.readouterr()
        self.code = left.value.code or 0
        assert isinstance(self.code, int)
        return int(self.code)


@pytest.fixture
def nhi(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], environ: dict[str, str]) -> Nhi:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("COLUMNS", "200")
    return Nhi(monkeypatch, capsys)


def test_request_prints_no_secret_unless_asked(
    nhi: Nhi, server: ContractServer, leaks: Callable[[str], list[str]]
) -> None:
    assert nhi("request", "orders-db:read", *INTENT) == 0
    lease_id = server.alive()[0]
    assert lease_id in nhi.out
    assert "team-reads" in nhi.out
    assert not leaks(nhi.out + nhi.err)


def test_request_shows_the_secret_when_asked(nhi: Nhi, leaks: Callable[[str], list[str]]) -> None:
    assert nhi("request", "tool-api:call", *INTENT, "--show-secret") == 0
    assert leaks(nhi.out)


def test_request_json_is_what_the_broker_answered(nhi: Nhi, server: ContractServer) -> None:
    assert nhi("request", "orders-db:read", *INTENT, "--json") == 0
    document = json.loads(nhi.out)
    assert document["lease_id"] in server.leases
    assert document["credential"]["kind"] == "postgresql_login"
    assert document["credential"]["password"] == server.passwords[0]
    assert document["expires_at"] == server.leases[document["lease_id"]]["expires_at"]
    assert set(document) >= {"task_id", "state", "issued_at", "renewable", "revocability", "decision"}


def test_request_under_a_task_and_its_end(nhi: Nhi, server: ContractServer) -> None:
    assert nhi("task", "open", "--purpose", "p", "--resource", "orders-db", "--budget", "3") == 0
    task_id = nhi.out.strip()
    assert server.tasks[task_id]["budget_leases"] == 3
    assert nhi("request", "orders-db:read", "--task", task_id, "--reason", "r") == 0
    assert nhi("task", "show", task_id) == 0
    assert "1 of 3" in nhi.out
    assert nhi("task", "end", task_id) == 0
    assert "rolname_rows=0" in nhi.out
    assert server.alive() == []
    assert nhi("task", "end", task_id, "--json") == 0
    assert json.loads(nhi.out)["proven"] is True
    assert nhi("task", "show", task_id, "--json") == 0
    assert json.loads(nhi.out)["end_cause"] == "caller"


def test_an_end_that_is_not_proven_has_its_own_exit_code(nhi: Nhi, server: ContractServer) -> None:
    nhi("request", "orders-db:read", *INTENT)
    server.settle = False
    (lease_id,) = server.alive()
    assert nhi("revoke", lease_id, "--wait", "0") == 8
    assert "revoke_pending" in nhi.out
    assert nhi("task", "end", server.leases[lease_id]["task_id"]) == 8
    server.settle = True
    assert nhi("revoke", lease_id, "--json") == 0
    assert json.loads(nhi.out)["state"] == "revoked"


def test_catalog_and_whoami(nhi: Nhi, server: ContractServer) -> None:
    assert nhi("catalog") == 0
    assert "orders-db:read" in nhi.out
    assert nhi("catalog", "--json") == 0
    assert json.loads(nhi.out)[0]["ttl_seconds_max"] == 900
    assert nhi("whoami", "--json") == 0
    document = json.loads(nhi.out)
    assert document["identity"] == "spiffe://example.test/agent/churn"
    assert document["accepted"] is True
    server.tokens.clear()
    assert nhi("whoami") == 4
    assert "spiffe://example.test/agent/churn" in nhi.out
    assert "No valid SVID" in nhi.err


@pytest.mark.parametrize(
    ("status", "code", "exit_code"),
    [
        (403, "denied", 3),
        (401, "unauthenticated", 4),
        (404, "not-found", 5),
        (409, "task-closed", 6),
        (429, "rate-limited", 7),
        (503, "ledger-unavailable", 7),
        (422, "invalid-input", 2),
        (500, "internal", 1),
    ],
)
def test_each_kind_of_refusal_has_its_exit_code(
    nhi: Nhi, server: ContractServer, status: int, code: str, exit_code: int
) -> None:
    decision = {"id": "dec_x", "policy_ids": ["a-policy"], "policy_hash": ""}
    errors = [{"field": "purpose", "message": "must be a word"}]
    server.refuse(
        status, code, "Because \x1b[31mred\u202e.", decision=decision, errors=errors, lease_id="lse_x"
    )
    assert nhi("catalog") == exit_code
    assert nhi.out == ""
    assert "Because \\x1b[31mred\\u202e." in nhi.err
    for told in ("a-policy", "dec_x", "lse_x", "purpose: must be a word", "trace"):
        assert told in nhi.err
    assert "\x1b" not in nhi.err
    assert "Traceback" not in nhi.err


def test_a_missing_variable_is_a_usage_error(nhi: Nhi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NHI_BROKER_URL")
    assert nhi("catalog") == 2
    assert nhi.err.startswith("nhi: NHI_BROKER_URL is not set")


def test_no_broker_is_said_without_a_traceback(nhi: Nhi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NHI_BROKER_URL", "https://127.0.0.1:1")
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    assert nhi("catalog") == 7
    assert "is it running" in nhi.err


@pytest.mark.parametrize("what", ["orders-db", ":read", "orders-db:", ""])
def test_a_resource_without_action_is_a_usage_error(nhi: Nhi, server: ContractServer, what: str) -> None:
    assert nhi("request", what, *INTENT) == 2
    assert "RESOURCE:ACTION" in nhi.err
    assert server.seen == []


@pytest.mark.parametrize("extra", [(), ("--purpose", "p", "--task", "tsk_x")])
def test_a_request_needs_either_a_task_or_a_purpose(nhi: Nhi, extra: tuple[str, ...]) -> None:
    assert nhi("request", "orders-db:read", "--reason", "r", *extra) == 2
    assert "--task" in nhi.err


def test_what_the_broker_stored_cannot_act_on_the_terminal(nhi: Nhi, server: ContractServer) -> None:
    nasty = "\x1b]0;owned\x07\x9b2J\u202egnp[/bold red]\n\u2028"
    server.catalog = [catalog_item("orders-db", "read", title=nasty, owner=nasty)]
    assert nhi("catalog") == 0
    for character in "\x1b\x07\x9b\u202e\u2028":
        assert character not in nhi.out
    assert "[/bold red]" in nhi.out
    assert nhi("catalog", "--json") == 0
    assert nhi.out.isascii()
    assert json.loads(nhi.out)[0]["title"] == nasty


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ünïcode €", "plain ünïcode €"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\r\nb\tc", "a\\x0d\\x0ab\\x09c"),
        ("\x7f\x9b", "\\x7f\\x9b"),
        ("\u202e\u2066\u200b\ufeff", "\\u202e\\u2066\\u200b\\ufeff"),
        ("\ud800", "\\ud800"),
        ("\U000e0001", "\\U000e0001"),
    ],
)
def test_printable_escapes_what_could_act_on_a_terminal(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize(
    ("program", "tool"), [("psql", "psql"), ("my tool!", "my-tool"), ("[", "command"), ("x" * 300, "x" * 128)]
)
def test_a_program_is_named_as_a_word_the_broker_takes(program: str, tool: str) -> None:
    assert tool_name(program) == tool


class Entry:
    def __init__(self, name: str, register: Any) -> None:
        self.name = self.value = name
        self._register = register

    def load(self) -> Any:
        if isinstance(self._register, Exception):
            raise self._register
        return self._register


def test_entry_points_add_commands_and_a_broken_one_takes_nothing_away(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def register(app: typer.Typer) -> None:
        app.command("hello")(lambda: typer.echo("hello"))

    found = [Entry("good", register), Entry("bad", ImportError("no \x1b module"))]
    monkeypatch.setattr(metadata, "entry_points", lambda *, group: found if group == "nhi.commands" else [])
    app = app_module.build_app()
    assert CliRunner().invoke(app, ["hello"]).output == "hello\n"
    assert CliRunner().invoke(app, ["catalog", "--help"]).exit_code == 0
    assert "commands of bad are not available: ImportError: no \\x1b module" in capsys.readouterr().err


def test_a_server_may_be_installed_or_not_the_client_commands_are_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metadata, "entry_points", lambda **_group: [])
    text = CliRunner().invoke(app_module.build_app(), ["--help"]).output
    for command in ("request", "revoke", "catalog", "whoami", "exec", "task"):
        assert command in text


def test_an_unexpected_error_shows_no_local_variables() -> None:
    assert app_module.build_app().pretty_exceptions_enable is False


def test_version(nhi: Nhi) -> None:
    assert nhi("--version") == 0
    assert nhi.out.startswith("nhi ")


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra_the_command_says_how_to_install_it(
    nhi: Nhi, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    for name in [one for one in sys.modules if one.startswith("nhi_sdk.cli.")]:
        monkeypatch.delitem(sys.modules, name)
    for name in [one for one in sys.modules if one.partition(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Absent(missing), *sys.meta_path])
    assert nhi("catalog") == 2
    assert "pip install 'nhi-sdk[cli]'" in nhi.err


class _Absent:
    def __init__(self, name: str) -> None:
        self._name = name

    def find_spec(self, name: str, _path: Any = None, _target: Any = None) -> None:
        if name == self._name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
