from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import jwt
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from broker.core.clock import ManualClock
from broker.keys import FileKeyStore, KeyStoreError, key_file

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[3]


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.fixture
def store(path: Path, clock: ManualClock) -> FileKeyStore:
    return FileKeyStore(path, clock)


def _secrets_in(path: Path) -> list[str]:
    document = json.loads(path.read_text())
    keys = [entry for group in ("token", "audit", "digest", "sealing") for entry in document[group]]
    return [entry[name] for entry in keys for name in ("private", "key") if name in entry]


def _kid(store: FileKeyStore) -> str:
    token = store.sign_token({"typ": "at+jwt"}, b"{}", algorithm="ES256")
    return str(jwt.get_unverified_header(token)["kid"])


# --- the file -------------------------------------------------------------------------------------


def test_the_file_and_its_lock_are_for_their_owner_only(path: Path, clock: ManualClock) -> None:
    before = os.umask(0)
    try:
        FileKeyStore(path, clock)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.with_name("keys.json.lock").stat().st_mode & 0o777 == 0o600
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["keys.json", "keys.json.lock"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o601, 0o700, 0o4600])
def test_a_file_that_others_could_have_used_is_refused(
    store: FileKeyStore, path: Path, clock: ManualClock, mode: int
) -> None:
    path.chmod(mode)
    with pytest.raises(KeyStoreError, match="chmod 600"):
        FileKeyStore(path, clock)


def test_a_file_of_another_user_is_refused(
    store: FileKeyStore, path: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: stranger)
    with pytest.raises(KeyStoreError, match="belongs to user"):
        FileKeyStore(path, clock)


def test_a_symbolic_link_is_refused(store: FileKeyStore, path: Path, clock: ManualClock) -> None:
    link = path.with_name("link.json")
    link.symlink_to(path)
    with pytest.raises(KeyStoreError, match="symbolic link"):
        FileKeyStore(link, clock)


def test_a_dangling_symbolic_link_is_refused_and_nothing_is_made_behind_it(
    path: Path, clock: ManualClock
) -> None:
    elsewhere = path.with_name("elsewhere.json")
    path.symlink_to(elsewhere)
    with pytest.raises(KeyStoreError, match="symbolic link"):
        FileKeyStore(path, clock)
    assert not elsewhere.exists()
    assert path.is_symlink()


def test_a_symbolic_link_in_the_locks_place_is_refused(path: Path, clock: ManualClock) -> None:
    target = path.with_name("target")
    path.with_name("keys.json.lock").symlink_to(target)
    with pytest.raises(KeyStoreError, match="lock file"):
        FileKeyStore(path, clock)
    assert not target.exists()


@pytest.mark.timeout(10)
def test_a_named_pipe_or_directory_is_refused_without_waiting(path: Path, clock: ManualClock) -> None:
    os.mkfifo(path, 0o600)
    with pytest.raises(KeyStoreError, match="regular file"):
        FileKeyStore(path, clock)
    path.unlink()
    path.mkdir(0o600)
    with pytest.raises(KeyStoreError, match="regular file"):
        FileKeyStore(path, clock)


def test_a_missing_directory_is_named(tmp_path: Path, clock: ManualClock) -> None:
    with pytest.raises(KeyStoreError, match="directory"):
        FileKeyStore(tmp_path / "nowhere" / "keys.json", clock)


def test_a_store_that_may_not_create_refuses_a_missing_file(path: Path, clock: ManualClock) -> None:
    with pytest.raises(KeyStoreError, match="cannot be opened"):
        FileKeyStore(path, clock, create=False)
    assert not path.exists()


DAMAGE: dict[str, Callable[[str], str]] = {
    "empty": lambda _text: "",
    "cut short": lambda text: text[: len(text) // 2],
    "not an object": lambda text: f"[{text}]",
    "another version": lambda text: text.replace("nhi-broker-keys/1", "nhi-broker-keys/9"),
    "a kind missing": lambda text: text.replace('"sealing"', '"ceiling"'),
    "an id changed": lambda text: text.replace('"kid": "', '"kid": "x'),
    "an algorithm changed": lambda text: text.replace('"ES256"', '"RS256"'),
    "no current key": lambda text: text.replace('"current"', '"retiring"'),
    "an unknown phase": lambda text: text.replace('"current"', '"sideways"'),
    "a time as text": lambda text: text.replace('"published_ms": ', '"published_ms": "1", "x": '),
    "a key too short": lambda text: text.replace('"key": "', '"key": "AAAA", "old": "'),
    "a key that is no base64": lambda text: text.replace('"private": "', '"private": "*'),
    "too large": lambda text: text + " " * (1 << 20),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_and_no_error_repeats_it(
    store: FileKeyStore, path: Path, clock: ManualClock, damage: str
) -> None:
    hidden = _secrets_in(path)
    path.write_text(DAMAGE[damage](path.read_text()))
    with pytest.raises(KeyStoreError) as caught:
        FileKeyStore(path, clock)
    told = _everything_of(caught.value)
    assert not [secret for secret in hidden if secret[:16] in told]


def _everything_of(error: BaseException) -> str:
    """What a careless logger could print: text, attributes and traceback of the whole chain."""
    told = "".join(traceback.format_exception(error))
    seen: set[int] = set()
    links: list[BaseException | None] = [error]
    while links:
        link = links.pop()
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        told += repr(link) + repr(link.args) + repr(vars(link)) + str(getattr(link, "doc", ""))
        links += [link.__cause__, link.__context__]
    return told


def test_two_keys_with_one_id_are_refused(store: FileKeyStore, path: Path, clock: ManualClock) -> None:
    document = json.loads(path.read_text())
    document["sealing"] *= 2
    path.write_text(json.dumps(document))
    with pytest.raises(KeyStoreError, match="damaged"):
        FileKeyStore(path, clock)


def test_a_file_that_vanished_stops_signing_and_sealing(store: FileKeyStore, path: Path) -> None:
    path.unlink()
    with pytest.raises(KeyStoreError, match="gone"):
        store.sign_token({"typ": "at+jwt"}, b"{}", algorithm="ES256")
    with pytest.raises(KeyStoreError, match="gone"):
        store.seal(b"secret", b"context")
    with pytest.raises(KeyStoreError):
        store.rotate_sealing_key()
    assert not path.exists()


def test_a_file_opened_to_others_while_running_is_refused_at_the_next_change(
    store: FileKeyStore, path: Path
) -> None:
    path.chmod(0o644)
    with pytest.raises(KeyStoreError, match="chmod 600"):
        store.rotate_sealing_key()


def test_a_write_that_fails_leaves_the_old_keys_in_force(
    store: FileKeyStore, path: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, kid = path.read_bytes(), _kid(store)
    with monkeypatch.context() as broken:

        def no_space(_descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        broken.setattr(os, "fsync", no_space)
        with pytest.raises(KeyStoreError, match="No space left"):
            store.revoke_token_key(kid)
    assert path.read_bytes() == before
    assert _kid(store) == kid
    # What the failed write left behind does not stand in the way of the next one.
    assert store.revoke_token_key(kid) is True
    assert _kid(FileKeyStore(path, clock)) != kid


def test_file_and_directory_are_synced_around_the_rename(
    store: FileKeyStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, bytes]] = []
    real = os.fsync

    def watching(descriptor: int) -> None:
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        synced.append((name, path.read_bytes()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", watching)
    before = path.read_bytes()
    store.rotate_sealing_key()
    assert synced == [("keys.json.new", before), (path.parent.name, path.read_bytes())]
    assert path.read_bytes() != before


# --- several processes ----------------------------------------------------------------------------

CREATE = """
import sys
from broker.core.clock import SystemClock
from broker.keys import FileKeyStore
print("ready", flush=True)
sys.stdin.readline()
store = FileKeyStore(sys.argv[1], SystemClock())
print([key.kid for key in store.token_keys()], list(store.audit_keys()), store.digest(b"x"), flush=True)
"""


def test_processes_that_start_at_once_create_one_set_of_keys(path: Path) -> None:
    command = [sys.executable, "-c", CREATE, str(path)]
    processes = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ}
        )
        for _ in range(4)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        answers = [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert len(set(answers)) == 1
    assert answers[0]


def test_one_of_several_stores_that_rotate_at_once_says_that_it_did(path: Path, clock: ManualClock) -> None:
    stores = [FileKeyStore(path, clock) for _ in range(4)]
    clock.advance(seconds=7 * 86_400)
    start = threading.Barrier(len(stores))
    changed: list[bool] = []

    def rotate(store: FileKeyStore) -> None:
        start.wait()
        changed.append(store.rotate_token_keys(clock.now_ms()))

    threads = [threading.Thread(target=rotate, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(changed) == [False, False, False, True]
    assert len({store.token_keys()[-1].kid for store in stores}) == 1


def test_a_key_revoked_by_one_store_signs_and_verifies_nothing_in_another(
    path: Path, clock: ManualClock
) -> None:
    one, other = FileKeyStore(path, clock), FileKeyStore(path, clock)
    for _ in range(20):  # changes that follow each other faster than file times move
        kid = _kid(other)
        one.revoke_token_key(kid)
        assert _kid(other) != kid
        assert kid not in {key.kid for key in other.token_keys()}


def test_every_version_of_the_file_is_dated_after_the_one_before(store: FileKeyStore, path: Path) -> None:
    ahead_ns = 4_000_000_000 * 10**9  # as after the host's clock was set back
    os.utime(path, ns=(ahead_ns, ahead_ns))
    store.rotate_sealing_key()
    store.rotate_sealing_key()
    assert path.stat().st_mtime_ns >= ahead_ns + 2


def test_what_one_store_seals_after_a_rotation_another_unseals(path: Path, clock: ManualClock) -> None:
    one, other = FileKeyStore(path, clock), FileKeyStore(path, clock)
    one.rotate_sealing_key()
    assert other.unseal(one.seal(b"secret", b"lease"), b"lease") == b"secret"


def test_a_lock_that_is_never_released_is_an_error_not_a_hang(
    store: FileKeyStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_file, "_LOCK_WAIT_SECONDS", 0.0)
    with key_file.locked(path), pytest.raises(KeyStoreError, match="another process holds"):
        store.rotate_sealing_key()
    store.rotate_sealing_key()


# --- tokens ---------------------------------------------------------------------------------------


def test_keys_survive_a_restart(store: FileKeyStore, path: Path, clock: ManualClock) -> None:
    again = FileKeyStore(path, clock)
    assert again.token_keys() == store.token_keys()
    assert again.audit_keys() == store.audit_keys()
    assert again.digest(b"x") == store.digest(b"x")
    assert again.derive("status") == store.derive("status")
    assert again.unseal(store.seal(b"secret", b"lease"), b"lease") == b"secret"


def test_more_header_members_are_signed_too(store: FileKeyStore) -> None:
    token = store.sign_token({"typ": "statuslist+jwt", "x": 1}, b"{}", algorithm="ES256")
    header = jwt.get_unverified_header(token)
    assert header == {"alg": "ES256", "kid": _kid(store), "typ": "statuslist+jwt", "x": 1}


def test_headers_of_different_types_are_not_mixed_up(store: FileKeyStore) -> None:
    for typ in ("at+jwt", "statuslist+jwt", "at+jwt"):
        token = store.sign_token({"typ": typ}, b"{}", algorithm="ES256")
        assert jwt.get_unverified_header(token)["typ"] == typ


@pytest.mark.parametrize("header", [{"alg": "none"}, {"typ": "at+jwt", "kid": "mine"}])
def test_a_header_that_names_key_or_algorithm_is_refused(
    store: FileKeyStore, header: dict[str, object]
) -> None:
    with pytest.raises(ValueError, match="alg and kid"):
        store.sign_token(header, b"{}", algorithm="ES256")


# --- audit ----------------------------------------------------------------------------------------


def test_heads_signed_before_a_rotation_verify_with_the_public_key_that_was_kept(
    store: FileKeyStore, path: Path
) -> None:
    old_id, old_signature = store.sign_audit_head(b"head")
    new_id = store.rotate_audit_key()
    assert store.sign_audit_head(b"head")[0] == new_id != old_id
    keys = store.audit_keys()
    assert set(keys) == {old_id, new_id}
    Ed25519PublicKey.from_public_bytes(keys[old_id]).verify(old_signature, b"head")
    with pytest.raises(InvalidSignature):
        Ed25519PublicKey.from_public_bytes(keys[new_id]).verify(old_signature, b"head")
    entries = json.loads(path.read_text())["audit"]
    assert ["private" in entry for entry in entries] == [False, True]


# --- digests, sealing, derivation -----------------------------------------------------------------


def test_a_digest_is_a_keyed_hmac_that_names_its_key(store: FileKeyStore, path: Path) -> None:
    entry = json.loads(path.read_text())["digest"][0]
    expected = hmac.new(base64.b64decode(entry["key"]), b"secret", hashlib.sha256).hexdigest()
    assert store.digest(b"secret") == f"{entry['id']}:{expected}"


def test_a_digest_made_before_a_rotation_is_still_found(store: FileKeyStore) -> None:
    recorded = store.digest(b"secret")
    store.rotate_digest_key()
    assert store.digest(b"secret") != recorded
    assert recorded in store.digests(b"secret")
    assert store.digests(b"secret")[0] == store.digest(b"secret")


def test_what_is_derived_differs_by_label_and_survives_rotation(store: FileKeyStore) -> None:
    before = store.derive("status list")
    assert len(before) == 32
    assert before != store.derive("something else")
    store.rotate_digest_key()
    assert store.derive("status list") == before


def test_sealed_values_are_unsealed_after_rotation(store: FileKeyStore) -> None:
    sealed = store.seal(b"secret", b"lse_a")
    store.rotate_sealing_key()
    assert store.unseal(sealed, b"lse_a") == b"secret"
    assert store.seal(b"secret", b"lse_a")[:4] != sealed[:4]


def test_sealing_twice_gives_different_bytes(store: FileKeyStore) -> None:
    assert store.seal(b"secret", b"lse_a") != store.seal(b"secret", b"lse_a")


def test_a_sealed_value_changed_anywhere_or_moved_to_another_lease_is_refused(store: FileKeyStore) -> None:
    sealed = store.seal(b"secret", b"lse_a")
    with pytest.raises(ValueError, match="context"):
        store.unseal(sealed, b"lse_b")
    for at in range(len(sealed)):
        changed = bytearray(sealed)
        changed[at] ^= 1
        with pytest.raises(ValueError, match=r"sealed"):
            store.unseal(bytes(changed), b"lse_a")
    for length in range(len(sealed)):
        with pytest.raises(ValueError, match=r"sealed"):
            store.unseal(sealed[:length], b"lse_a")


def test_another_stores_seal_is_refused(store: FileKeyStore, tmp_path: Path, clock: ManualClock) -> None:
    other = FileKeyStore(tmp_path / "other.json", clock)
    with pytest.raises(ValueError, match="not sealed under a key of this store"):
        store.unseal(other.seal(b"secret", b"lse_a"), b"lse_a")


def test_no_repr_shows_a_key(store: FileKeyStore, path: Path) -> None:
    live = store._live
    keyring = live.keyring
    shown = "".join(repr(thing) for thing in (store, live, keyring, *keyring.token, *keyring.audit))
    for secret in _secrets_in(path):
        assert secret[:16] not in shown
        assert base64.b64decode(secret).hex()[:32] not in shown
        assert repr(base64.b64decode(secret))[2:20] not in shown
