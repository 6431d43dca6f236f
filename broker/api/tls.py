"""The workload listener's TLS: contexts that rotate while they listen, and the peer's chain.

TLS 1.3 only. No session tickets: a resumed session carries no intermediates and was not
verified against the bundles of today. A client certificate is optional (agents may send a
JWT-SVID instead), but one that OpenSSL cannot lead to an authority we hold ends the
handshake. OpenSSL takes an authority of any trust domain for any other; `broker.authn`
validates each chain again, against the bundle of its own trust domain alone.
"""

from __future__ import annotations

import os
import ssl
import sys
import tempfile
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import structlog
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from broker.core.secret import Secret

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_log: Final = structlog.get_logger(__name__)

_DER: Final = 2
"""``_ssl.ENCODING_DER``."""

_HANDSHAKE_ROUNDS_MAX: Final = 10


class TlsConfigError(ValueError):
    """Certificate and key cannot serve: unreadable, or not of each other."""


class TlsUnusableError(RuntimeError):
    """This Python does not give up the peer's certificate chain, so X.509-SVIDs cannot be checked."""


# --- the peer's chain ---------------------------------------------------------------------------


def peer_chain_der(ssl_object: Any) -> tuple[bytes, ...]:  # noqa: ANN401  SSLObject or SSLSocket
    """Return the certificates as the peer sent them, leaf first, DER; empty where it sent none.

    Public from Python 3.13 on; before that the same method sits on the wrapped object, and
    `check_chain_extraction` proves at start that it does what it should.
    """
    if ssl_object.getpeercert(binary_form=True) is None:
        return ()  # asked for the chain nevertheless, a server gets a list that holds None
    public = getattr(ssl_object, "get_unverified_chain", None)
    if public is not None:
        return tuple(public())
    chain = ssl_object._sslobj.get_unverified_chain()  # noqa: SLF001  no public way before Python 3.13
    return tuple(certificate.public_bytes(_DER) for certificate in chain)


def check_chain_extraction() -> None:
    """Prove with handshakes in memory that `peer_chain_der` sees leaf and intermediate, or nothing.

    Raises:
        TlsUnusableError: it does not; the message says on which Python.

    """
    chain_pem, key_pem, root_pem = _throwaway_chain()
    server = ServerTls(chain_pem, key_pem, [root_pem]).context
    where = f"Python {'.'.join(map(str, sys.version_info[:3]))}, {ssl.OPENSSL_VERSION}"
    try:
        seen = peer_chain_der(_handshake_in_memory(server, _self_check_client(root_pem, chain_pem, key_pem)))
        nothing = peer_chain_der(_handshake_in_memory(server, _self_check_client(root_pem)))
    except (AttributeError, TypeError, ssl.SSLError) as error:
        raise TlsUnusableError(f"the peer's certificate chain cannot be read on {where}") from error
    expected = [
        certificate.public_bytes(Encoding.DER) for certificate in x509.load_pem_x509_certificates(chain_pem)
    ]
    if list(seen) != expected or nothing:
        raise TlsUnusableError(
            f"{len(seen)} of {len(expected)} certificates of the peer's chain can be read on {where}"
        )


def _self_check_client(root_pem: bytes, *chain_and_key: bytes) -> ssl.SSLContext:
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False  # the chain is what is looked at, and the peer is ourselves
    client.verify_mode = ssl.CERT_REQUIRED
    client.load_verify_locations(cadata=root_pem.decode("ascii"))
    if chain_and_key:
        _load_chain(client, *chain_and_key)
    return client


def _handshake_in_memory(server: ssl.SSLContext, client: ssl.SSLContext) -> ssl.SSLObject:
    """Return the server's side of a finished handshake."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        client.wrap_bio(to_client, to_server, server_side=False),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(_HANDSHAKE_ROUNDS_MAX):
        waiting = 0
        for side in sides:
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                waiting += 1
        if not waiting:
            return sides[1]
    raise ssl.SSLError("the handshake does not end")


def _throwaway_chain() -> tuple[bytes, bytes, bytes]:
    """Return (leaf and intermediate, leaf key, root), PEM, of a hierarchy that nobody else trusts."""
    now = datetime.now(UTC)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(3)]
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"self-check {n}")]) for n in range(3)]
    certificates = []
    for depth, key in enumerate(keys):
        above = max(depth - 1, 0)
        builder = (
            x509.CertificateBuilder()
            .subject_name(names[depth])
            .issuer_name(names[above])
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=depth < len(keys) - 1, path_length=None), critical=True)
        )
        certificates.append(builder.sign(keys[above], hashes.SHA256()).public_bytes(Encoding.PEM))
    root, intermediate, leaf = certificates
    key_pem = keys[-1].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return leaf + intermediate, key_pem, root


# --- contexts -----------------------------------------------------------------------------------


class ServerTls:
    """A listener's TLS that follows its own certificate and the trust bundles without a restart.

    `context` stays the same object for the life of the listener; each handshake is switched to
    the context in force by the SNI callback, which OpenSSL calls whether or not the client
    named a host.

    Args:
        svid_chain_pem: own certificate first, then its intermediates.
        key_pem: its private key, PKCS #8, unencrypted.
        ca_pems: every X.509 authority of every trust bundle; none means that no client
            certificate is accepted.

    Raises:
        TlsConfigError: certificate and key cannot serve.

    """

    def __init__(
        self, svid_chain_pem: bytes, key_pem: bytes | Secret[bytes], ca_pems: Iterable[bytes]
    ) -> None:
        self._current = _server_context(svid_chain_pem, key_pem, ca_pems)
        self._listening = self._current
        self._listening.sni_callback = self._switch

    @property
    def context(self) -> ssl.SSLContext:
        """What the listener is given, once."""
        return self._listening

    def rotate(self, svid_chain_pem: bytes, key_pem: bytes | Secret[bytes], ca_pems: Iterable[bytes]) -> None:
        """Serve the next handshakes with these; established connections keep theirs.

        Raises:
            TlsConfigError: certificate and key cannot serve; the ones in force stay.

        """
        self._current = _server_context(svid_chain_pem, key_pem, ca_pems)

    def _switch(self, ssl_object: ssl.SSLObject, _server_name: str | None, _context: ssl.SSLContext) -> None:
        ssl_object.context = self._current


def _server_context(
    svid_chain_pem: bytes, key_pem: bytes | Secret[bytes], ca_pems: Iterable[bytes]
) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0
    context.verify_mode = ssl.CERT_OPTIONAL
    # An authority of a bundle is trusted as it stands, self-signed or not, as in other
    # implementations of SPIFFE.
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
    context.set_alpn_protocols(["http/1.1"])
    _load_chain(context, svid_chain_pem, key_pem.reveal() if isinstance(key_pem, Secret) else key_pem)
    for ca_pem in ca_pems:
        try:
            context.load_verify_locations(cadata=ca_pem.decode("ascii"))
        except (ssl.SSLError, ValueError) as error:
            # One authority that OpenSSL cannot read must not keep the others from rotating.
            _log.warning("a trust bundle's authority is unusable for TLS", error=str(error))
    return context


def _load_chain(context: ssl.SSLContext, chain_pem: bytes, key_pem: bytes) -> None:
    try:
        with _as_file(chain_pem + b"\n" + key_pem) as path:
            context.load_cert_chain(path, password=_no_password)
    except (ssl.SSLError, ValueError) as error:
        # OpenSSL's reason names what is wrong and quotes nothing.
        reason = error.reason if isinstance(error, ssl.SSLError) else "the key is encrypted"
        raise TlsConfigError(f"the server certificate and its key cannot be used: {reason}") from None


def _no_password() -> str:
    """Refuse an encrypted key at once: without this OpenSSL would ask on the terminal."""
    raise ValueError("the key is encrypted")


@contextmanager
def _as_file(data: bytes) -> Iterator[str]:
    """Give `data` a path, which is all `load_cert_chain` takes, for as short as can be.

    On Linux the file lives in memory and has no name but our own descriptor's. Elsewhere it
    is a 0600 file without a directory's listing of more than this moment.
    """
    create: Callable[[str], int] | None = getattr(os, "memfd_create", None)
    if create is None:
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            yield file.name
        return
    descriptor = create("tls")
    try:
        os.write(descriptor, data)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
