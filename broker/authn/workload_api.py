"""The broker's own X.509-SVID and its trust bundles, from the SPIFFE Workload API.

This uses the `spiffe` package's generated stubs and not its client class, because that
class returns parsed objects: they have lost ``use`` and ``alg`` of the keys (J-14), have
lower-cased trust domains (ID-5), and one malformed federated bundle ends the whole stream.

An agent that restarts, refuses for a while, or is gone takes nothing away from a running
broker: what was received stays in force until it expires or is replaced.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

import grpc
import structlog
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_private_key,
)
from cryptography.x509 import (
    ExtensionNotFound,
    SubjectAlternativeName,
    UniformResourceIdentifier,
)
from spiffe._proto import workload_pb2, workload_pb2_grpc

from broker.authn.explain import shown
from broker.authn.trust_bundle import (
    BundleError,
    TrustBundle,
    parse_der_certificates,
    parse_jwks,
    parse_x509_der,
    trust_domain_name,
)
from broker.core.clock import MS_PER_SECOND
from broker.core.secret import Secret
from broker.core.spiffe_id import SCHEME, SpiffeId

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

    from broker.authn.bundles import BundleStore

BACKOFF_SECONDS_MIN: Final = 0.1
BACKOFF_SECONDS_MAX: Final = 5.0
_METADATA: Final = (("workload.spiffe.io", "true"),)
"""Proves to the agent that no browser or proxy was tricked into this call (Workload API §3)."""

# grpc's own reconnection must not be slower than ours: by default it waits for two minutes.
_CHANNEL_OPTIONS: Final = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.enable_http_proxy", 0),
)

_log: Final = structlog.get_logger(__name__)


class OwnSvidError(ValueError):
    """What the Workload API sent as our X.509-SVID cannot be used."""


@dataclass(frozen=True, slots=True)
class OwnSvid:
    """The broker's own X.509-SVID: its server certificate.

    Attributes:
        chain_pem: leaf first.
        key_pem: PKCS #8, unencrypted.
        not_after_ms: when the leaf expires.

    """

    spiffe_id: SpiffeId
    chain_pem: bytes
    key_pem: Secret[bytes]
    not_after_ms: int


_A = TypeVar("_A")
RotationCallback: TypeAlias = "Callable[[OwnSvid], None]"


def parse_own_svid(spiffe_id: str, chain_der: bytes, key_der: bytes) -> OwnSvid:
    """Return one X509-SVID of a Workload API answer.

    Raises:
        OwnSvidError: it is malformed, key and certificate do not fit, or the leaf names another ID.

    """
    try:
        chain = parse_der_certificates(chain_der)
        parsed_id = SpiffeId.parse(spiffe_id)
        key = load_der_private_key(key_der, None)
        if not chain:
            raise OwnSvidError("the chain is empty")
        names = chain[0].extensions.get_extension_for_class(SubjectAlternativeName).value
        public_key = chain[0].public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm, ExtensionNotFound) as error:
        raise OwnSvidError(f"the X.509-SVID cannot be read: {type(error).__name__}") from error
    if names.get_values_for_type(UniformResourceIdentifier) != [parsed_id]:
        raise OwnSvidError("the leaf names another SPIFFE ID than the Workload API says")
    spki = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if key.public_key().public_bytes(*spki) != public_key.public_bytes(*spki):
        raise OwnSvidError("the private key is not the leaf's")
    return OwnSvid(
        spiffe_id=parsed_id,
        chain_pem=b"".join(certificate.public_bytes(Encoding.PEM) for certificate in chain),
        key_pem=Secret(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())),
        not_after_ms=int(chain[0].not_valid_after_utc.timestamp()) * MS_PER_SECOND,
    )


def _target(socket_path: str) -> str:
    path = socket_path.removeprefix("unix:")
    if not path.startswith("/"):
        raise ValueError("the Workload API address is an absolute socket path or unix:///path")
    return "unix:/" + path.lstrip("/")


class WorkloadApiSource:
    """A `BundleSource` that also keeps the broker's own X.509-SVID current."""

    def __init__(self, socket_path: str, spiffe_id: SpiffeId | None = None) -> None:
        """Keep the parts; nothing is connected before `run`.

        Args:
            socket_path: absolute path of the socket, or ``unix:///path``.
            spiffe_id: which SVID is ours. An agent may hold several for one process and their
                order means nothing, so None is only good where there is exactly one.

        Raises:
            ValueError: `socket_path` is not a Unix socket's.

        """
        self._socket = _target(socket_path)
        self._spiffe_id = spiffe_id
        self._svid: OwnSvid | None = None
        self._callbacks: list[RotationCallback] = []
        self._x509: dict[str, TrustBundle] = {}
        self._jwt: dict[str, TrustBundle] = {}
        self._published: set[str] = set()
        self._problems: dict[str, str] = {}
        self._closed = asyncio.Event()
        self._have_svid = asyncio.Event()
        self._have_jwt_bundles = asyncio.Event()

    # --- what others ask ------------------------------------------------------------------------

    def svid(self) -> OwnSvid | None:
        """Return our own X.509-SVID, None before the first one arrived."""
        return self._svid

    def on_rotation(self, callback: RotationCallback) -> None:
        """Call `callback` on the loop with every new SVID, the first one included."""
        self._callbacks.append(callback)

    @property
    def problems(self) -> Mapping[str, str]:
        """What is wrong now, by part; empty when all is well. For ``/readyz`` and ``nhi doctor``."""
        return dict(self._problems)

    async def wait_ready(self) -> None:
        """Return once our own SVID and the JWT bundles have arrived. The caller sets the timeout."""
        await self._have_svid.wait()
        await self._have_jwt_bundles.wait()

    # --- BundleSource -----------------------------------------------------------------------------

    async def run(self, store: BundleStore) -> None:
        """Follow both streams until `close`, however often the agent goes away."""
        async with grpc.aio.insecure_channel(self._socket, options=_CHANNEL_OPTIONS) as channel:
            stub = workload_pb2_grpc.SpiffeWorkloadAPIStub(channel)  # type: ignore[no-untyped-call]  # generated

            def x509_answers() -> AsyncIterator[workload_pb2.X509SVIDResponse]:
                request = workload_pb2.X509SVIDRequest()
                return aiter(stub.FetchX509SVID(request, metadata=_METADATA))

            def jwt_answers() -> AsyncIterator[workload_pb2.JWTBundlesResponse]:
                request = workload_pb2.JWTBundlesRequest()
                return aiter(stub.FetchJWTBundles(request, metadata=_METADATA))

            streams = [
                asyncio.create_task(
                    self._follow("x509-svid", x509_answers, lambda answer: self._take_x509(store, answer))
                ),
                asyncio.create_task(
                    self._follow("jwt-bundles", jwt_answers, lambda answer: self._take_jwt(store, answer))
                ),
            ]
            try:
                await self._closed.wait()
            finally:
                for stream in streams:
                    stream.cancel()
                await asyncio.gather(*streams, return_exceptions=True)

    async def close(self) -> None:
        """End `run`."""
        self._closed.set()

    # --- streams ----------------------------------------------------------------------------------

    async def _follow(
        self, part: str, answers: Callable[[], AsyncIterator[_A]], take: Callable[[_A], None]
    ) -> None:
        """Give every answer of one stream to `take`, opening the stream again whenever it ends."""
        backoff_seconds = BACKOFF_SECONDS_MIN
        while True:
            try:
                async for answer in answers():
                    self._problems.pop(part, None)
                    take(answer)
                    backoff_seconds = BACKOFF_SECONDS_MIN
                self._report(part, "the agent ended the stream")
            except grpc.aio.AioRpcError as error:
                self._report(part, f"the agent answers {error.code().name}: {shown(error.details())}")
            except Exception:  # noqa: BLE001  an answer nobody foresaw must not end rotation for good
                self._report(part, "an answer of the agent could not be used")
                _log.exception("workload_api_answer_failed", part=part)
            await asyncio.sleep(backoff_seconds * random.uniform(0.5, 1))  # noqa: S311  jitter, no secret
            backoff_seconds = min(backoff_seconds * 2, BACKOFF_SECONDS_MAX)

    def _take_x509(self, store: BundleStore, answer: workload_pb2.X509SVIDResponse) -> None:
        if not answer.svids:
            self._report("x509-svid", "the agent sent no X.509-SVID")
            return
        # A domain's own bundle after the federated ones: it wins over a federated one of that name.
        documents = dict(answer.federated_bundles)
        documents.update({_trust_domain_of(svid.spiffe_id): svid.bundle for svid in answer.svids})
        self._x509 = self._parse_all("x509-bundle", documents, parse_x509_der, self._x509)
        self._publish(store)
        try:
            svid = self._choose(answer.svids)
        except OwnSvidError as error:
            self._report("x509-svid", str(error))
            return
        self._rotate(svid)

    def _take_jwt(self, store: BundleStore, answer: workload_pb2.JWTBundlesResponse) -> None:
        self._jwt = self._parse_all("jwt-bundle", answer.bundles, parse_jwks, self._jwt)
        self._publish(store)
        self._have_jwt_bundles.set()

    def _parse_all(
        self,
        part: str,
        documents: Mapping[str, bytes],
        parse: Callable[[str, bytes], TrustBundle],
        held: Mapping[str, TrustBundle],
    ) -> dict[str, TrustBundle]:
        """Parse the bundle of every trust domain; one that is malformed keeps what it had."""
        parsed: dict[str, TrustBundle] = {}
        for key, document in documents.items():
            try:
                name = trust_domain_name(key)
            except BundleError as error:
                self._report(f"{part} {shown(key)}", str(error))
                continue
            try:
                parsed[name] = parse(name, document)
                self._problems.pop(f"{part} {name}", None)
            except BundleError as error:
                self._report(f"{part} {name}", str(error))
                if name in held:
                    parsed[name] = held[name]
        return parsed

    def _publish(self, store: BundleStore) -> None:
        """Join both halves per trust domain; a domain that is in neither is trusted no more."""
        names = self._x509.keys() | self._jwt.keys()
        for name in sorted(names):
            by_x509 = self._x509.get(name, TrustBundle(trust_domain=name))
            by_jwt = self._jwt.get(name, TrustBundle(trust_domain=name))
            store.replace(
                name,
                replace(by_x509, jwt_keys=by_jwt.jwt_keys, ignored=by_x509.ignored + by_jwt.ignored),
            )
        for name in self._published - names:
            store.remove(name)
        self._published = set(names)

    def _choose(self, svids: Sequence[workload_pb2.X509SVID]) -> OwnSvid:
        """Return the SVID that is ours, by its SPIFFE ID and never by its place."""
        if self._spiffe_id is None and len({svid.spiffe_id for svid in svids}) > 1:
            raise OwnSvidError(
                f"the agent offers {len(svids)} identities: configure which SPIFFE ID is the broker's"
            )
        ours = [svid for svid in svids if self._spiffe_id in (None, svid.spiffe_id)]
        if not ours:
            raise OwnSvidError(f"the agent offers no X.509-SVID for {self._spiffe_id}")
        parsed = [parse_own_svid(svid.spiffe_id, svid.x509_svid, svid.x509_svid_key) for svid in ours]
        return max(parsed, key=lambda svid: svid.not_after_ms)

    def _rotate(self, svid: OwnSvid) -> None:
        if self._svid is not None and self._svid.chain_pem == svid.chain_pem:
            return
        self._svid = svid
        self._have_svid.set()
        _log.info("own_svid_rotated", spiffe_id=svid.spiffe_id, not_after_ms=svid.not_after_ms)
        for callback in tuple(self._callbacks):
            try:
                callback(svid)
            except Exception:  # noqa: BLE001  one listener's bug must not keep the others from the new SVID
                _log.exception("own_svid_callback_failed")

    def _report(self, part: str, problem: str) -> None:
        if self._problems.get(part) != problem:
            self._problems[part] = problem
            _log.warning("workload_api_problem", part=part, problem=problem)


def _trust_domain_of(spiffe_id: str) -> str:
    """Return the key under which an SVID's own bundle is filed; parsing it refuses what is no ID."""
    return spiffe_id.removeprefix(SCHEME).partition("/")[0]
