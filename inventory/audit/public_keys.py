"""The public keys file: all that offline verification needs besides the log and the copied heads.

::

    {"keys":{"<key id>":"<base64 of a raw Ed25519 public key>"},"origin":"<instance tag>"}
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import orjson

from inventory.audit.canonical import NotCanonicalError, canonical_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_RAW_KEY_BYTES: Final = 32
_NAME: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class PublicKeysError(ValueError):
    """The public keys file is missing or not one. Says what is wrong and how to get one."""


@dataclass(frozen=True, slots=True)
class PublicKeys:
    """Whose log is verified, and the keys its heads may be signed with.

    Attributes:
        origin: instance tag of the deployment.
        keys: raw 32-byte Ed25519 public keys by key id, retired ones included.

    """

    origin: str
    keys: Mapping[str, bytes]


def is_name(text: object) -> bool:
    """Say whether `text` can be a key id or an origin: 1 to 128 of ``[A-Za-z0-9._:-]``."""
    return isinstance(text, str) and _NAME.fullmatch(text) is not None


def public_keys_json(public: PublicKeys) -> dict[str, Any]:
    """Return the JSON object of `public`, as it stands in the file and in an export's header."""
    return {
        "keys": {name: base64.b64encode(raw).decode("ascii") for name, raw in public.keys.items()},
        "origin": public.origin,
    }


def parse_public_keys(value: Any) -> PublicKeys:
    """Return the keys that a parsed JSON object describes.

    Raises:
        PublicKeysError: it describes none.

    """
    if (
        not isinstance(value, dict)
        or value.keys() != {"keys", "origin"}
        or not isinstance(value["keys"], dict)
    ):
        raise PublicKeysError('expected a JSON object with exactly "origin" and "keys"')
    if not is_name(value["origin"]):
        raise PublicKeysError('"origin" is not an instance tag')
    keys: dict[str, bytes] = {}
    for name, text in value["keys"].items():
        if not is_name(name):
            raise PublicKeysError("a key id holds a character outside [A-Za-z0-9._:-]")
        keys[name] = _raw_key(name, text)
    return PublicKeys(value["origin"], keys)


def read_public_keys(path: Path) -> PublicKeys:
    """Read a public keys file.

    Raises:
        PublicKeysError: the file cannot be read or is not one.

    """
    try:
        value = orjson.loads(path.read_bytes())
        return parse_public_keys(value)
    except OSError as error:
        raise PublicKeysError(f"cannot read the public keys file {path}: {error.strerror}") from error
    except ValueError as error:
        detail = error if isinstance(error, PublicKeysError) else "not JSON"
        raise PublicKeysError(f"{path} is not a public keys file: {detail}") from error


def write_public_keys(path: Path, public: PublicKeys) -> None:
    """Write a public keys file, replacing the old one whole.

    Raises:
        PublicKeysError: it cannot be written, or a name in it is not one.

    """
    try:
        content = canonical_bytes(public_keys_json(public)) + b"\n"
        parse_public_keys(orjson.loads(content))
        fresh = path.with_name(path.name + ".new")
        fresh.write_bytes(content)
        fresh.replace(path)
    except NotCanonicalError as error:
        raise PublicKeysError(f"cannot write the public keys: {error}") from error
    except OSError as error:
        raise PublicKeysError(f"cannot write the public keys file {path}: {error.strerror}") from error


def _raw_key(name: str, text: object) -> bytes:
    try:
        raw = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except (binascii.Error, ValueError) as error:
        raise PublicKeysError(f"key {name} is not base64") from error
    if len(raw) != _RAW_KEY_BYTES:
        raise PublicKeysError(f"key {name} is not a raw Ed25519 public key of {_RAW_KEY_BYTES} bytes")
    return raw
