from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING

import pytest

from inventory.audit.public_keys import PublicKeys, PublicKeysError, read_public_keys, write_public_keys
from tests.support.audit_log import MemoryKeys

if TYPE_CHECKING:
    from pathlib import Path

KEY = base64.b64encode(bytes(32)).decode()


def test_the_file_gives_back_what_was_written(tmp_path: Path) -> None:
    public = PublicKeys("abc234", {**MemoryKeys("k1").audit_keys(), **MemoryKeys("k2").audit_keys()})
    path = tmp_path / "keys.json"
    write_public_keys(path, public)
    assert read_public_keys(path) == public
    assert set(json.loads(path.read_text())) == {"origin", "keys"}
    write_public_keys(path, PublicKeys("abc234", {}))
    assert read_public_keys(path).keys == {}


@pytest.mark.parametrize(
    "value",
    [
        pytest.param([], id="no object"),
        pytest.param({"origin": "abc234"}, id="no keys"),
        pytest.param({"origin": "abc234", "keys": [], "x": 1}, id="member too many"),
        pytest.param({"origin": "abc234", "keys": []}, id="keys as array"),
        pytest.param({"origin": "a b", "keys": {}}, id="origin no tag"),
        pytest.param({"origin": 1, "keys": {}}, id="origin no text"),
        pytest.param({"origin": "abc234", "keys": {"k\n": KEY}}, id="key id with a control character"),
        pytest.param({"origin": "abc234", "keys": {"k": "AAAA"}}, id="short key"),
        pytest.param({"origin": "abc234", "keys": {"k": "?"}}, id="not base64"),
        pytest.param({"origin": "abc234", "keys": {"k": None}}, id="no text"),
    ],
)
def test_a_file_of_another_shape_is_refused(tmp_path: Path, value: object) -> None:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps(value))
    with pytest.raises(PublicKeysError):
        read_public_keys(path)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(PublicKeysError, match=r"missing\.json"):
        read_public_keys(tmp_path / "missing.json")
    (tmp_path / "broken.json").write_bytes(b"\xff{")
    with pytest.raises(PublicKeysError, match="not JSON"):
        read_public_keys(tmp_path / "broken.json")


def test_nothing_is_written_that_could_not_be_read(tmp_path: Path) -> None:
    for public in (PublicKeys("a b", {}), PublicKeys("abc234", {"k": b"short"})):
        with pytest.raises(PublicKeysError):
            write_public_keys(tmp_path / "keys.json", public)
    assert not (tmp_path / "keys.json").exists()
    with pytest.raises(PublicKeysError, match="cannot write"):
        write_public_keys(tmp_path / "no" / "keys.json", PublicKeys("abc234", {}))
