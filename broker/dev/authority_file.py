"""Keeps a development trust domain's keys in one 0600 file, so that a restart keeps the domain."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import orjson
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from broker.dev.authority import Authority

if TYPE_CHECKING:
    from pathlib import Path

_OTHERS: Final = 0o077
_REMEDY: Final = "delete it to begin a new trust domain"


class AuthorityFileError(RuntimeError):
    """The file cannot be used; the message says why and what to do, and shows none of it."""


@dataclass(frozen=True, slots=True)
class Authorities:
    """Every authority of the bundle, the one that signs first.

    Attributes:
        sequence: rises with each change.

    """

    trust_domain: str
    sequence: int
    generations: tuple[Authority, ...]

    @property
    def current(self) -> Authority:
        """The one that signs."""
        return self.generations[0]


def load_authorities(path: Path, trust_domain: str) -> Authorities | None:
    """Read the file; None where there is none.

    Raises:
        AuthorityFileError: others may read it, it is damaged, or it is another trust domain's.

    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        if os.fstat(file.fileno()).st_mode & _OTHERS:
            msg = f"{path} holds private keys and others may read it: chmod 600 it, or {_REMEDY}"
            raise AuthorityFileError(msg)
        content = file.read()
    try:
        found = _parse(content)
    except (ValueError, KeyError, TypeError) as error:
        msg = f"{path} is damaged: {_REMEDY}"
        raise AuthorityFileError(msg) from error
    if found.trust_domain != trust_domain:
        msg = f"{path} belongs to trust domain {found.trust_domain}, not {trust_domain}: {_REMEDY}"
        raise AuthorityFileError(msg)
    return found


def save_authorities(path: Path, authorities: Authorities) -> None:
    """Write the file, whole or not at all."""
    document = {
        "trust_domain": authorities.trust_domain,
        "sequence": authorities.sequence,
        "generations": [_to_json(authority) for authority in authorities.generations],
    }
    staging = path.with_name(f"{path.name}.new")
    staging.unlink(missing_ok=True)
    descriptor = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(orjson.dumps(document, option=orjson.OPT_INDENT_2))
        file.flush()
        os.fsync(file.fileno())
    staging.replace(path)


def _to_json(authority: Authority) -> dict[str, str | int | None]:
    return {
        "certificate": authority.certificate.public_bytes(serialization.Encoding.PEM).decode("ascii"),
        "key": _to_pem(authority.key),
        "jwt_key": _to_pem(authority.jwt_key),
        "forget_ms": authority.forget_ms,
    }


def _to_pem(key: ec.EllipticCurvePrivateKey) -> str:
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return pem.decode("ascii")


def _parse(content: bytes) -> Authorities:
    document = orjson.loads(content)
    generations = tuple(
        Authority(
            certificate=x509.load_pem_x509_certificate(entry["certificate"].encode()),
            key=_from_pem(entry["key"]),
            jwt_key=_from_pem(entry["jwt_key"]),
            forget_ms=entry["forget_ms"],
        )
        for entry in document["generations"]
    )
    if not generations:
        raise ValueError("no authority")
    return Authorities(document["trust_domain"], int(document["sequence"]), generations)


def _from_pem(text: str) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(text.encode(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TypeError("not an elliptic-curve key")
    return key
