"""Key stores: where signing, digest and sealing keys live, and the reader of our own tokens."""

from __future__ import annotations

from broker.keys.file_store import FileKeyStore
from broker.keys.key_file import KeyStoreError
from broker.keys.own_tokens import TokenClaims, TokenReader
from broker.keys.token_keys import ALGORITHMS, TokenKeyPolicy

__all__ = ["ALGORITHMS", "FileKeyStore", "KeyStoreError", "TokenClaims", "TokenKeyPolicy", "TokenReader"]
