from __future__ import annotations

import asyncio
import os
import socket
import stat
from typing import TYPE_CHECKING, Any

import orjson
import pytest
import uvloop

from broker.api import schemas
from broker.api.listeners import Listener, ListenerError, Listeners, TcpBind, UnixBind
from broker.api.protocol import ConnectionLimits
from broker.api.tls import ServerTls
from tests.support.edge import (
    Client,
    EdgeUnderTest,
    authority,
    chain_and_key,
    client_context,
    pem,
    server_leaf,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path

    Run = Callable[[Coroutine[Any, Any, None]], None]

POST = b"POST /echo HTTP/1.1\r\nhost: localhost\r\n"


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    return asyncio.run if request.param == "asyncio" else uvloop.run


def check_problem(answer: tuple[int, dict[str, str], bytes], status: int, code: str) -> None:
    assert answer[0] == status
    assert answer[1]["content-type"] == "application/problem+json"
    problem = schemas.Problem.model_validate_json(answer[2])
    assert (problem.type, problem.trace_id) == (f"urn:nhi-broker:problem:{code}", answer[1]["trace-id"])


# --- what may come in ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(b"GET /peer HTTP/1.1\r\nx: " + b"y" * 20_000 + b"\r\n\r\n", id="one long header"),
        pytest.param(b"GET /peer HTTP/1.1\r\nx: " + b"y" * 20_000, id="a header that does not end"),
        pytest.param(b"GET /" + b"y" * 20_000 + b" HTTP/1.1\r\n\r\n", id="a long path"),
        pytest.param(b"GET /" + b"y" * 20_000, id="a path that does not end"),
        pytest.param(b"GET /peer HTTP/1.1\r\n" + b"a: b\r\n" * 101 + b"\r\n", id="many headers"),
    ],
)
def test_a_head_above_its_bound_is_refused(run: Run, head: bytes) -> None:
    async def scenario() -> None:
        async with EdgeUnderTest() as edge:
            client = await edge.connect()
            await client.send(head)
            check_problem(await client.answer(), 431, "head-too-large")
            assert await client.rest() == b""

    run(scenario())


def test_a_head_dripped_in_is_bounded_all_the_same(run: Run) -> None:
    async def scenario() -> None:
        async with EdgeUnderTest(limits=ConnectionLimits(head_bytes=1000)) as edge:
            client = await edge.connect()
            await client.send(b"GET /peer HTTP/1.1\r\nx: ")
            for _ in range(11):
                await client.send(b"y" * 100)
            check_problem(await client.answer(), 431, "head-too-large")

    run(scenario())


def test_requests_up_to_the_bound_are_served_again_and_again(run: Run) -> None:
    async def scenario() -> None:
        async with EdgeUnderTest(limits=ConnectionLimits(head_bytes=1000)) as edge:
            client = await edge.connect()
            for _ in range(20):
                await client.send(
                    POST + b"x: " + b"y" * 800 + b"\r\ncontent-length: 5000\r\n\r\n" + b"z" * 5000
                )
                status, _, body = await client.answer()
                assert (status, orjson.loads(body)["size"]) == (200, 5000)

    run(scenario())


@pytest.mark.parametrize(
    "data",
    [
        b"zQ9MARKER\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\n\r\n",
        b"CONNECT zQ9MARKER:1 HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nzQ9MARKER\r\n\r\n",
        POST + b"content-length: zQ9MARKER\r\n\r\n",
        POST + b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"content-length: 3\r\ncontent-length: 4\r\n\r\nabcd",
        POST + b"transfer-encoding: chunked\r\n\r\nzQ9\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
    ],
)
def test_bytes_that_are_no_request_get_a_problem(run: Run, data: bytes) -> None:
    async def scenario() -> None:
        async with EdgeUnderTest() as edge:
            client = await edge.connect()
            await client.send(data)
            answer = await client.answer()
            check_problem(answer, 400, "malformed-request")
            assert b"zQ9" not in answer[2]
            assert edge.telemetry.refusals == ["malformed-request"]
            assert await client.rest() == b""

    run(scenario())


def test_trailers_do_not_become_headers(run: Run) -> None:
    async def scenario() -> None:
        async with EdgeUnderTest() as edge:
            client = await edge.connect()
            await client.send(
                POST + b"transfer-encoding: chunked\r\ntrailer: authorization\r\n\r\n3\r\nabc\r\n"
            )
            await client.send(b"0\r\nauthorization: Bearer x\r\n\r\n")
            _, _, body = await client.answer()
            assert "authorization" not in orjson.loads(body)["headers"]

    run(scenario())


def test_an_answer_under_way_is_not_mixed_with_a_refusal(run: Run) -> None:
    async def scenario() -> None:
        async with EdgeUnderTest() as edge:
            client = await edge.connect()
            await client.send(b"GET /slow HTTP/1.1\r\nhost: localhost\r\n\r\nrubbish\r\n\r\n")
            assert await client.rest() == b""

    run(scenario())


def test_pipelined_requests_are_answered_in_order(run: Run) -> None:
    async def scenario() -> None:
        async with EdgeUnderTest() as edge:
            edge.go.set()
            client = await edge.connect()
            await client.send(
                b"GET /slow HTTP/1.1\r\nhost: a\r\n\r\n" + POST + b"content-length: 2\r\n\r\nab"
            )
            assert (await client.answer())[2] == b"done"
            assert orjson.loads((await client.answer())[2])["size"] == 2

    run(scenario())


# --- time ----------------------------------------------------------------------------------------

QUICK = ConnectionLimits(request_seconds=0.5)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"GET /peer HT", id="half a request line"),
        pytest.param(b"GET /peer HTTP/1.1\r\nx: y\r\n", id="half a head"),
        pytest.param(POST + b"content-length: 10\r\n\r\nabc", id="half a body"),
        pytest.param(POST + b"content-length: 10\r\n\r\n", id="no body"),
        pytest.param(POST + b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n", id="half the chunks"),
    ],
)
def test_a_request_that_does_not_arrive_whole_is_cut_and_holds_nobody_up(run: Run, data: bytes) -> None:
    async def scenario() -> None:
        async with EdgeUnderTest(limits=QUICK) as edge:
            slow, other = await edge.connect(), await edge.connect()
            await slow.send(data)
            assert (await other.get("/peer"))[0] == 200
            check_problem(await slow.answer(), 408, "request-timeout")
            assert await slow.rest() == b""

    run(scenario())


@pytest.mark.parametrize("data", [b"", b"\r\n\r\n"], ids=["silence", "empty lines"])
def test_a_connection_that_asks_nothing_is_closed(run: Run, data: bytes) -> None:
    async def scenario() -> None:
        async with EdgeUnderTest(limits=QUICK) as edge:
            idle = await edge.connect()
            await idle.send(data)
            assert b"HTTP/1.1 200" not in await idle.rest()

    run(scenario())


def test_empty_lines_do_not_keep_a_used_connection_alive(run: Run) -> None:
    async def scenario() -> None:
        async with EdgeUnderTest(limits=QUICK) as edge:
            client = await edge.connect()
            assert (await client.get("/peer"))[0] == 200
            await client.send(b"\r\n")
            await client.rest()

    run(scenario())


def test_a_slow_answer_is_not_cut(run: Run) -> None:
    async def scenario() -> None:
        async with EdgeUnderTest(limits=QUICK) as edge:
            client, idle = await edge.connect(), await edge.connect()
            await client.send(b"GET /slow HTTP/1.1\r\nhost: localhost\r\n\r\n")
            await edge.reached.wait()
            await idle.rest()  # the bound on requests has passed
            edge.go.set()
            assert (await client.answer())[2] == b"done"

    run(scenario())


def test_a_resting_connection_is_closed(run: Run) -> None:
    async def scenario() -> None:
        async with EdgeUnderTest(limits=ConnectionLimits(keep_alive_seconds=0.1)) as edge:
            client = await edge.connect()
            assert (await client.get("/peer"))[0] == 200
            assert await client.rest() == b""

    run(scenario())


# --- connections ----------------------------------------------------------------------------------


def test_connections_above_the_cap_are_told_so_and_the_others_go_on(run: Run) -> None:
    async def scenario() -> None:
        async with EdgeUnderTest(limits=ConnectionLimits(connections=2)) as edge:
            served = [await edge.connect() for _ in range(2)]
            for each in served:
                assert (await each.get("/peer"))[0] == 200
            extra = await edge.connect()
            answer = await extra.get("/peer")
            check_problem(answer, 503, "overloaded")
            assert answer[1]["retry-after"] == "1"
            assert await extra.rest() == b""
            assert edge.telemetry.connections == ["workload"]
            assert (await served[0].get("/peer"))[0] == 200

    run(scenario())


def test_far_above_the_cap_they_are_hung_up_on(run: Run) -> None:
    async def scenario() -> None:
        async with EdgeUnderTest(limits=ConnectionLimits(connections=1)) as edge:
            clients = [await edge.connect() for _ in range(2)]
            assert (await clients[0].get("/peer"))[0] == 200
            await edge.telemetry.until(lambda: len(edge.telemetry.connections) == 1)
            clients.append(await edge.connect())
            assert await clients[2].rest() == b""
            assert edge.listener.connections <= 2

    run(scenario())


def test_answers_say_the_date_and_not_the_software(run: Run) -> None:
    async def scenario() -> None:
        async with EdgeUnderTest() as edge:
            client = await edge.connect()
            _, headers, _ = await client.get("/peer")
            assert "GMT" in headers["date"]
            assert "server" not in headers

    run(scenario())


# --- stopping -------------------------------------------------------------------------------------


def test_a_stop_lets_requests_in_flight_finish_and_takes_no_new_ones(run: Run) -> None:
    async def scenario() -> None:
        async with EdgeUnderTest() as edge:
            port = edge.listener.port
            busy, idle = await edge.connect(), await edge.connect()
            assert (await idle.get("/peer"))[0] == 200
            await busy.send(b"GET /slow HTTP/1.1\r\nhost: localhost\r\n\r\n")
            await edge.reached.wait()
            stopping = asyncio.create_task(edge.listener.stop(10))
            assert await idle.rest() == b""
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", port)
            assert not stopping.done()
            edge.go.set()
            status, headers, body = await busy.answer()
            assert (status, headers["connection"], body) == (200, "close", b"done")
            await stopping
            assert edge.listener.connections == 0
            await edge.listener.stop(10)

    run(scenario())


def test_a_request_that_outlasts_the_grace_is_answered_503(run: Run) -> None:
    async def scenario() -> None:
        async with EdgeUnderTest() as edge:
            client = await edge.connect()
            await client.send(b"GET /slow HTTP/1.1\r\nhost: localhost\r\n\r\n")
            await edge.reached.wait()
            await edge.listener.stop(0.05)
            check_problem(await client.answer(), 503, "overloaded")

    run(scenario())


def test_a_stop_does_not_wait_for_half_open_handshakes_or_silent_clients(run: Run) -> None:
    async def scenario() -> None:
        root = authority()
        server = ServerTls(*chain_and_key(server_leaf(root)), [pem(root.certificate)])
        async with EdgeUnderTest(tls=server) as edge:
            await edge.connect()  # never shakes hands
            await edge.connect(client_context(root))  # never asks
            async with asyncio.timeout(8):
                await edge.listener.stop(5)
            assert (edge.listener.handshakes, edge.listener.connections) == (0, 0)

    run(scenario())


# --- addresses ------------------------------------------------------------------------------------


def test_a_port_in_use_is_named_and_nothing_is_left_listening(run: Run, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with EdgeUnderTest() as edge:
            first = EdgeUnderTest(bind=UnixBind(tmp_path / "s" / "operator.sock"), name="operator")
            second = EdgeUnderTest(bind=TcpBind("127.0.0.1", edge.listener.port))
            with pytest.raises(
                ListenerError, match=rf"workload listener cannot bind 127.0.0.1:{edge.listener.port}"
            ):
                await Listeners([first.listener, second.listener]).start()
            assert not (tmp_path / "s" / "operator.sock").exists()
            assert not first.listener.started.is_set()

    run(scenario())


async def test_a_shared_port_serves_several_processes_sockets() -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        bind = TcpBind("127.0.0.1", port, shared=True)
        async with EdgeUnderTest(bind=bind) as one, EdgeUnderTest(bind=bind) as two:
            assert one.listener.port == two.listener.port == port


def test_several_listeners_live_in_one_loop_each_with_its_own_application(run: Run, tmp_path: Path) -> None:
    async def scenario() -> None:
        path = tmp_path / "run" / "operator.sock"
        workload = EdgeUnderTest()
        operator = EdgeUnderTest(bind=UnixBind(path), name="operator")
        async with Listeners([workload.listener, operator.listener], grace_seconds=1):
            assert workload.listener.started.is_set()
            over_tcp = await workload.connect()
            over_unix = Client(*await asyncio.open_unix_connection(str(path)))
            tcp_peer = orjson.loads((await over_tcp.get("/peer"))[2])
            unix_peer = orjson.loads((await over_unix.get("/peer"))[2])
            await over_tcp.close()
            await over_unix.close()
        assert tcp_peer["unix"] is None
        assert unix_peer["unix"] == [os.getpid(), os.getuid(), os.getgid()]
        assert unix_peer["chain"] is None

    run(scenario())


async def test_the_operator_socket_is_for_us_alone_and_goes_with_us(tmp_path: Path) -> None:
    path = tmp_path / "new" / "operator.sock"
    async with EdgeUnderTest(bind=UnixBind(path)):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert not path.exists()


async def refusal(path: Path) -> str:
    with pytest.raises(ListenerError) as caught:
        await EdgeUnderTest(bind=UnixBind(path), name="operator").listener.start()
    return str(caught.value)


def test_a_directory_others_may_write_to_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    assert "mode 0700" in asyncio.run(refusal(tmp_path / "operator.sock"))


async def test_a_path_too_long_for_the_kernel_is_refused_with_its_bound(tmp_path: Path) -> None:
    assert "107 bytes" in await refusal(tmp_path / ("x" * 120))


async def test_the_socket_of_a_dead_process_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "operator.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with EdgeUnderTest(bind=UnixBind(path)):
        client = Client(*await asyncio.open_unix_connection(str(path)))
        assert (await client.get("/peer"))[0] == 200
        await client.close()


async def test_the_socket_of_a_living_process_is_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "operator.sock"
    async with EdgeUnderTest(bind=UnixBind(path)):
        assert "another process listens" in await refusal(path)
        assert path.exists()


async def test_a_file_in_the_way_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "operator.sock"
    path.write_text("precious")
    assert "no socket" in await refusal(path)
    assert path.read_text() == "precious"


async def test_a_socket_that_took_our_name_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "operator.sock"
    with socket.socket(socket.AF_UNIX) as other:
        async with EdgeUnderTest(bind=UnixBind(path)):
            path.rename(tmp_path / "moved")
            other.bind(str(path))
        assert path.exists()


def test_a_listener_that_is_not_started_has_no_port() -> None:
    edge = EdgeUnderTest()
    assert isinstance(edge.listener, Listener)
    with pytest.raises(ListenerError, match="no port"):
        _ = edge.listener.port
