from __future__ import annotations

import os
import ssl
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from nhi_sdk import (
    AsyncBroker,
    Broker,
    CaFile,
    ConfigurationError,
    MissingExtra,
    StaticSource,
    SvidError,
    TokenFileSource,
    TransportError,
    Unauthenticated,
    WorkloadApiSource,
)
from nhi_sdk._session import Session
from nhi_sdk.svid import unverified_claims
from tests.unit.sdk.contract_server import Kind
from tests.unit.sdk.pki import AGENT, AUDIENCE, Authority, jwt_svid
from tests.unit.sdk.workload_api import WorkloadApi, serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.unit.sdk.contract_server import ContractServer

OTHER = "spiffe://example.test/agent/other"


@pytest.fixture
def api(authority: Authority, short_dir: Path) -> Iterator[WorkloadApi]:
    made = WorkloadApi(authority)
    with serving(made, short_dir / "agent.sock"):
        yield made


@pytest.fixture
def socket(short_dir: Path) -> str:
    return f"unix://{short_dir}/agent.sock"


# --- the Workload API --------------------------------------------------------------------------


def test_a_client_lives_on_the_workload_api_alone(
    api: WorkloadApi, socket: str, server: ContractServer
) -> None:
    server.on_request = lambda seen: server.tokens.add(seen.headers["authorization"].removeprefix("Bearer "))
    environ = {"NHI_BROKER_URL": server.url, "NHI_AUDIENCE": AUDIENCE, "SPIFFE_ENDPOINT_SOCKET": socket}
    with Broker.from_env(environ) as broker, broker.task("t"):
        pass
    assert [list(one.audience) for one in api.jwt_requests] == [[AUDIENCE]]
    sent = server.seen[0].headers["authorization"].removeprefix("Bearer ")
    assert unverified_claims(sent)["sub"] == AGENT


def test_a_token_is_kept_until_half_its_life_is_over(api: WorkloadApi, socket: str) -> None:
    now = time.time()
    source = WorkloadApiSource(socket, wall_clock=lambda: now)
    first = source.token(AUDIENCE)
    now += 145
    assert source.cached_token(AUDIENCE) == source.token(AUDIENCE) == first
    now += 10
    assert source.cached_token(AUDIENCE) is None
    source.token(AUDIENCE)
    assert len(api.jwt_requests) == 2
    source.forget()
    source.token(AUDIENCE)
    assert len(api.jwt_requests) == 3
    source.close()


def test_a_token_for_one_audience_is_never_given_for_another(api: WorkloadApi, socket: str) -> None:
    source = WorkloadApiSource(socket)
    source.token(AUDIENCE)
    assert unverified_claims(source.token("spiffe://example.test/another"))["aud"] == [
        "spiffe://example.test/another"
    ]
    assert len(api.jwt_requests) == 2
    source.close()


def test_while_the_agent_is_away_a_valid_token_is_used_to_its_end(
    api: WorkloadApi, socket: str, caplog: pytest.LogCaptureFixture
) -> None:
    now = time.time()
    source = WorkloadApiSource(socket, wall_clock=lambda: now)
    first = source.token(AUDIENCE)
    api.knows_caller = False
    now += 200
    assert source.token(AUDIENCE) == first
    assert "keeping the JWT-SVID" in caplog.text
    assert first not in caplog.text
    now += 200
    with pytest.raises(SvidError, match="no identity issued"):
        source.token(AUDIENCE)
    source.close()


def test_a_restarted_agent_is_survived(authority: Authority, short_dir: Path, socket: str) -> None:
    source = WorkloadApiSource(socket)
    for _ in range(2):
        with serving(WorkloadApi(authority), short_dir / "agent.sock"):
            source.forget()
            assert unverified_claims(source.token(AUDIENCE))["sub"] == AGENT
        (short_dir / "agent.sock").unlink(missing_ok=True)
        source.forget()
        with pytest.raises(SvidError):
            source.token(AUDIENCE)


def test_one_of_several_identities_is_chosen_by_name(api: WorkloadApi, socket: str) -> None:
    api.identities = [AGENT, OTHER]
    source = WorkloadApiSource(socket, spiffe_id=OTHER)
    assert unverified_claims(source.token(AUDIENCE))["sub"] == OTHER
    assert "BEGIN CERTIFICATE" in source.client_certificate().chain
    assert source.spiffe_ids() == [AGENT, OTHER]
    source.close()


def test_an_identity_the_agent_does_not_have_is_said(api: WorkloadApi, socket: str) -> None:
    source = WorkloadApiSource(socket, spiffe_id=OTHER)
    with pytest.raises(SvidError):
        source.token(AUDIENCE)
    with pytest.raises(SvidError, match="NHI_SPIFFE_ID.*has: " + AGENT):
        source.authorities()
    source.close()


def test_an_agent_that_answers_with_another_identity_is_not_believed(api: WorkloadApi, socket: str) -> None:
    api.honours_hint = False
    source = WorkloadApiSource(socket, spiffe_id=OTHER)
    with pytest.raises(SvidError, match="not " + OTHER):
        source.token(AUDIENCE)
    source.close()


def test_a_missing_socket_is_named(short_dir: Path) -> None:
    source = WorkloadApiSource(str(short_dir / "none.sock"))
    with pytest.raises(SvidError, match=r"none\.sock"):
        source.token(AUDIENCE)


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spiffe", None)
    with pytest.raises(MissingExtra, match=r"nhi-sdk\[spiffe\]"):
        WorkloadApiSource("unix:///run/none.sock").token(AUDIENCE)


# --- mutual TLS --------------------------------------------------------------------------------


@pytest.mark.parametrize("client_of", [Broker, AsyncBroker])
async def test_an_x509_svid_speaks_alone(
    api: WorkloadApi, socket: str, server: ContractServer, client_of: type[Any]
) -> None:
    server.peers.add(AGENT)
    environ = {"NHI_BROKER_URL": server.url, "NHI_MTLS": "1", "SPIFFE_ENDPOINT_SOCKET": socket}
    client = client_of.from_env(environ)
    if client_of is AsyncBroker:
        await client.catalog()
        await client.aclose()
    else:
        client.catalog()
        client.close()
    assert server.seen[0].peer == (AGENT,)
    assert "authorization" not in server.seen[0].headers


def test_an_x509_svid_is_renewed_at_half_its_life(api: WorkloadApi, socket: str) -> None:
    wall = time.time()
    source = WorkloadApiSource(socket)
    session = Session(
        svid=None,
        audience=None,
        trust=source,
        certificates=source,
        wall_clock=lambda: wall,
        monotonic=lambda: 0.0,
    )
    first = session.prepare()
    assert session.ready() == first
    wall += 1700
    assert session.prepare().context is first.context
    wall += 100
    assert session.ready() is None
    assert session.prepare().generation == first.generation + 1
    session.close()


def test_the_private_key_is_on_no_disk_afterwards(
    api: WorkloadApi, socket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    source = WorkloadApiSource(socket)
    for memory_file in (True, False):
        if not memory_file:
            monkeypatch.delattr(os, "memfd_create")
        Session(svid=None, audience=None, trust=source, certificates=source).prepare()
    assert list(tmp_path.iterdir()) == []
    assert "PRIVATE KEY" not in repr(source.client_certificate())
    source.close()


# --- trust -------------------------------------------------------------------------------------


@pytest.mark.parametrize("client_of", [Broker, AsyncBroker])
async def test_a_broker_under_another_authority_is_refused_and_gets_no_svid(
    server: ContractServer, options: dict[str, Any], ca_file: Path, client_of: type[Any]
) -> None:
    ca_file.write_text(Authority("elsewhere.test").pem())  # noqa: ASYNC240  nothing else runs
    client = client_of(server.url, **options)
    client._sleep = None  # a certificate that does not verify is not tried again
    with pytest.raises(TransportError, match=r"not trusted.*NHI_CA_FILE") as caught:
        await client.catalog() if client_of is AsyncBroker else client.catalog()
    assert not caught.value.ambiguous
    assert server.seen == []
    await client.aclose() if client_of is AsyncBroker else client.close()


def test_a_certificate_for_another_host_is_refused(
    server: ContractServer, options: dict[str, Any], authority: Authority, tmp_path: Path
) -> None:
    server.use_certificate(
        authority.issue("spiffe://example.test/x", hosts=("broker.example.test",)), tmp_path
    )
    with Broker(server.url, **options) as client, pytest.raises(TransportError, match="host name"):
        client.catalog()
    assert server.seen == []


@pytest.mark.parametrize("client_of", [Broker, AsyncBroker])
async def test_a_rotated_authority_needs_no_restart(
    server: ContractServer, options: dict[str, Any], ca_file: Path, tmp_path: Path, client_of: type[Any]
) -> None:
    rotated = Authority()
    client = client_of(server.url, **options)
    for authority in (None, rotated):
        if authority is not None:
            with ca_file.open("a") as file:
                file.write(authority.pem())
            leaf = authority.issue("spiffe://example.test/nhi-broker", hosts=("127.0.0.1",))
            server.use_certificate(leaf, tmp_path)
            server.fault(
                Kind.DROP_BEFORE
            )  # the warm connection goes; the next handshake meets the new certificate
        await client.catalog() if client_of is AsyncBroker else client.catalog()
    assert client._session.prepare().generation == 2
    await client.aclose() if client_of is AsyncBroker else client.close()


def test_a_withdrawn_authority_is_not_trusted_for_ever(ca_file: Path, token: str) -> None:
    now = 0.0
    session = Session(
        svid=StaticSource(token), audience=AUDIENCE, trust=CaFile(ca_file), monotonic=lambda: now
    )
    first = session.prepare()
    ca_file.write_text(Authority("elsewhere.test").pem())
    now = 299
    assert session.prepare().context is first.context
    now = 301
    assert session.prepare().context is not first.context


def test_an_unreadable_trust_later_on_keeps_what_is_at_hand(
    ca_file: Path, token: str, caplog: pytest.LogCaptureFixture
) -> None:
    now = 0.0
    session = Session(
        svid=StaticSource(token), audience=AUDIENCE, trust=CaFile(ca_file), monotonic=lambda: now
    )
    first = session.prepare()
    ca_file.unlink()
    now = 301
    assert session.prepare().context is first.context
    assert "keeping" in caplog.text
    assert not session.distrusted()


@pytest.mark.parametrize(
    "text", ["", "not pem", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
def test_authorities_that_are_none_are_said(ca_file: Path, token: str, text: str) -> None:
    ca_file.write_text(text)
    with pytest.raises(SvidError, match="NHI_CA_FILE"):
        Session(svid=StaticSource(token), audience=AUDIENCE, trust=CaFile(ca_file)).prepare()


def test_tls_1_3_and_nothing_below(ca_file: Path, token: str) -> None:
    context = Session(svid=StaticSource(token), audience=AUDIENCE, trust=CaFile(ca_file)).prepare().context
    assert context.minimum_version is ssl.TLSVersion.TLSv1_3
    assert context.check_hostname
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.keylog_filename is None


# --- token files -------------------------------------------------------------------------------


def test_a_token_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "svid.jwt"
    old, new = jwt_svid(OTHER), jwt_svid()
    path.write_text(old + "\n")
    source = TokenFileSource(path)
    assert source.token(AUDIENCE) == source.token(AUDIENCE) == old
    fresh = tmp_path / "next"
    fresh.write_text(new)
    fresh.replace(path)
    assert source.cached_token(AUDIENCE) == new


@pytest.mark.parametrize(
    "content", [b"", b"hunter2", b"a.b", b"hunter2.@.c", b"aHVudGVyMg.e30", b"\xff\xfe", b"x" * 70_000]
)
def test_a_token_file_without_a_token_is_refused_unshown(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "svid.jwt"
    path.write_bytes(content)
    with pytest.raises(SvidError) as caught:
        TokenFileSource(path).token(AUDIENCE)
    assert "hunter2" not in str(caught.value)
    assert "aHVudGVyMg" not in str(caught.value)


def test_a_missing_token_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SvidError, match=r"svid\.jwt: No such file"):
        TokenFileSource(tmp_path / "svid.jwt").token(AUDIENCE)


def test_a_refused_svid_is_fetched_afresh_next_time(
    api: WorkloadApi, socket: str, server: ContractServer, ca_file: Path
) -> None:
    source = WorkloadApiSource(socket)
    with Broker(server.url, svid=source, audience=AUDIENCE, trust=CaFile(ca_file)) as client:
        for _ in range(2):
            with pytest.raises(Unauthenticated):
                client.catalog()
    assert len(api.jwt_requests) == 2


# --- environment -------------------------------------------------------------------------------

FULL = {
    "NHI_BROKER_URL": "https://localhost:8443",
    "NHI_AUDIENCE": AUDIENCE,
    "SPIFFE_ENDPOINT_SOCKET": "unix:///run/agent.sock",
}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"NHI_BROKER_URL": None}, r"NHI_BROKER_URL is not set.*https://localhost:8443"),
        ({"NHI_BROKER_URL": "  "}, "NHI_BROKER_URL is not set"),
        ({"NHI_AUDIENCE": None}, "NHI_AUDIENCE is not set"),
        ({"SPIFFE_ENDPOINT_SOCKET": None}, "no SVID: set SPIFFE_ENDPOINT_SOCKET.*NHI_TOKEN_FILE"),
        (
            {"SPIFFE_ENDPOINT_SOCKET": None, "NHI_TOKEN_FILE": "/t"},
            "nothing to trust.*NHI_CA_FILE",
        ),
        (
            {"SPIFFE_ENDPOINT_SOCKET": None, "NHI_TOKEN_FILE": "/t", "NHI_CA_FILE": "/c", "NHI_MTLS": "1"},
            "NHI_MTLS",
        ),
        ({"NHI_MTLS": "maybe"}, "NHI_MTLS must be"),
        ({"NHI_BROKER_URL": "http://localhost:8443"}, "https://host:port"),
        ({"NHI_BROKER_URL": "https://"}, "https://host:port"),
        ({"NHI_BROKER_URL": "https://me@localhost"}, "no user"),
        ({"NHI_BROKER_URL": "https://localhost?x=1"}, "no user, query"),
    ],
)
def test_a_missing_or_wrong_variable_is_named_with_its_mend(
    changes: dict[str, str | None], says: str
) -> None:
    environ = {name: value for name, value in {**FULL, **changes}.items() if value is not None}
    for client_of in (Broker, AsyncBroker):
        with pytest.raises(ConfigurationError, match=says):
            client_of.from_env(environ)


def test_a_token_file_goes_before_the_workload_api(tmp_path: Path, token: str) -> None:
    path = tmp_path / "svid.jwt"
    path.write_text(token)
    with Broker.from_env({**FULL, "NHI_TOKEN_FILE": str(path)}) as broker:
        assert isinstance(broker._session._svid, TokenFileSource)
        assert isinstance(broker._session._trust, WorkloadApiSource)


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in FULL.items():
        monkeypatch.setenv(name, value)
    Broker.from_env().close()


def test_a_client_without_any_way_to_authenticate_is_refused(ca_file: Path) -> None:
    with pytest.raises(ConfigurationError, match="nothing to authenticate"):
        Broker("https://localhost", svid=None, audience=None, trust=CaFile(ca_file))
    with pytest.raises(ConfigurationError, match="NHI_AUDIENCE"):
        Broker("https://localhost", svid=StaticSource(jwt_svid()), audience="", trust=CaFile(ca_file))
