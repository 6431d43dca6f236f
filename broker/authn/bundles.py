"""Which trust bundles are in force, and where they come from.

Trust domains stay apart: an SVID is checked against the bundle of its own domain and
no other (ID-6, X-10, J-9). A domain without a usable key lets nobody in; an older
bundle is never a fallback.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

import structlog

from broker.authn.trust_bundle import (
    BUNDLE_BYTES_MAX,
    BundleError,
    JwtKey,
    TrustBundle,
    parse_spiffe_bundle,
    parse_x509_pem,
    trust_domain_name,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

__all__ = [
    "BundleError",
    "BundleSource",
    "BundleStore",
    "FileBundleSource",
    "JwtKey",
    "TrustBundle",
    "TrustBundles",
    "parse_spiffe_bundle",
    "parse_x509_pem",
]

POLL_SECONDS_DEFAULT: Final = 5.0

_log: Final = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class TrustBundles:
    """Every trust domain's bundle at one moment.

    `generation` rises with each change of content: what was verified under another
    generation is verified again.
    """

    by_trust_domain: Mapping[str, TrustBundle] = field(default_factory=dict)
    generation: int = 0

    def __post_init__(self) -> None:
        for name, bundle in self.by_trust_domain.items():
            if name != bundle.trust_domain:
                raise BundleError(f"the bundle of {bundle.trust_domain} is filed under another trust domain")
        object.__setattr__(self, "by_trust_domain", MappingProxyType(dict(self.by_trust_domain)))

    def get(self, trust_domain: str) -> TrustBundle | None:
        """Return the bundle of exactly that trust domain."""
        return self.by_trust_domain.get(trust_domain)


Subscriber: TypeAlias = "Callable[[TrustBundles], None]"


class BundleStore:
    """Holds the current `TrustBundles`. Belongs to one event loop; sources hand over to it there."""

    def __init__(self, bundles: Iterable[TrustBundle] = ()) -> None:
        self._current = TrustBundles({bundle.trust_domain: bundle for bundle in bundles})
        self._subscribers: list[Subscriber] = []

    @property
    def current(self) -> TrustBundles:
        """The bundles in force."""
        return self._current

    def replace(self, trust_domain: str, bundle: TrustBundle) -> None:
        """Put `bundle` in force for `trust_domain`, an empty one too: then nobody of it gets in.

        The same content again changes nothing, so that a poll does not empty every cache.

        Raises:
            BundleError: the bundle is another domain's, or its sequence went backwards
                (a replayed document would bring revoked keys back).

        """
        held = self._current.get(trust_domain)
        if held == bundle:
            return
        if (
            held is not None
            and held.sequence is not None
            and bundle.sequence is not None
            and bundle.sequence < held.sequence
        ):
            raise BundleError(
                f"the bundle of {trust_domain} has sequence {bundle.sequence}, "
                f"older than {held.sequence} already in force"
            )
        if bundle.is_empty:
            _log.warning("trust_bundle_empty", trust_domain=trust_domain)
        self._publish({**self._current.by_trust_domain, trust_domain: bundle})

    def remove(self, trust_domain: str) -> None:
        """Stop trusting a domain: the end of a federation. Unknown domains are fine."""
        left = {k: v for k, v in self._current.by_trust_domain.items() if k != trust_domain}
        if len(left) != len(self._current.by_trust_domain):
            self._publish(left)

    def subscribe(self, callback: Subscriber) -> Callable[[], None]:
        """Call `callback` after each change; the returned function ends that."""
        self._subscribers.append(callback)

        def unsubscribe() -> None:
            if callback in self._subscribers:
                self._subscribers.remove(callback)

        return unsubscribe

    def _publish(self, by_trust_domain: Mapping[str, TrustBundle]) -> None:
        self._current = TrustBundles(by_trust_domain, self._current.generation + 1)
        for callback in tuple(self._subscribers):
            try:
                callback(self._current)
            except Exception:  # noqa: BLE001  one subscriber's bug must not keep the others from a rotation
                _log.exception("trust_bundle_subscriber_failed")


class BundleSource(Protocol):
    """Where bundles come from: files, the Workload API, federation endpoints."""

    async def run(self, store: BundleStore) -> None:
        """Keep `store` current until `close`; never raise because a source is gone for a while."""
        ...

    async def close(self) -> None:
        """End `run` and release what it holds. Idempotent."""
        ...


# --- files ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Fingerprint:
    """What changes when a file is rotated in place, replaced, or re-linked (as ConfigMaps are)."""

    modified_ns: int
    size_bytes: int
    inode: int


@dataclass(frozen=True, slots=True)
class _Reading:
    """One file as a poll saw it: its new content, None where it has not changed."""

    fingerprint: _Fingerprint
    content: bytes | None


class FileBundleSource:
    """Bundles from files: ``<trust domain>.json`` (SPIFFE) or ``.pem`` (X.509 authorities only).

    A rotated file is noticed within `poll_seconds`; a file that vanished ends the trust in
    its domain; a malformed one is reported and the bundle in force stays.
    """

    def __init__(
        self,
        *,
        directory: Path | None = None,
        files: Mapping[str, Path] | None = None,
        poll_seconds: float = POLL_SECONDS_DEFAULT,
    ) -> None:
        self._directory = directory
        self._files = dict(files or {})
        self._poll_seconds = poll_seconds
        self._seen: dict[str, _Fingerprint] = {}
        self._problems: dict[str, str] = {}
        self._closed = asyncio.Event()

    @classmethod
    def from_pairs(
        cls, pairs: Sequence[str], *, poll_seconds: float = POLL_SECONDS_DEFAULT
    ) -> FileBundleSource:
        """Return a source of ``trust_domain=path`` pairs, as they stand in the settings.

        Raises:
            BundleError: a pair is malformed, or one trust domain stands twice.

        """
        files: dict[str, Path] = {}
        for pair in pairs:
            name, equals, path = pair.partition("=")
            if not equals or not path:
                raise BundleError("a bundle file is given as trust_domain=path")
            if files.setdefault(trust_domain_name(name), Path(path)) != Path(path):
                raise BundleError(f"two bundle files are given for {name}")
        return cls(files=files, poll_seconds=poll_seconds)

    @property
    def problems(self) -> Mapping[str, str]:
        """What is wrong now, by trust domain; empty when all is well."""
        return MappingProxyType(dict(self._problems))

    async def run(self, store: BundleStore) -> None:
        """Load, then poll until `close`."""
        while not self._closed.is_set():
            await self.refresh(store)
            try:
                await asyncio.wait_for(self._closed.wait(), self._poll_seconds)
            except TimeoutError:
                continue

    async def close(self) -> None:
        """End `run`."""
        self._closed.set()

    async def refresh(self, store: BundleStore) -> None:
        """Look at every file once and bring `store` up to date."""
        readings = await asyncio.to_thread(self._read)
        for name in self._seen.keys() - readings.keys():
            del self._seen[name]
            _log.warning("trust_bundle_file_gone", trust_domain=name)
            store.remove(name)
        for name, reading in readings.items():
            if reading.content is not None:
                self._apply(store, name, reading.content)
                self._seen[name] = reading.fingerprint

    def _paths(self) -> dict[str, Path]:
        """Return the path per trust domain; notes what cannot be one."""
        paths = dict(self._files)
        if self._directory is not None:
            for path in sorted(self._directory.iterdir()):
                if path.suffix not in {".json", ".pem"}:
                    continue
                try:
                    name = trust_domain_name(path.name.removesuffix(path.suffix))
                except BundleError as error:
                    self._report(path.name, str(error))
                    continue
                if paths.setdefault(name, path) != path:
                    self._report(name, "more than one bundle file; the first by name counts")
        return paths

    def _read(self) -> dict[str, _Reading]:
        try:
            paths = self._paths()
        except OSError as error:
            self._report(str(self._directory), f"the directory cannot be listed: {error.strerror}")
            return {name: _Reading(seen, None) for name, seen in self._seen.items()}
        self._problems.pop(str(self._directory), None)
        readings: dict[str, _Reading] = {}
        for name, path in paths.items():
            try:
                reading = self._read_file(name, path)
            except FileNotFoundError:
                self._report(name, "the bundle file does not exist")
            except OSError as error:
                self._report(name, f"the bundle file cannot be read: {error.strerror}")
                if name in self._seen:
                    readings[name] = _Reading(self._seen[name], None)
            else:
                readings[name] = reading
        return readings

    def _read_file(self, name: str, path: Path) -> _Reading:
        # The fingerprint is taken first: a write after it is seen by the next poll.
        status = path.stat()
        fingerprint = _Fingerprint(status.st_mtime_ns, status.st_size, status.st_ino)
        if self._seen.get(name) == fingerprint:
            return _Reading(fingerprint, None)
        with path.open("rb") as file:
            return _Reading(fingerprint, file.read(BUNDLE_BYTES_MAX + 1))

    def _apply(self, store: BundleStore, name: str, content: bytes) -> None:
        is_json = content.lstrip()[:1] == b"{"
        try:
            bundle = (parse_spiffe_bundle if is_json else parse_x509_pem)(name, content)
            store.replace(name, bundle)
        except BundleError as error:
            self._report(name, str(error))
            return
        self._problems.pop(name, None)
        _log.info(
            "trust_bundle_loaded",
            trust_domain=name,
            x509_authorities=len(bundle.x509_authorities),
            jwt_keys=len(bundle.jwt_keys),
            ignored=bundle.ignored,
        )

    def _report(self, name: str, problem: str) -> None:
        if self._problems.get(name) != problem:
            self._problems[name] = problem
            _log.warning("trust_bundle_refused", trust_domain=name, problem=problem)
