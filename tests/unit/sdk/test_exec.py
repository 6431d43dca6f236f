"""``nhi exec``: the credential is dead however the child, or nhi itself, comes to its end."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.unit.sdk.contract_server import ContractServer, Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

EXEC = [sys.executable, "-m", "nhi_sdk", "exec", "--purpose", "churn-report", "--reason", "churn by plan"]

# Says it is there, then waits for signals; each one caught is said, SIGUSR2 ends it.
LISTENER = """
import signal, sys
ends = {getattr(signal, name) for name in sys.argv[1:]}
def caught(number, frame):
    print(signal.Signals(number).name, flush=True)
    if number in ends:
        sys.exit(40)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, caught)
print("ready", flush=True)
while True:
    signal.pause()
"""

ADOPT_TERMINAL = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""

IGNORE_HANGUP = """
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN)
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.fixture
def variables(environ: dict[str, str]) -> dict[str, str]:
    return {**os.environ, **environ}


@pytest.fixture
def run(variables: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*command: str, cred: str = "orders-db:read", options: tuple[str, ...] = ()) -> Any:
        return subprocess.run(
            [*EXEC, "--cred", cred, *options, "--", *command],
            env=variables,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


@contextmanager
def running(
    variables: dict[str, str], *command: str, options: tuple[str, ...] = ()
) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*EXEC, "--cred", "orders-db:read", *options, "--", *command],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        # The whole session: a child that outlived `nhi` would keep the pipes open for ever.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def python(code: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code, *arguments)


def test_the_child_has_the_login_in_its_environment_and_only_there(
    run: Any, server: ContractServer, leaks: Callable[[str], list[str]]
) -> None:
    code = (
        "import json, os, pathlib\n"
        "own = {name: value for name, value in os.environ.items() if 'PG' in name}\n"
        "lines = [pathlib.Path(f'/proc/{pid}/cmdline').read_text() for pid in ('self', os.getppid())]\n"
        "print(json.dumps([own, lines]))"
    )
    done = run(*python(code))
    assert done.returncode == 0, done.stderr
    own, lines = json.loads(done.stdout)
    lease_id = next(iter(server.leases))
    expected = {
        "PGHOST": "db.example.test",
        "PGPORT": "5432",
        "PGDATABASE": "orders",
        "PGUSER": f"nhi_{lease_id[4:]}",
        "PGPASSWORD": server.passwords[0],
        "PGSSLMODE": "prefer",
    }
    assert own == expected | {f"ORDERS_DB_{name}": value for name, value in expected.items()}
    assert not leaks("".join(lines) + done.stderr)
    assert server.alive() == []
    assert server.open_tasks() == []
    assert "orders-db:read proven dead" in done.stderr
    assert " ms after python" in done.stderr


def test_tokens_have_their_variables(run: Any, server: ContractServer) -> None:
    code = "import json, os; print(json.dumps(dict(os.environ)))"
    done = run(*python(code), options=("--cred", "tool-api:call", "--cred", "other-api:call"))
    shown = {name: value for name, value in json.loads(done.stdout).items() if name.startswith("NHI_TOKEN")}
    del shown["NHI_TOKEN_FILE"]
    assert shown == {
        "NHI_TOKEN": shown["NHI_TOKEN_TOOL_API"],
        "NHI_TOKEN_TOOL_API": shown["NHI_TOKEN_TOOL_API"],
        "NHI_TOKEN_OTHER_API": shown["NHI_TOKEN_OTHER_API"],
    }
    assert shown["NHI_TOKEN_TOOL_API"] != shown["NHI_TOKEN_OTHER_API"]
    assert set(shown.values()) <= set(server.passwords)
    assert len(server.leases) == 3
    assert server.alive() == []
    assert server.calls("POST", "/tasks")[0].body["resources"] == ["orders-db", "other-api", "tool-api"]


def test_what_would_send_the_password_elsewhere_is_taken_out(run: Any, variables: dict[str, str]) -> None:
    variables.update(
        PGHOSTADDR="192.0.2.1", PGSERVICE="evil", PGPASSFILE="/evil", PGHOST="evil", PGOPTIONS="-c x=1"
    )
    done = run(
        *python("import os; print(sorted(n for n in os.environ if n.startswith('PG')), os.environ['PGHOST'])")
    )
    assert "PGHOSTADDR" not in done.stdout
    assert "PGSERVICE" not in done.stdout
    assert "PGPASSFILE" not in done.stdout
    assert "PGOPTIONS" in done.stdout
    assert done.stdout.strip().endswith("db.example.test")


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        ("raise SystemExit(7)", 7),
        ("raise RuntimeError", 1),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 137),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", 143),
        ("import os; os.abort()", 134),
        ("import os, sys\nif os.fork(): os._exit(5)\nos.close(1); os.close(2)", 5),
    ],
)
def test_however_the_child_exits_its_code_is_kept_and_the_credential_dead(
    run: Any, server: ContractServer, code: str, exit_code: int
) -> None:
    done = run(*python(code))
    assert done.returncode == exit_code
    assert server.alive() == []
    assert server.open_tasks() == []


def test_standard_streams_belong_to_the_child(variables: dict[str, str]) -> None:
    done = subprocess.run(
        [*EXEC, "--quiet", "--cred", "orders-db:read", "cat"],
        env=variables,
        input=b"\x00\xff binary",
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == b"\x00\xff binary"
    assert b"proven" not in done.stderr


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"])
def test_a_signal_to_nhi_reaches_the_child_and_the_credential_dies(
    variables: dict[str, str], server: ContractServer, name: str
) -> None:
    with running(variables, *python(LISTENER, name)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert server.alive()
        process.send_signal(getattr(signal, name))
        out, err = process.communicate(timeout=30)
    assert process.returncode == 40, err
    assert out == f"{name}\n"
    assert server.alive() == []
    assert server.open_tasks() == []


def test_a_child_may_survive_an_interrupt(variables: dict[str, str], server: ContractServer) -> None:
    with running(variables, *python(LISTENER, "SIGUSR1")) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "SIGINT\n"
        assert server.alive()
        process.send_signal(signal.SIGUSR1)
        process.communicate(timeout=30)
    assert process.returncode == 40
    assert server.alive() == []


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_child_that_will_not_end_is_killed_and_the_credential_dies(
    variables: dict[str, str], server: ContractServer, name: str
) -> None:
    with running(variables, *python(LISTENER), options=("--grace", "0")) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(getattr(signal, name))
        process.communicate(timeout=30)
    assert process.returncode == 137
    assert server.alive() == []


@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_while_the_credential_is_being_minted_kills_it(
    variables: dict[str, str], server: ContractServer, number: int, exit_code: int
) -> None:
    minting = server.fault(Kind.HOLD, route="/request")
    with running(variables, *python("print('never')")) as process:
        assert minting.held.wait(30)
        assert server.alive()
        process.send_signal(number)
        out, _ = process.communicate(timeout=30)
    assert process.returncode == exit_code
    assert out == ""
    assert server.alive() == []
    assert server.open_tasks() == []


def test_a_signal_while_the_task_is_being_ended_does_not_stop_it(
    variables: dict[str, str], server: ContractServer
) -> None:
    ending = server.fault(Kind.HOLD, route="/end")
    server.fault(Kind.DROP_BEFORE, route="/end")
    with running(variables, *python("raise SystemExit(3)")) as process:
        assert ending.held.wait(30)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        ending.release.set()
        process.communicate(timeout=30)
    assert process.returncode == 3
    assert server.alive() == []


def test_waiting_for_proof_can_be_cut_short(variables: dict[str, str], server: ContractServer) -> None:
    server.settle = False
    first = server.fault(Kind.HOLD, route="/end")
    waiting = server.fault(Kind.HOLD, route="/end")
    first.release.set()
    with running(variables, *python("raise SystemExit(3)")) as process:
        assert waiting.held.wait(30)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 3
    assert "not waiting for proof" in err
    assert "NOT proven dead yet" in err
    assert server.open_tasks() == []


def test_a_terminals_interrupt_reaches_the_child_once(
    variables: dict[str, str], server: ContractServer
) -> None:
    leader, follower = pty.openpty()
    command = [*EXEC, "--quiet", "--cred", "orders-db:read", "--", *python(LISTENER, "SIGUSR2")]
    process = subprocess.Popen(
        [sys.executable, "-c", ADOPT_TERMINAL, *command],
        env=variables,
        stdin=follower,
        stdout=follower,
        stderr=follower,
    )
    os.close(follower)
    try:
        seen = _read_until(leader, b"ready")
        process.send_signal(signal.SIGSTOP)  # so that the child has its own before nhi could add another
        os.write(leader, b"\x03")
        seen = _read_until(leader, b"SIGINT")
        process.send_signal(signal.SIGUSR2)
        process.send_signal(signal.SIGCONT)
        seen += _read_until(leader, b"SIGUSR2")
        assert seen.count(b"SIGINT") == 1
        assert process.wait(30) == 40
    finally:
        process.kill()
        process.wait()
        os.close(leader)
    assert server.alive() == []


def _read_until(descriptor: int, word: bytes) -> bytes:
    seen = b""
    while word not in seen:
        seen += os.read(descriptor, 1024)
    return seen


def test_an_ignored_hangup_stays_ignored(variables: dict[str, str], server: ContractServer) -> None:
    silent = LISTENER.replace("signal.SIGHUP, ", "")
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            IGNORE_HANGUP,
            *EXEC,
            "--cred",
            "orders-db:read",
            "--",
            *python(silent, "SIGUSR1"),
        ],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGUSR1)
        out, _ = process.communicate(timeout=30)
    finally:
        # The whole session: a child that outlived `nhi` would keep the pipes open for ever.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert (process.returncode, out) == (40, "SIGUSR1\n")
    assert server.alive() == []


def test_nothing_is_minted_for_a_program_that_is_not_there(run: Any, server: ContractServer) -> None:
    done = run("no-such-program")
    assert done.returncode == 127
    assert server.seen == []


def test_nothing_is_minted_for_a_file_that_is_no_program(
    run: Any, server: ContractServer, tmp_path: Path
) -> None:
    path = tmp_path / "data"
    path.write_text("no program")
    assert run(str(path)).returncode == 126
    assert server.seen == []


def test_a_program_that_cannot_be_started_leaves_nothing_alive(
    run: Any, server: ContractServer, tmp_path: Path
) -> None:
    path = tmp_path / "broken"
    path.write_text("#!/no/such/interpreter\n")
    path.chmod(0o700)
    done = run(str(path))
    assert done.returncode == 126
    assert "cannot run broken" in done.stderr
    assert server.leases
    assert server.alive() == []


def test_a_denied_second_credential_kills_the_first_and_runs_nothing(
    run: Any, server: ContractServer
) -> None:
    done = run(*python("print('never')"), options=("--cred", "payroll-db:read"))
    assert done.returncode == 125
    assert done.stdout == ""
    assert "payroll-db belongs to another team." in done.stderr
    assert "team-owns-resource" in done.stderr
    assert server.leases
    assert server.alive() == []


def test_one_resource_twice_is_refused_before_anything_is_minted(run: Any, server: ContractServer) -> None:
    assert run("true", options=("--cred", "orders.db:write")).returncode == 2
    assert server.seen == []


def test_a_kind_that_has_no_variables_is_said_and_killed(run: Any, server: ContractServer) -> None:
    done = run("true", cred="warehouse-cloud:read")
    assert done.returncode == 125
    assert "cloud_session" in done.stderr
    assert server.alive() == []


@pytest.mark.parametrize(("code", "exit_code"), [("", 125), ("raise SystemExit(3)", 3)])
def test_an_end_the_broker_did_not_take_is_said_loudly(
    run: Any, server: ContractServer, code: str, exit_code: int
) -> None:
    server.refuse(500, "internal", "no", route="/end", times=100)
    done = run(*python(code))
    assert done.returncode == exit_code
    task_id = next(iter(server.tasks))
    assert f"nhi task end {task_id}" in done.stderr
    assert "2026-11-20T12:05:00.000Z" in done.stderr


def test_an_end_that_is_not_proven_is_said_and_keeps_the_childs_code(
    run: Any, server: ContractServer
) -> None:
    server.settle = False
    done = run(*python("raise SystemExit(3)"), options=("--wait", "1"))
    assert done.returncode == 3
    assert "orders-db:read is NOT proven dead yet (revoke_pending)" in done.stderr
    assert [one.headers.get("prefer") for one in server.calls("POST", "/end")] == [None, "wait=1"]


def test_arguments_after_the_program_are_its_own(run: Any, variables: dict[str, str]) -> None:
    done = subprocess.run(
        [*EXEC, "--cred", "orders-db:read", "echo", "--cred", "--help", "-q", "--", "x"],
        env=variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "--cred --help -q -- x\n"
