"""A contract server for each test, and clients on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from nhi_sdk import AsyncBroker, Broker, CaFile, RetryPolicy, StaticSource
from tests.unit.sdk.contract_server import ContractServer
from tests.unit.sdk.pki import AUDIENCE, Authority, jwt_svid

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

QUICK = RetryPolicy(pause_seconds_base=0.001, pause_seconds_max=0.001)


@pytest.fixture(scope="session")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="session")
def server_pem(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Path:
    leaf = authority.issue("spiffe://example.test/nhi-broker", hosts=("127.0.0.1", "localhost"))
    return leaf.write(tmp_path_factory.mktemp("server"), "server")


@pytest.fixture
def token() -> str:
    return jwt_svid()


@pytest.fixture
def server(server_pem: Path, authority: Authority, token: str) -> Iterator[ContractServer]:
    made = ContractServer(server_pem, client_ca=authority.pem())
    made.tokens.add(token)
    with made.running():
        yield made


@pytest.fixture
def ca_file(authority: Authority, tmp_path: Path) -> Path:
    path = tmp_path / "ca.pem"
    path.write_text(authority.pem())
    return path


@pytest.fixture
def options(token: str, ca_file: Path) -> dict[str, Any]:
    return {
        "svid": StaticSource(token),
        "audience": AUDIENCE,
        "trust": CaFile(ca_file),
        "retry": QUICK,
    }


@pytest.fixture
def pauses() -> list[float]:
    """Every pause a client takes between attempts; none is waited for."""
    return []


@pytest.fixture
def broker(server: ContractServer, options: dict[str, Any], pauses: list[float]) -> Iterator[Broker]:
    with Broker(server.url, **options) as client:
        client._sleep = pauses.append
        yield client


@pytest.fixture
async def async_broker(
    server: ContractServer, options: dict[str, Any], pauses: list[float]
) -> AsyncIterator[AsyncBroker]:
    async def pause(seconds: float) -> None:
        pauses.append(seconds)

    async with AsyncBroker(server.url, **options) as client:
        client._sleep = pause
        yield client


@pytest.fixture
def environ(server: ContractServer, token: str, ca_file: Path, tmp_path: Path) -> dict[str, str]:
    """Variables for a client in another process."""
    token_file = tmp_path / "svid.jwt"
    token_file.write_text(token)
    return {
        "NHI_BROKER_URL": server.url,
        "NHI_AUDIENCE": AUDIENCE,
        "NHI_TOKEN_FILE": str(token_file),
        "NHI_CA_FILE": str(ca_file),
    }


@pytest.fixture
def leaks(server: ContractServer) -> Callable[[str], list[str]]:
    """Return the secrets of the server's credentials that a text shows, escaped or not."""
    return lambda text: [one for one in server.passwords if one[:16] in text]
