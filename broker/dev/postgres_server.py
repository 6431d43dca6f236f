"""A real PostgreSQL server for development, the demo and tests.

``initdb`` and ``postgres`` are run as they are, from a wheel or the system. The server
listens on a loopback port and nowhere else (no Unix socket either), and every login needs
SCRAM-SHA-256. No process stays behind: `PostgresServer.stop` ends it in good order, and the
kernel ends it when this process dies, however that happens (``child_guard``).
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
import signal
import socket
import threading
from typing import TYPE_CHECKING, Final

import asyncpg

from broker.core.secret import Secret
from broker.dev.postgres_binaries import PostgresBinaries, find_postgres
from broker.dev.postgres_home import ServerHome, open_home, remove_home, server_account
from broker.dev.postgres_process import PostgresFailed, Postmaster, run_to_end, wait_for_foreign_exit

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import TracebackType
    from typing import Self

HOST: Final = "127.0.0.1"
SUPERUSER: Final = "postgres"

_START_TIMEOUT_SECONDS: Final = 60
_INITDB_TIMEOUT_SECONDS: Final = 120
_FAST_STOP_SECONDS: Final = 20
_HARD_STOP_SECONDS: Final = 10
_CONNECT_TIMEOUT_SECONDS: Final = 10
_PORT_ATTEMPTS: Final = 5
_PASSWORD_BYTES: Final = 24

_HBA: Final = """\
# Loopback only, and nobody without a password.
host all all 127.0.0.1/32 scram-sha-256
"""

_SETTINGS: Final[Mapping[str, str]] = {
    "listen_addresses": HOST,
    "unix_socket_directories": "",
    "password_encryption": "scram-sha-256",  # pragma: allowlist secret  a method's name
    "max_connections": "300",
    "shared_buffers": "32MB",
    "huge_pages": "off",
    "jit": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "lc_messages": "C",  # readiness is read from the log
    # A statement that fails may hold a password: it stays out of the log.
    "log_min_error_statement": "panic",
}
# A commit still reaches the kernel: a killed server loses nothing, only a crashed host does.
_NOT_DURABLE: Final[Mapping[str, str]] = {"fsync": "off", "full_page_writes": "off"}


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


class PostgresServer:
    """One server with its data in one state directory.

    Its methods may be called from any event loop, one after another. A restart keeps data,
    password and, within one instance, the port.

    Args:
        state_dir: the server's own directory; made where it does not exist, reused where it does.
        port: a fixed port, or 0 for a free one, drawn at the first start and then kept.
        durable: False turns fsync off: faster, and a crash of the host may lose the data.
        binaries: a directory with ``postgres`` and ``initdb``; by default the wheel's, then the system's.
        run_as: the account to drop to when started by root; by default ``postgres``, then ``nobody``.
        settings: further server settings, which win over the defaults.

    """

    def __init__(
        self,
        state_dir: Path,
        *,
        port: int = 0,
        durable: bool = True,
        binaries: Path | None = None,
        run_as: str | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self._state_dir = state_dir
        self._port = port
        self._port_is_fixed = port != 0
        self._durable = durable
        self._explicit_binaries = binaries
        self._run_as = run_as
        self._settings = dict(settings or {})
        self._lock = threading.Lock()
        self._postmaster: Postmaster | None = None
        self._password: Secret[str] | None = None

    def __repr__(self) -> str:
        return f"PostgresServer({HOST}:{self._port}, running={self.running})"

    @property
    def host(self) -> str:
        """Where it listens: the loopback address."""
        return HOST

    @property
    def port(self) -> int:
        """Where it listens; 0 before the first start with no port given."""
        return self._port

    @property
    def superuser(self) -> str:
        """The name of the administrator's login."""
        return SUPERUSER

    @property
    def password(self) -> Secret[str]:
        """The administrator's password, drawn when the data directory was made.

        Raises:
            PostgresFailed: the server was never started.

        """
        if self._password is None:
            msg = "the server was not started yet"
            raise PostgresFailed(msg)
        return self._password

    @property
    def running(self) -> bool:
        """Whether the server is up (a paused one is)."""
        return self._postmaster is not None and self._postmaster.running

    @property
    def pid(self) -> int:
        """The postmaster's process id.

        Raises:
            PostgresFailed: the server is not running.

        """
        if self._postmaster is None or not self._postmaster.running:
            msg = "the server is not running"
            raise PostgresFailed(msg)
        return self._postmaster.pid

    async def start(self) -> Self:
        """Make the data directory where there is none, start, and wait for readiness. Idempotent.

        Raises:
            PostgresMissing: no PostgreSQL was found; says how to get one.
            NoServerAccount: root has no account to run it as.
            PostgresFailed: it did not start; holds the end of its log.

        """
        work = asyncio.ensure_future(asyncio.to_thread(self._start))
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            # The thread cannot be interrupted: let it finish, then undo, so that nothing stays.
            with contextlib.suppress(PostgresFailed):
                await work
            await self.stop()
            raise
        return self

    async def stop(self, *, immediate: bool = False) -> None:
        """End the server and wait until its last process is gone. Idempotent.

        Args:
            immediate: cut everything as a crash would; the next start recovers.

        Raises:
            PostgresFailed: a process is left even after SIGKILL.

        """
        await asyncio.to_thread(self._stop, immediate=immediate)

    async def restart(self, *, immediate: bool = False) -> None:
        """Stop and start on the same port."""
        await self.stop(immediate=immediate)
        await self.start()

    def pause(self) -> None:
        """Freeze every process of the server: connections hang instead of failing. Idempotent."""
        if self._postmaster is not None:
            self._postmaster.pause()

    def resume(self) -> None:
        """Undo `pause`. Idempotent."""
        if self._postmaster is not None:
            self._postmaster.resume()

    async def connect(self, database: str = "postgres") -> asyncpg.Connection[asyncpg.Record]:
        """Open a session as the administrator."""
        return await asyncpg.connect(
            host=self.host,
            port=self.port,
            user=self.superuser,
            password=self.password.reveal(),
            database=database,
            ssl=False,
            timeout=_CONNECT_TIMEOUT_SECONDS,
        )

    async def destroy(self) -> None:
        """Stop the server and delete its data."""
        await self.stop(immediate=True)
        await asyncio.to_thread(remove_home, self._state_dir)
        self._password = None

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    # --- in a worker thread: everything below blocks -------------------------------------------

    def _start(self) -> None:
        with self._lock:
            if self.running:
                return
            binaries = find_postgres(self._explicit_binaries)
            home = open_home(self._state_dir, server_account(self._run_as))
            if not home.account.may_run(binaries.postgres):
                binaries = binaries.copy_to(home.binaries)
            self._make_data_directory(binaries, home)
            self._password = Secret(home.password_file.read_text("utf-8"))
            self._refuse_if_served(home)
            self._postmaster = self._launch(binaries, home)

    def _make_data_directory(self, binaries: PostgresBinaries, home: ServerHome) -> None:
        version = home.data / "PG_VERSION"
        if version.exists():
            if version.read_text("ascii").strip() != str(binaries.major):
                msg = (
                    f"the data in {home.data} was made by another major version than {binaries.directory} "
                    f"({binaries.major}): name the matching binaries, or delete the directory to begin anew"
                )
                raise PostgresFailed(msg)
            return
        home.write_private(home.password_file, secrets.token_urlsafe(_PASSWORD_BYTES))
        staging = home.path / "data.new"  # a killed initdb leaves no half-made data directory
        shutil.rmtree(staging, ignore_errors=True)
        sync = () if self._durable else ("--no-sync",)
        login = ("--username", SUPERUSER, "--pwfile", home.password_file, "--auth=scram-sha-256")
        command = (binaries.initdb, "--pgdata", staging, *login, "--encoding=UTF8", "--locale=C", *sync)
        run_to_end(command, home, timeout_seconds=_INITDB_TIMEOUT_SECONDS)
        (staging / "pg_hba.conf").write_text(_HBA, "ascii")
        staging.rename(home.data)

    def _refuse_if_served(self, home: ServerHome) -> None:
        # After a kill -9 of its parent the old server is on its way out: wait for that, not for ever.
        lock = home.data / "postmaster.pid"
        try:
            pid = int(lock.read_text("utf-8").partition("\n")[0])
        except (FileNotFoundError, ValueError):
            return
        if _serves(pid, home) and not wait_for_foreign_exit(pid, timeout_seconds=_HARD_STOP_SECONDS):
            msg = f"another server (process {pid}) runs on the data in {home.data}: stop it first"
            raise PostgresFailed(msg)

    def _launch(self, binaries: PostgresBinaries, home: ServerHome) -> Postmaster:
        for _ in range(_PORT_ATTEMPTS - 1):
            try:
                return self._launch_once(binaries, home)
            except _PortTaken:
                if self._port_is_fixed:
                    break
                self._port = 0
        return self._launch_once(binaries, home)

    def _launch_once(self, binaries: PostgresBinaries, home: ServerHome) -> Postmaster:
        self._port = self._port or _free_port()
        settings = {
            **_SETTINGS,
            **({} if self._durable else _NOT_DURABLE),
            **self._settings,
            "port": str(self._port),
        }
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        postmaster = Postmaster([binaries.postgres, "-D", home.data, *options], home)
        try:
            postmaster.wait_until_ready(timeout_seconds=_START_TIMEOUT_SECONDS)
        except PostgresFailed as error:
            postmaster.kill(timeout_seconds=_HARD_STOP_SECONDS)
            if postmaster.port_was_taken:
                raise _PortTaken(str(error)) from error
            raise
        self._port_is_fixed = True  # from here on clients know it
        return postmaster

    def _stop(self, *, immediate: bool) -> None:
        with self._lock:
            postmaster, self._postmaster = self._postmaster, None
            if postmaster is None:
                return
            if not immediate and postmaster.end(signal.SIGINT, timeout_seconds=_FAST_STOP_SECONDS):
                return
            if postmaster.end(signal.SIGQUIT, timeout_seconds=_HARD_STOP_SECONDS):
                return
            if not postmaster.kill(timeout_seconds=_HARD_STOP_SECONDS):
                msg = f"process {postmaster.pid} of the PostgreSQL server did not end"
                raise PostgresFailed(msg)


class _PortTaken(PostgresFailed):
    """Another process took the port between drawing and using it."""


def _serves(pid: int, home: ServerHome) -> bool:
    """Say whether `pid` is a server on this data directory, and not a process that inherited the number."""
    try:
        return str(home.data).encode() in _command_line(pid)
    except OSError:
        return False


def _command_line(pid: int) -> bytes:
    with open(f"/proc/{pid}/cmdline", "rb") as file:  # noqa: PTH123  a kernel file, read once
        return file.read()
