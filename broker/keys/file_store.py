"""The embedded key store: one 0600 JSON file, shared by every process on one host.

The file is the truth and memory a copy of it: each use compares the file's fingerprint
(one system call), so a key that one process rotated in or threw out is that for every
process at its next use. A file that vanished or was damaged stops signing and sealing:
going on would seal under keys that no restart can find again.
"""

from __future__ import annotations

import base64
import contextlib
import hmac
import math
import secrets
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import orjson
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from broker.keys import key_file, token_keys
from broker.keys.key_file import KeyStoreError
from broker.keys.keyring import AuditKey, Keyring, SymmetricKey
from broker.keys.token_keys import Phase, TokenKeyPolicy

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    from broker.core.clock import Clock
    from broker.core.ports import VerificationKey
    from broker.keys.key_file import Fingerprint

_ID_BYTES: Final = 4
_NONCE_BYTES: Final = 12
_HEADERS_KEPT: Final = 64


class _Live:
    """One version of the file, ready for use: keys loaded, headers encoded."""

    __slots__ = (
        "audit_key_id",
        "audit_keys",
        "audit_private",
        "digest_keys",
        "fingerprint",
        "headers",
        "keyring",
        "sealers",
        "signers",
        "verification_keys",
    )

    def __init__(self, keyring: Keyring, fingerprint: Fingerprint) -> None:
        self.keyring = keyring
        self.fingerprint = fingerprint
        self.headers: dict[tuple[str, str], bytes] = {}
        self.signers = {
            key.algorithm: (key.kid, token_keys.signer(key.private))
            for key in keyring.token
            if key.phase is Phase.CURRENT
        }
        self.verification_keys = tuple(key.verification_key() for key in keyring.token)
        in_use = keyring.audit[-1]
        if in_use.private is None:
            raise KeyStoreError("no audit key can sign")
        self.audit_key_id = in_use.id
        self.audit_private = Ed25519PrivateKey.from_private_bytes(in_use.private.reveal())
        self.audit_keys = {key.id: key.public for key in keyring.audit}
        self.digest_keys = [(f"{key.id}:", key.key.reveal()) for key in reversed(keyring.digest)]
        self.sealers = {bytes.fromhex(key.id): AESGCM(key.key.reveal()) for key in keyring.sealing}


class FileKeyStore:
    """`broker.core.ports.KeyStore` on one file.

    Safe for concurrent use by threads and by processes of one host and user. `rotate_*`,
    `revoke_*` and the first use of an algorithm write the file and may make an RSA key:
    call them from a thread, and ask for an algorithm at start-up rather than in a request.

    Args:
        path: the key file; ``<path>.lock`` and, for a moment, ``<path>.new`` lie beside it.
        clock: stamps keys made or revoked outside `rotate_token_keys`.
        policy: how long token keys live.
        create: whether to make the file where there is none. A broker whose ledger has
            rows must not: new keys could not unseal what the ledger holds.
        recheck_seconds: how long another process's change of the file may go unseen; 0 looks at
            every use, which costs a system call each.

    Raises:
        KeyStoreError: the file is missing, damaged, or others could read or write it.

    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        clock: Clock,
        *,
        policy: TokenKeyPolicy | None = None,
        create: bool = True,
        recheck_seconds: float = 0,
    ) -> None:
        self._path = Path(path)
        self._text_path = str(self._path)  # what lstat takes fastest
        self._clock = clock
        self._policy = policy or TokenKeyPolicy()
        self._recheck_seconds = recheck_seconds
        self._checked_at = -math.inf
        if create and not self._exists():
            self._create()
        self._live = self._load()

    def __repr__(self) -> str:
        return f"FileKeyStore({self._text_path!r})"

    # --- tokens -------------------------------------------------------------------------------

    @property
    def jwks_cache_seconds(self) -> int:
        """How long verifiers may cache `token_keys`; rotation counts on it."""
        return self._policy.jwks_cache_seconds

    def sign_token(self, header: Mapping[str, object], payload: bytes, *, algorithm: str) -> str:
        """Return a JWS compact serialization; `header` gets the current key's `kid` and `alg`.

        The first use of an algorithm makes its key, durably, before anything is signed with it.

        Raises:
            ValueError: the algorithm is not one of ours, or `header` sets `alg` or `kid`.
            KeyStoreError: the file cannot be read or written.

        """
        live = self._current()
        if algorithm not in live.signers:
            live = self._start_algorithm(algorithm)
        kid, sign = live.signers[algorithm]
        typ = header.get("typ") if len(header) == 1 else None
        prefix = live.headers.get((algorithm, typ)) if isinstance(typ, str) else None
        if prefix is None:
            prefix = _encode_header(header, algorithm, kid)
            if isinstance(typ, str) and len(live.headers) < _HEADERS_KEPT:
                live.headers[algorithm, typ] = prefix
        signed = prefix + base64.urlsafe_b64encode(payload).rstrip(b"=")
        return (signed + b"." + base64.urlsafe_b64encode(sign(signed)).rstrip(b"=")).decode("ascii")

    def token_keys(self) -> tuple[VerificationKey, ...]:
        """Return every public key that may verify a live token: next, current and retiring.

        The same tuple object until something changes.
        """
        return self._current().verification_keys

    def rotate_token_keys(self, now_ms: int) -> bool:
        """Advance next -> current -> retiring where due.

        Returns whether this call changed anything: of several processes exactly one gets True.
        """

        def advance(keyring: Keyring) -> Keyring:
            token = token_keys.advance(keyring.token, now_ms, self._policy)
            return keyring if token is keyring.token else replace(keyring, token=token)

        keyring = self._current().keyring
        return token_keys.is_due(keyring.token, now_ms, self._policy) and self._change(advance)

    def revoke_token_key(self, kid: str) -> bool:
        """Drop one token key at once, private and public: what it signed verifies nowhere of ours.

        Where it was signing, its successor or a fresh key signs from now on. Verifiers that
        cached the JWKS go on accepting it until their cache ends. Returns whether it was there.
        """
        return bool(self._revoke(lambda key: key == kid))

    def revoke_all_token_keys(self) -> tuple[str, ...]:
        """Drop every token key and make fresh ones; after a restore, or when the file leaked.

        Returns the ids dropped.
        """
        return self._revoke(lambda _kid: True)

    # --- audit --------------------------------------------------------------------------------

    def sign_audit_head(self, head: bytes) -> tuple[str, bytes]:
        """Return (key id, Ed25519 signature) over a canonical audit head."""
        live = self._current()
        return live.audit_key_id, live.audit_private.sign(head)

    def audit_keys(self) -> Mapping[str, bytes]:
        """Return every audit public key, raw 32 bytes by key id, retired ones included."""
        return dict(self._current().audit_keys)

    def rotate_audit_key(self) -> str:
        """Sign heads with a new key from now on; return its id. The old private half is destroyed."""
        fresh = AuditKey.new()
        self._change(
            lambda keyring: replace(
                keyring, audit=(*(replace(key, private=None) for key in keyring.audit), fresh)
            )
        )
        return fresh.id

    # --- digests and sealing ------------------------------------------------------------------

    def digest(self, secret: bytes) -> str:
        """Return ``<key id>:<HMAC-SHA256 hex>``: finds a leaked secret's lease without storing it."""
        key_id, key = self._current().digest_keys[0]
        return key_id + hmac.digest(key, secret, "sha256").hex()

    def digests(self, secret: bytes) -> tuple[str, ...]:
        """Return the digest under every key there was, newest first: what to look a leaked secret up by."""
        return tuple(
            key_id + hmac.digest(key, secret, "sha256").hex() for key_id, key in self._current().digest_keys
        )

    def rotate_digest_key(self) -> str:
        """Digest with a new key from now on; return its id. Old keys are kept for lookups."""
        fresh = SymmetricKey.new()
        self._change(lambda keyring: replace(keyring, digest=(*keyring.digest, fresh)))
        return fresh.id

    def seal(self, plaintext: bytes, context: bytes) -> bytes:
        """Encrypt with authenticated `context` (AES-256-GCM): key id, nonce, ciphertext.

        The nonce is random: rotate the sealing key well before 2^32 values (SP 800-38D §8.3).
        """
        sealers = self._current().sealers
        key_id = next(reversed(sealers))
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return key_id + nonce + sealers[key_id].encrypt(nonce, plaintext, key_id + context)

    def unseal(self, sealed: bytes, context: bytes) -> bytes:
        """Decrypt what `seal` made, under whichever key it was made with.

        Raises:
            ValueError: `sealed` or `context` is not what it was, or its key is not in this file.

        """
        key_id, nonce = sealed[:_ID_BYTES], sealed[_ID_BYTES : _ID_BYTES + _NONCE_BYTES]
        sealer = self._current().sealers.get(key_id)
        if sealer is None or len(nonce) != _NONCE_BYTES:
            raise ValueError("this was not sealed under a key of this store")
        try:
            return sealer.decrypt(nonce, sealed[_ID_BYTES + _NONCE_BYTES :], key_id + context)
        except InvalidTag:
            raise ValueError("the sealed value or its context was changed") from None

    def rotate_sealing_key(self) -> str:
        """Seal with a new key from now on; return its id. Old keys are kept to unseal."""
        fresh = SymmetricKey.new()
        self._change(lambda keyring: replace(keyring, sealing=(*keyring.sealing, fresh)))
        return fresh.id

    def derive(self, label: str) -> bytes:
        """Return 32 stable bytes for one purpose (HKDF-SHA256).

        From the first digest key there ever was: rotation must not change what is derived.
        """
        _key_id, first = self._current().digest_keys[-1]
        info = b"nhi-broker derive " + label.encode()
        return HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(first)

    # --- the file -----------------------------------------------------------------------------

    def _current(self) -> _Live:
        """Return the keys as the file has them now, or had them `recheck_seconds` ago."""
        live = self._live
        now = time.monotonic()
        if now - self._checked_at < self._recheck_seconds:
            return live
        self._checked_at = now
        if key_file.fingerprint(self._text_path) != live.fingerprint:
            live = self._live = self._load()
        return live

    def _exists(self) -> bool:
        # A symbolic link to nowhere counts as existing, so that opening it refuses it.
        return self._path.is_symlink() or self._path.exists()

    def _load(self) -> _Live:
        content, fingerprint = key_file.read(self._path)
        keyring: Keyring | None = None
        # A parser's error may carry what it read: none travels along as the context of ours.
        with contextlib.suppress(KeyError, TypeError, ValueError):
            keyring = Keyring.from_json(content)
        if keyring is None:
            raise KeyStoreError(f"the key file {self._path} is damaged: restore it from its backup")
        return _Live(keyring, fingerprint)

    def _create(self) -> None:
        with key_file.locked(self._path):
            if self._exists():
                return  # another process was faster
            now_ms = self._clock.now_ms()
            first = token_keys.generate(
                "ES256", Phase.CURRENT, now_ms=now_ms, activates_ms=now_ms, policy=self._policy
            )
            keyring = Keyring(
                token=(first,),
                audit=(AuditKey.new(),),
                digest=(SymmetricKey.new(),),
                sealing=(SymmetricKey.new(),),
            )
            key_file.replace(self._path, keyring.to_json())

    def _change(self, change: Callable[[Keyring], Keyring]) -> bool:
        """Apply `change` to the file as it is under the lock; say whether it changed anything."""
        with key_file.locked(self._path):
            live = self._load()
            changed = change(live.keyring)
            differs = changed is not live.keyring
            if differs:
                key_file.replace(self._path, changed.to_json())
                live = self._load()
            self._live = live
        return differs

    def _start_algorithm(self, algorithm: str) -> _Live:
        """Make the first key of an algorithm, which signs at once: there is nobody to wait for."""
        now_ms = self._clock.now_ms()

        def add(keyring: Keyring) -> Keyring:
            if any(key.algorithm == algorithm for key in keyring.token):
                return keyring  # another process was faster
            key = token_keys.generate(
                algorithm, Phase.CURRENT, now_ms=now_ms, activates_ms=now_ms, policy=self._policy
            )
            return replace(keyring, token=(*keyring.token, key))

        self._change(add)
        return self._live

    def _revoke(self, chosen: Callable[[str], bool]) -> tuple[str, ...]:
        now_ms = self._clock.now_ms()
        gone: tuple[str, ...] = ()

        def revoke(keyring: Keyring) -> Keyring:
            nonlocal gone
            gone = tuple(key.kid for key in keyring.token if chosen(key.kid))
            if not gone:
                return keyring
            return replace(keyring, token=token_keys.drop(keyring.token, gone, now_ms, self._policy))

        self._change(revoke)
        return gone


def _encode_header(header: Mapping[str, object], algorithm: str, kid: str) -> bytes:
    if "alg" in header or "kid" in header:
        raise ValueError("the key store sets alg and kid itself")
    encoded = orjson.dumps({"alg": algorithm, "kid": kid, **header})
    return base64.urlsafe_b64encode(encoded).rstrip(b"=") + b"."
