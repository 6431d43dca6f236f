"""The bundles in force, and the files they come from."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from broker.authn.bundles import (
    BundleError,
    BundleStore,
    FileBundleSource,
    TrustBundle,
    TrustBundles,
)
from tests.support.pki import Authority, JwtAuthority, bundle_json, x5c_jwk

if TYPE_CHECKING:
    from pathlib import Path

TD = "example.org"
ROOT = Authority.root()
SIGNER = JwtAuthority.new()


def bundle(name: str = TD, *, sequence: int | None = None, kid: str = "key-1") -> TrustBundle:
    return TrustBundle(trust_domain=name, jwt_keys={kid: SIGNER.public}, sequence=sequence)


# --- the store ------------------------------------------------------------------------------------


def test_each_change_raises_the_generation_and_leaves_old_snapshots_alone() -> None:
    store = BundleStore()
    before = store.current
    store.replace(TD, bundle())
    assert store.current.generation == before.generation + 1
    assert before.get(TD) is None
    store.replace("other.example", bundle("other.example"))
    store.remove(TD)
    assert store.current.generation == before.generation + 3
    assert store.current.get(TD) is None
    assert store.current.get("other.example") == bundle("other.example")


def test_the_same_content_again_changes_nothing() -> None:
    store = BundleStore([bundle()])
    seen: list[TrustBundles] = []
    store.subscribe(seen.append)
    store.replace(TD, bundle())
    store.remove("unknown.example")
    assert store.current.generation == 0
    assert seen == []


def test_an_empty_bundle_replaces_and_is_no_fallback() -> None:
    store = BundleStore([bundle()])
    store.replace(TD, TrustBundle(trust_domain=TD))
    current = store.current.get(TD)
    assert current is not None
    assert current.is_empty


def test_a_sequence_that_goes_backwards_is_refused() -> None:
    store = BundleStore([bundle(sequence=5)])
    with pytest.raises(BundleError, match="sequence 4"):
        store.replace(TD, bundle(sequence=4, kid="old"))
    assert store.current.get(TD) == bundle(sequence=5)
    store.replace(TD, bundle(sequence=6, kid="new"))
    store.replace(TD, bundle(kid="without a sequence"))
    assert store.current.generation == 2


def test_a_bundle_cannot_be_filed_under_another_trust_domain() -> None:
    with pytest.raises(BundleError, match="another trust domain"):
        BundleStore().replace("other.example", bundle())
    with pytest.raises(BundleError, match="another trust domain"):
        TrustBundles({"other.example": bundle()})


def test_nobody_can_change_a_snapshot() -> None:
    store = BundleStore([bundle()])
    with pytest.raises(TypeError):
        store.current.by_trust_domain["evil.example"] = bundle("evil.example")  # type: ignore[index]  # the point
    with pytest.raises(TypeError):
        bundle().jwt_keys["evil"] = SIGNER.public  # type: ignore[index]  # the point


def test_subscribers_hear_of_each_change_until_they_leave() -> None:
    store = BundleStore()
    seen: list[int] = []
    leave = store.subscribe(lambda bundles: seen.append(bundles.generation))
    store.replace(TD, bundle())
    leave()
    leave()
    store.remove(TD)
    assert seen == [1]


def test_a_subscriber_that_fails_keeps_nobody_from_a_rotation() -> None:
    store = BundleStore()
    seen: list[int] = []

    def fail(_bundles: TrustBundles) -> None:
        raise RuntimeError("a bug")

    store.subscribe(fail)
    store.subscribe(lambda bundles: seen.append(bundles.generation))
    store.replace(TD, bundle())
    assert seen == [1]


# --- files ----------------------------------------------------------------------------------------


def write(path: Path, content: bytes) -> None:
    """Replace a file as careful writers do: another inode, one rename."""
    new = path.with_suffix(".new")
    new.write_bytes(content)
    new.replace(path)


@pytest.fixture
def store() -> BundleStore:
    return BundleStore()


async def test_a_directory_of_bundles_is_loaded(tmp_path: Path, store: BundleStore) -> None:
    (tmp_path / "example.org.json").write_bytes(bundle_json(SIGNER.jwk(), x5c_jwk(ROOT.certificate)))
    (tmp_path / "other.example.pem").write_bytes(ROOT.certificate.public_bytes(Encoding.PEM))
    (tmp_path / "README").write_text("not a bundle")
    source = FileBundleSource(directory=tmp_path)
    await source.refresh(store)
    assert store.current.by_trust_domain.keys() == {"example.org", "other.example"}
    assert source.problems == {}


async def test_a_rotated_file_is_noticed_and_an_unchanged_one_is_not(
    tmp_path: Path, store: BundleStore
) -> None:
    path = tmp_path / "bundle.json"
    write(path, bundle_json(SIGNER.jwk()))
    source = FileBundleSource.from_pairs([f"{TD}={path}"])
    await source.refresh(store)
    await source.refresh(store)
    assert store.current.generation == 1
    write(path, bundle_json(SIGNER.jwk(kid="key-2")))
    await source.refresh(store)
    current = store.current.get(TD)
    assert current is not None
    assert current.jwt_keys.keys() == {"key-2"}


async def test_a_file_rewritten_in_place_with_the_same_size_is_noticed(
    tmp_path: Path, store: BundleStore
) -> None:
    path = tmp_path / "bundle.json"
    path.write_bytes(bundle_json(SIGNER.jwk(kid="key-1")))
    source = FileBundleSource(files={TD: path})
    await source.refresh(store)
    modified_ns = path.stat().st_mtime_ns
    path.write_bytes(bundle_json(SIGNER.jwk(kid="key-2")))
    os.utime(path, ns=(modified_ns, modified_ns + 1))
    await source.refresh(store)
    current = store.current.get(TD)
    assert current is not None
    assert current.jwt_keys.keys() == {"key-2"}


async def test_a_malformed_file_is_reported_and_the_bundle_in_force_stays(
    tmp_path: Path, store: BundleStore
) -> None:
    path = tmp_path / "example.org.json"
    write(path, bundle_json(SIGNER.jwk(), spiffe_sequence=2))
    source = FileBundleSource(directory=tmp_path)
    await source.refresh(store)
    for content in (b'{"keys": [', bundle_json(SIGNER.jwk(kid="replayed"), spiffe_sequence=1)):
        write(path, content)
        await source.refresh(store)
        assert source.problems.keys() == {TD}
        assert store.current.generation == 1
    write(path, bundle_json(SIGNER.jwk(), spiffe_sequence=3))
    await source.refresh(store)
    assert source.problems == {}
    assert store.current.generation == 2


async def test_a_bundle_becoming_empty_takes_effect(tmp_path: Path, store: BundleStore) -> None:
    path = tmp_path / "example.org.json"
    write(path, bundle_json(SIGNER.jwk()))
    source = FileBundleSource(directory=tmp_path)
    await source.refresh(store)
    write(path, bundle_json())
    await source.refresh(store)
    current = store.current.get(TD)
    assert current is not None
    assert current.is_empty


async def test_a_file_that_vanished_ends_the_trust_and_one_that_returns_renews_it(
    tmp_path: Path, store: BundleStore
) -> None:
    path = tmp_path / "bundle.json"
    source = FileBundleSource(files={TD: path})
    await source.refresh(store)
    assert source.problems.keys() == {TD}
    write(path, bundle_json(SIGNER.jwk()))
    await source.refresh(store)
    assert source.problems == {}
    path.unlink()
    await source.refresh(store)
    assert store.current.get(TD) is None


async def test_a_directory_that_cannot_be_read_takes_nothing_away(tmp_path: Path, store: BundleStore) -> None:
    directory = tmp_path / "bundles"
    directory.mkdir()
    write(directory / "example.org.json", bundle_json(SIGNER.jwk()))
    source = FileBundleSource(directory=directory)
    await source.refresh(store)
    directory.rename(tmp_path / "elsewhere")
    await source.refresh(store)
    assert store.current.get(TD) is not None
    assert source.problems.keys() == {str(directory)}
    (tmp_path / "elsewhere").rename(directory)
    await source.refresh(store)
    assert source.problems == {}


async def test_a_file_name_that_is_no_trust_domain_is_reported(tmp_path: Path, store: BundleStore) -> None:
    (tmp_path / "Example.org.json").write_bytes(bundle_json())
    source = FileBundleSource(directory=tmp_path)
    await source.refresh(store)
    assert source.problems.keys() == {"Example.org.json"}
    assert store.current.by_trust_domain == {}


@pytest.mark.parametrize(
    "pairs", [["example.org"], ["=path"], ["example.org="], ["Example.org=a"], ["td=a", "td=b"]]
)
def test_a_malformed_pair_is_refused(pairs: list[str]) -> None:
    with pytest.raises(BundleError):
        FileBundleSource.from_pairs(pairs)


async def test_run_follows_a_rotation_without_a_restart_and_ends_when_closed(
    tmp_path: Path, store: BundleStore
) -> None:
    path = tmp_path / "bundle.json"
    write(path, bundle_json(SIGNER.jwk()))
    changed = asyncio.Event()
    store.subscribe(lambda _bundles: changed.set())
    source = FileBundleSource(files={TD: path}, poll_seconds=0.01)
    running = asyncio.create_task(source.run(store))
    await changed.wait()
    changed.clear()
    write(path, bundle_json(SIGNER.jwk(kid="key-2")))
    await changed.wait()
    await source.close()
    await source.close()
    await running
    current = store.current.get(TD)
    assert current is not None
    assert current.jwt_keys.keys() == {"key-2"}
