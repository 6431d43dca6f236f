"""A fake of the broker's operator socket, and `nhi` run in this process."""

from __future__ import annotations

import json
import shutil
import socketserver
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import parse_qs, urlsplit

import pytest

from nhi_sdk.cli import main

if TYPE_CHECKING:
    from collections.abc import Iterator


class Nhi:
    """Runs the command in this process; `out` and `err` are of the last run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys
        self.out = self.err = ""

    def __call__(self, *words: object) -> int:
        self._monkeypatch.setattr(sys, "argv", ["nhi", *(str(word) for word in words)])
        with pytest.raises(SystemExit) as left:
            main()
        self.out, self.err = self._capsys.readouterr()
        code = left.value.code or 0
        assert isinstance(code, int)
        return int(code)

    def json(self) -> Any:
        return json.loads(self.out)


class OperatorServer(socketserver.ThreadingUnixStreamServer):
    """Answers what it is told to, by method and path, and remembers what it was asked."""

    daemon_threads = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: dict[tuple[str, str], list[tuple[int, bytes]]] = {}
        self.asked: list[tuple[str, str, dict[str, str], Any]] = []
        super().__init__(str(path), _Handler)

    def answer(self, method: str, path: str, document: object, *, status: int = 200) -> None:
        """Queue an answer; the last one of a path is given for ever."""
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.answers.setdefault((method, path), []).append((status, body))

    def refuse(self, method: str, path: str, status: int, code: str, detail: str) -> None:
        """Answer with a problem."""
        problem = {
            "type": f"urn:nhi-broker:problem:{code}",
            "title": code,
            "status": status,
            "detail": detail,
            "trace_id": "0" * 32,
        }
        self.answer(method, path, problem, status=status)


class _Handler(BaseHTTPRequestHandler):
    server: OperatorServer
    quiet: ClassVar[bool] = True

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        length = int(self.headers.get("content-length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        self.server.asked.append((self.command, parts.path, query, body))
        queued = self.server.answers.get((self.command, parts.path), [(404, b"{}")])
        status, content = queued.pop(0) if len(queued) > 1 else queued[0]
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = _serve  # noqa: N815  names of http.server

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class's name
        """Say nothing."""


@pytest.fixture
def nhi(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Nhi:
    for name in (
        "NHI_OPERATOR_SOCKET",
        "NHI_CONFIG",
        "NHI_BROKER_URL",
        "NHI_AUDIENCE",
        "SPIFFE_ENDPOINT_SOCKET",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return Nhi(monkeypatch, capsys)


@pytest.fixture
def operator(monkeypatch: pytest.MonkeyPatch, nhi: Nhi) -> Iterator[OperatorServer]:
    directory = Path(tempfile.mkdtemp(prefix="nhi-", dir="/tmp"))
    server = OperatorServer(directory / "op.sock")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("NHI_OPERATOR_SOCKET", str(server.path))
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
    shutil.rmtree(directory)
