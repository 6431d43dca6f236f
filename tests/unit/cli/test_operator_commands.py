"""The operator commands against a fake of the broker's operator socket."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.cli.conftest import Nhi, OperatorServer

LEASE = {
    "lease_id": "lse_aaaaaaaaaaaaaaaa",
    "task_id": None,
    "resource": "orders-db",
    "action": "read",
    "identity": "spiffe://example.test/agent",
    "state": "revoke_pending",
    "stuck": True,
    "cause": "kill",
    "expires_at": "2020-01-01T00:00:00.000Z",
    "next_try_at": "2999-01-01T00:00:00.000Z",
    "last_error": "refused \x1b[31mred\u202e",
}
STATUS = {
    "instance": "abcdef",
    "version": "0.1.0",
    "policy_hash": "00",
    "live": 3,
    "stuck": 1,
    "backends": [{"name": "orders", "kind": "postgres", "live": 3, "stuck": 1, "breaker": "open"}],
    "ledger": {"waiting": 0, "failure": None, "audit_seq": 9},
    "readiness": {"ready": True, "problems": {}},
}
EMPTY = {"items": [], "next": None}


def last(operator: OperatorServer) -> tuple[str, str, dict[str, str], object]:
    return operator.asked[-1]


# --- the way to the socket -----------------------------------------------------------------------


def test_without_a_socket_it_says_how_to_give_one(nhi: Nhi) -> None:
    assert nhi("status") == 2
    assert "--socket" in nhi.err
    assert "NHI_OPERATOR_SOCKET" in nhi.err


def test_a_socket_that_is_not_there_or_not_listening_is_told_apart(nhi: Nhi, short_dir: Path) -> None:
    assert nhi("status", "--socket", short_dir / "none.sock") == 7
    assert "does not exist" in nhi.err
    stale = short_dir / "stale.sock"
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(stale))
    assert nhi("status", "--socket", stale) == 7
    assert "nobody listens" in nhi.err
    assert nhi("status", "--socket", short_dir) == 7
    assert "is not a socket" in nhi.err


@pytest.mark.parametrize(
    ("status", "code", "exit_code"),
    [(422, "invalid-input", 2), (403, "identity-refused", 3), (404, "not-found", 5), (503, "overloaded", 7)],
)
def test_what_the_broker_refuses_becomes_an_exit_code(
    nhi: Nhi, operator: OperatorServer, status: int, code: str, exit_code: int
) -> None:
    operator.refuse("GET", "/leases/lse_x", status, code, "Because \x1b[31mred\u202e.")
    assert nhi("leases", "show", "lse_x") == exit_code
    assert "Because \\x1b[31mred\\u202e." in nhi.err
    assert "\x1b" not in nhi.err
    assert nhi.out == ""


def test_what_is_no_broker_is_told_apart(nhi: Nhi, operator: OperatorServer) -> None:
    operator.answer("GET", "/status", b"<html>", status=500)
    assert nhi("status") == 7
    assert "no broker's operator socket" in nhi.err
    operator.answers.clear()
    operator.answer("GET", "/status", b"<html>")
    assert nhi("status") == 7
    assert "no broker's operator socket" in nhi.err


def test_a_path_is_never_made_of_an_argument(nhi: Nhi, operator: OperatorServer) -> None:
    nhi("leases", "show", "../status?x=1")
    assert last(operator)[1] == "/leases/..%2Fstatus%3Fx%3D1"


# --- kill ----------------------------------------------------------------------------------------


def test_a_kill_names_exactly_one_scope(nhi: Nhi, operator: OperatorServer) -> None:
    assert nhi("kill", "--reason", "r", "--yes") == 2
    assert nhi("kill", "--task", "t", "--owner", "o", "--reason", "r", "--yes") == 2
    assert "exactly one" in nhi.err
    assert operator.asked == []


def test_a_kill_is_confirmed_or_not_done(nhi: Nhi, operator: OperatorServer) -> None:
    operator.answer("POST", "/kill", {"scope": "owner", "value": "o", "tasks_ended": 1, "leases_moved": 2})
    assert nhi("kill", "--owner", "o", "--reason", "r") == 2
    assert "--yes" in nhi.err
    assert operator.asked == []
    assert nhi("kill", "--owner", "o", "--reason", "theft", "--yes") == 0
    assert last(operator) == ("POST", "/kill", {}, {"owner": "o", "reason": "theft"})
    assert "leases_moved" in nhi.out


def test_a_kill_is_lifted_unless_it_was_a_tasks(nhi: Nhi, operator: OperatorServer) -> None:
    operator.answer("POST", "/kill/lift", {"scope": "resource", "value": "orders-db"})
    assert nhi("kill", "--resource", "orders-db", "--reason", "over", "--lift", "--json") == 0
    assert last(operator) == ("POST", "/kill/lift", {}, {"resource": "orders-db", "reason": "over"})
    assert nhi.json()["value"] == "orders-db"
    assert nhi("kill", "--task", "tsk_x", "--reason", "r", "--lift") == 2
    assert len(operator.asked) == 1


# --- lists ---------------------------------------------------------------------------------------


def test_pages_are_followed_up_to_the_limit(nhi: Nhi, operator: OperatorServer) -> None:
    one = [{**LEASE, "lease_id": f"lse_{number}"} for number in range(5)]
    operator.answer("GET", "/leases", {"items": one[:2], "next": "c1"})
    operator.answer("GET", "/leases", {"items": one[2:4], "next": "c2"})
    operator.answer("GET", "/leases", {"items": one[4:], "next": None})
    assert nhi("leases", "list", "--json") == 0
    assert [each["lease_id"] for each in nhi.json()["items"]] == [each["lease_id"] for each in one]
    assert [query.get("cursor") for _, _, query, _ in operator.asked] == [None, "c1", "c2"]
    operator.answers.clear()
    operator.answer("GET", "/leases", {"items": one[:2], "next": "c1"})
    assert nhi("leases", "list", "--limit", "2") == 0
    assert "--limit takes more" in nhi.err


def test_stuck_leases_show_cause_and_next_try_harmlessly(nhi: Nhi, operator: OperatorServer) -> None:
    operator.answer("GET", "/leases", {"items": [LEASE], "next": None})
    assert nhi("leases", "list", "--stuck", "--state", "revoke_pending") == 0
    assert last(operator)[2] == {"stuck": "true", "state": "revoke_pending", "limit": "500"}
    (row,) = [line for line in nhi.out.splitlines() if "lse_aaaaaaaaaaaaaaaa" in line]
    assert "revoke_pending (stuck)" in row
    assert "kill" in row
    assert "refused \\x1b[31mred\\u202e" in row
    assert "\x1b" not in nhi.out


def test_live_leases_are_asked_for_by_state(nhi: Nhi, operator: OperatorServer) -> None:
    operator.answer("GET", "/leases", EMPTY)
    assert nhi("leases", "list", "--live") == 0
    states = {query["state"] for _, _, query, _ in operator.asked}
    assert states == {"intent", "prepared", "active", "revoke_pending", "verifying"}


def test_retry_and_abandon(nhi: Nhi, operator: OperatorServer) -> None:
    operator.answer("POST", "/leases/lse_a/retry", LEASE)
    operator.answer("POST", "/leases/lse_a/abandon", {**LEASE, "state": "abandoned"})
    assert nhi("leases", "retry", "lse_a") == 0
    assert nhi("leases", "abandon", "lse_a", "--reason", "host is gone") == 2
    assert nhi("leases", "abandon", "lse_a", "--reason", "host is gone", "--yes", "--json") == 0
    assert last(operator)[3] == {"reason": "host is gone"}
    assert nhi.json()["state"] == "abandoned"


def test_orphans_are_named(nhi: Nhi, operator: OperatorServer) -> None:
    known = {"spiffe_id": "spiffe://example.test/known", "owner": "mara", "orphan": False}
    orphan = {"spiffe_id": "spiffe://example.test/orphan", "owner": "", "orphan": True}
    operator.answer("GET", "/identities", {"items": [known, orphan], "next": None})
    assert nhi("inventory", "list", "spiffe://example.test/") == 0
    assert last(operator)[2]["q"] == "spiffe://example.test/"
    assert "nobody (orphan)" in nhi.out
    assert nhi("inventory", "list", "--orphans", "--json") == 0
    assert [one["spiffe_id"] for one in nhi.json()["items"]] == ["spiffe://example.test/orphan"]


def test_an_owner_is_set_without_touching_the_rest(nhi: Nhi, operator: OperatorServer) -> None:
    operator.answer("POST", "/identity/owner", {"spiffe_id": "spiffe://e.test/a", "owner": "mara"})
    assert nhi("inventory", "set-owner", "spiffe://e.test/a", "mara") == 0
    assert last(operator)[3] == {"spiffe_id": "spiffe://e.test/a", "owner": "mara"}


# --- status --------------------------------------------------------------------------------------


def test_status_exits_by_readiness_and_shows_what_is_killed(nhi: Nhi, operator: OperatorServer) -> None:
    kill = {"scope": "owner", "value": "mara", "at": "2020-01-01T00:00:00.000Z", "reason": "theft"}
    operator.answer("GET", "/status", STATUS)
    operator.answer("GET", "/kills", {"items": [kill], "next": None})
    assert nhi("status") == 0
    assert "mara" in nhi.err
    operator.answers[("GET", "/status")].clear()
    problems = {"ready": False, "problems": {"audit copy": "disk full"}}
    operator.answer("GET", "/status", {**STATUS, "readiness": problems})
    assert nhi("status") == 1
    assert "audit copy: disk full" in nhi.err
    assert nhi("status", "--json") == 1
    assert nhi.json()["kills"] == [kill]


def test_a_scan_that_could_not_look_everywhere_fails(nhi: Nhi, operator: OperatorServer) -> None:
    scanned = [{"backend": "orders", "seen": 1, "orphans": 0, "gone": 0}]
    operator.answer("POST", "/scan", {"scanned": scanned, "failed": ["other"]})
    assert nhi("scan") == 1
    assert "other could not be scanned" in nhi.err


# --- audit ---------------------------------------------------------------------------------------

HEADER = b'{"complete":true,"type":"header"}\n'
END = b'{"records":0,"type":"end"}\n'


def test_an_export_is_written_whole_or_not_at_all(nhi: Nhi, operator: OperatorServer, tmp_path: Path) -> None:
    output = tmp_path / "log.jsonl"
    operator.answer("GET", "/audit/export", HEADER)
    assert nhi("audit", "export", "--output", output) == 7
    assert "cut off" in nhi.err
    assert list(tmp_path.iterdir()) == []
    operator.answers.clear()
    operator.answer("GET", "/audit/export", HEADER + END)
    assert (
        nhi("audit", "export", "--output", output, "--lease", "lse_a", "--to", "2026-11-20T13:00:00+01:00")
        == 0
    )
    assert output.read_bytes() == HEADER + END
    assert output.stat().st_mode & 0o077 == 0
    assert last(operator)[2] == {"lease": "lse_a", "to": "2026-11-20T12:00:00.000Z"}
    assert nhi("audit", "export", "--from", "yesterday") == 2
    assert "is not a time" in nhi.err


def test_a_refused_export_leaves_no_file(nhi: Nhi, operator: OperatorServer, tmp_path: Path) -> None:
    operator.refuse("GET", "/audit/export", 503, "overloaded", "Try later.")
    assert nhi("audit", "export", "--output", tmp_path / "log.jsonl") == 7
    assert list(tmp_path.iterdir()) == []


def test_public_keys_are_fetched_as_a_file_that_verification_reads(
    nhi: Nhi, operator: OperatorServer, tmp_path: Path
) -> None:
    from inventory.audit.public_keys import read_public_keys  # noqa: PLC0415  used here alone

    key = "dGVzdGtleWJ5dGVzdGtleWJ5dGVzdGtleWJ5dGVzdHM="
    operator.answer("GET", "/audit/keys", {"origin": "abcdef", "keys": {"k1": key}})
    assert nhi("audit", "keys", "-o", tmp_path / "keys.json") == 0
    assert read_public_keys(tmp_path / "keys.json").origin == "abcdef"
    assert nhi("audit", "keys") == 0
    assert json.loads(nhi.out)["origin"] == "abcdef"


def test_verify_wants_one_source_and_keys_for_a_ledger(nhi: Nhi, tmp_path: Path) -> None:
    assert nhi("audit", "verify", "--keys", tmp_path / "k") == 2
    assert nhi("audit", "verify", "--ledger", tmp_path / "l") == 2
    assert "does not vouch for itself" in nhi.err
    assert nhi("audit", "verify", "--ledger", tmp_path / "l", "--keys", tmp_path / "k") == 2
    assert "cannot read the public keys file" in nhi.err


# --- prove ---------------------------------------------------------------------------------------


def test_prove_asks_the_running_broker_and_names_what_is_missing(nhi: Nhi, operator: OperatorServer) -> None:
    answer = {
        "backend": "orders",
        "resource": "orders-db",
        "action": "read",
        "proven": False,
        "lease_id": None,
        "checks": [{"name": "may end sessions", "ok": False, "remedy": "GRANT pg_signal_backend"}],
        "steps": [],
    }
    operator.answer("POST", "/adapters/prove", answer)
    assert nhi("adapter", "prove", "orders-db") == 1
    assert last(operator)[3] == {"resource": "orders-db"}
    assert "missing: may end sessions: GRANT pg_signal_backend" in nhi.err
    assert "nothing was minted" in nhi.out
    assert nhi("adapter", "prove", "orders-db", "--action", "write", "--json") == 1
    assert last(operator)[3] == {"resource": "orders-db", "action": "write"}
