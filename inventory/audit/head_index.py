"""Copied heads, checked once and kept small: 40 bytes each, whatever the log's length."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from inventory.audit.chain import HASH_BYTES
from inventory.audit.heads import SignedHead, UnreadableHead, head_payload
from inventory.audit.report import FindingKind

if TYPE_CHECKING:
    from collections.abc import Iterable

    from inventory.audit.public_keys import PublicKeys
    from inventory.audit.report import Tally


class SlotHeads:
    """Numbers and hashes of one slot's genuine heads, ascending."""

    __slots__ = ("_hashes", "seqs")

    def __init__(self) -> None:
        self.seqs = array("Q")
        self._hashes = bytearray()

    def hash_at(self, index: int) -> bytes:
        """Return the hash of the head at `index` in `seqs`."""
        return bytes(self._hashes[index * HASH_BYTES : (index + 1) * HASH_BYTES])

    def add(self, seq: int, hash_: bytes) -> None:
        """Add a head with a higher number than all before."""
        self.seqs.append(seq)
        self._hashes += hash_

    @property
    def last(self) -> int:
        """Number of the last head, 0 where there is none."""
        return self.seqs[-1] if self.seqs else 0


class HeadIndex:
    """Collects heads from any number of copies and keeps those that are genuine.

    Args:
        public: the origin that heads must name and the keys that may have signed them.
        tally: where heads that are not genuine are reported.

    """

    def __init__(self, public: PublicKeys, tally: Tally) -> None:
        self._origin = public.origin
        self._keys = {name: Ed25519PublicKey.from_public_bytes(raw) for name, raw in public.keys.items()}
        self._tally = tally
        self._slots: dict[int, SlotHeads] = {}
        self.sources = 0

    def add_source(self, heads: Iterable[SignedHead | UnreadableHead]) -> None:
        """Check the heads of one copy, in the order in which they were written there."""
        self.sources += 1
        fresh: dict[int, SlotHeads] = {}
        for head in heads:
            if isinstance(head, UnreadableHead):
                self._report_unreadable(head)
            elif self._is_genuine(head):
                self._add_in_order(fresh.setdefault(head.slot, SlotHeads()), head)
        for slot, heads_of_slot in fresh.items():
            known = self._slots.get(slot)
            self._slots[slot] = heads_of_slot if known is None else self._merged(slot, known, heads_of_slot)

    def of(self, slot: int) -> SlotHeads:
        """Return a slot's genuine heads; empty where there are none."""
        return self._slots.get(slot) or SlotHeads()

    @property
    def slots(self) -> set[int]:
        """Slots that have a genuine head."""
        return set(self._slots)

    def _report_unreadable(self, head: UnreadableHead) -> None:
        if head.torn:
            self._tally.limit(
                f"{head.where}: a head was being written when its writer stopped; it was never acknowledged"
            )
            return
        self._tally.found(FindingKind.MALFORMED_HEAD, None, None, f"{head.where}: {head.detail}")

    def _is_genuine(self, head: SignedHead) -> bool:
        if head.origin != self._origin:
            self._tally.found(
                FindingKind.WRONG_ORIGIN,
                head.slot,
                head.seq,
                f"the head is of log {head.origin}, not of {self._origin}",
            )
            return False
        key = self._keys.get(head.key_id)
        if key is None:
            self._tally.found(
                FindingKind.UNKNOWN_KEY,
                head.slot,
                head.seq,
                f"the head is signed with key {head.key_id}, which is not among the public keys given",
            )
            return False
        try:
            key.verify(head.signature, head_payload(head.slot, head.seq, head.hash, head.at_ms, head.origin))
        except InvalidSignature:
            said = "its signature does not verify" if head.signature else "it carries no signature"
            self._tally.found(FindingKind.FORGED_HEAD, head.slot, head.seq, f"the head is forged: {said}")
            return False
        return True

    def _add_in_order(self, known: SlotHeads, head: SignedHead) -> None:
        if not known.seqs or head.seq > known.last:
            known.add(head.seq, head.hash)
        elif head.seq < known.last:
            self._tally.found(
                FindingKind.REPLAYED_HEAD,
                head.slot,
                head.seq,
                f"an old head stands after the head of record {known.last}",
            )
        elif head.hash != known.hash_at(len(known.seqs) - 1):
            self._report_fork(head.slot, head.seq)

    def _merged(self, slot: int, left: SlotHeads, right: SlotHeads) -> SlotHeads:
        both = [(s, heads.hash_at(i)) for heads in (left, right) for i, s in enumerate(heads.seqs)]
        both.sort(key=lambda pair: pair[0])
        result = SlotHeads()
        for seq, hash_ in both:
            if not result.seqs or seq > result.last:
                result.add(seq, hash_)
            elif hash_ != result.hash_at(len(result.seqs) - 1):
                self._report_fork(slot, seq)
        return result

    def _report_fork(self, slot: int, seq: int) -> None:
        self._tally.found(
            FindingKind.FORKED_HEAD,
            slot,
            seq,
            "two genuine heads give this record different hashes: the log was signed twice",
        )
