"""A real audit log in a SQLite file with a second place beside it, and keys drawn for one test."""

from __future__ import annotations

import os
import sqlite3
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from broker.core.audit import AuditKind, AuditRecord
from broker.core.ids import DecisionId, LeaseId, TaskId
from inventory.audit.chain import AuditRow, ChainHead, append
from inventory.audit.heads import HeadCopy, HeadSigner, SignedHead
from inventory.audit.public_keys import PublicKeys
from inventory.audit.text import SealedText
from inventory.audit.verify import verify_database

if TYPE_CHECKING:
    from pathlib import Path

    from inventory.audit.report import VerificationReport

START_MS = 1_700_000_000_000
SLOTS = (0, 1)
RECORDS_PER_SLOT = 25
HEAD_EVERY = 5


class MemoryKeys:
    """The audit half of the key store, with keys drawn for one test."""

    def __init__(self, key_id: str = "audit-1") -> None:
        self._key_id = key_id
        self._signing = Ed25519PrivateKey.generate()
        self._sealing = AESGCM(os.urandom(32))

    def sign_audit_head(self, head: bytes) -> tuple[str, bytes]:
        return self._key_id, self._signing.sign(head)

    def audit_keys(self) -> dict[str, bytes]:
        return {self._key_id: self._signing.public_key().public_bytes_raw()}

    def seal(self, plaintext: bytes, context: bytes) -> bytes:
        nonce = os.urandom(12)
        return nonce + self._sealing.encrypt(nonce, plaintext, context)

    def unseal(self, sealed: bytes, context: bytes) -> bytes:
        try:
            return self._sealing.decrypt(sealed[:12], sealed[12:], context)
        except InvalidTag as error:
            raise ValueError("changed") from error


@dataclass
class Log:
    """A ledger's audit tables in a SQLite file, and the heads copied to a second place."""

    root: Path
    keys: MemoryKeys
    origin: str
    heads: dict[int, ChainHead] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.path = self.root / "ledger.sqlite"
        self.copy = HeadCopy(self.root / "second-place")
        self.signer = HeadSigner(self.keys, self.origin)
        # No primary key: a tamperer is not bound by the constraints of the schema.
        self.execute(
            "CREATE TABLE audit (slot, seq, at_ms, kind, actor, lease_id, task_id, identity, decision_id, "
            "body, hash)"
        )
        self.execute("CREATE TABLE audit_text (slot, seq, name, salt, sealed)")

    @property
    def public(self) -> PublicKeys:
        return PublicKeys(self.origin, self.keys.audit_keys())

    def execute(self, sql: str, *parameters: Any) -> list[Any]:
        connection = sqlite3.connect(self.path)
        try:
            with connection:
                return connection.execute(sql, parameters).fetchall()
        finally:
            connection.close()

    def insert(self, row: AuditRow) -> None:
        self.execute("INSERT INTO audit VALUES (?,?,?,?,?,?,?,?,?,?,?)", *row)

    def append(self, slot: int, record: AuditRecord) -> AuditRow:
        head, row, texts = append(self.heads.get(slot, ChainHead(slot)), record, self.keys)
        self.heads[slot] = head
        self.insert(row)
        for text in texts:
            self.execute("INSERT INTO audit_text VALUES (?,?,?,?,?)", *text)
        return row

    def copy_head(self, slot: int, at_ms: int) -> SignedHead:
        signed = self.signer.sign(self.heads[slot], at_ms)
        self.copy.append(signed)
        return signed

    def row(self, slot: int, seq: int) -> AuditRow:
        return AuditRow(*self.execute("SELECT * FROM audit WHERE slot=? AND seq=?", slot, seq)[0])

    def rows(self) -> list[AuditRow]:
        return [AuditRow(*row) for row in self.execute("SELECT * FROM audit ORDER BY slot, seq")]

    def text(self, slot: int, seq: int, name: str) -> SealedText:
        found = self.execute("SELECT * FROM audit_text WHERE slot=? AND seq=? AND name=?", slot, seq, name)
        return SealedText(*found[0])

    def verify(self, *, copy: bool = True) -> VerificationReport:
        return verify_database(self.path, self.public, self.copy.read_all() if copy else None)


def record(number: int, *, at_ms: int | None = None, text: dict[str, str] | None = None) -> AuditRecord:
    return AuditRecord(
        kind=AuditKind.LEASE_MOVED if number % 2 else AuditKind.DECISION,
        at_ms=START_MS + number * 100 if at_ms is None else at_ms,
        actor="spiffe://example.org/agent/reporter",
        lease_id=LeaseId.new() if number % 2 else None,
        task_id=TaskId.new(),
        identity="spiffe://example.org/agent/reporter",
        decision_id=DecisionId.new(),
        fields={
            "number": number,
            "from": "intent",
            "to": "active",
            "policies": ["team-owns"],
            "inline": False,
        },
        text=text or {},
    )
