"""What ``nhi serve --check`` looks at: everything a start needs, without starting anything."""

from __future__ import annotations

import os
import socket
import stat
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from adapters.registry import AdapterUnavailableError, build
from broker import settings as settings_module
from broker.api.listeners import UNIX_PATH_BYTES_MAX
from broker.api.tls import ServerTls, TlsConfigError
from broker.app import StartError, checks_of, configure
from broker.authn.bundles import BundleStore, FileBundleSource
from broker.cli.sockets import why_unreachable
from broker.core.clock import SystemClock
from broker.core.ids import InstanceTag
from broker.core.spiffe_id import SpiffeId, SpiffeIdError
from broker.keys.file_store import FileKeyStore
from broker.keys.key_file import KeyStoreError
from broker.policy.catalog import Catalog
from broker.policy.errors import PolicyError
from broker.settings import Settings, SettingsError
from inventory.fsck import NotALedgerError, instance_of, is_untouched, known_revision

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from broker.core.ports import Adapter

_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH


@dataclass(slots=True)
class Report:
    """What was looked at.

    Attributes:
        passed: what is right, a few words each.
        problems: what is wrong, a sentence each with the mend.

    """

    passed: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, what: str, problems: Sequence[str]) -> None:
        """Add the outcome of one check."""
        if problems:
            self.problems += [problem for problem in problems if problem not in self.problems]
        else:
            self.passed.append(what)


async def check(config: Path) -> Report:
    """Look at settings, files, policy, backends and the rights in them."""
    report = Report()
    try:
        settings = Settings.load(config)
    except SettingsError as error:
        report.add("", error.problems)
        report.problems.append(
            "The rest was not looked at: it depends on the settings. Mend them and check again."
        )
        return report
    report.add(f"settings: {config}", [])
    report.add(
        f"mode {settings.mode}: nothing that it refuses", settings_module.production_problems(settings)
    )
    report.add("files, directories and their modes", list(_files(settings)))
    report.add("identity: certificate, trust bundles, Workload API", await _identity(settings))
    report.add("addresses can be bound", list(_addresses(settings)))
    with ExitStack() as stack:
        keys = _keys(settings, stack)
        if keys is not None:
            await _policy_and_backends(settings, keys, report)
    return report


# --- files ---------------------------------------------------------------------------------------


def _files(settings: Settings) -> Iterator[str]:
    ledger, keys = settings.ledger.path, settings.keys.path
    yield from _directory("ledger.path", ledger.parent, private=True)
    if ledger.exists():
        problems = list(_ledger(ledger))
        yield from problems
        if not problems and not keys.exists() and not is_untouched(ledger):
            yield (
                f"keys.path: {keys} does not exist, but the ledger does: what it holds was sealed with keys "
                "that are not here. Restore the key file from its backup."
            )
    yield from _directory("keys.path", keys.parent, private=True)
    if keys.exists():
        try:
            FileKeyStore(keys, SystemClock(), create=False)
        except KeyStoreError as error:
            yield f"keys.path: {error}."
    yield from _directory("audit.copy_directory", settings.audit.copy_directory)
    yield from _directory("operator.socket", settings.operator.socket.parent)
    if len(os.fsencode(settings.operator.socket)) > UNIX_PATH_BYTES_MAX:
        yield f"operator.socket: the path is longer than {UNIX_PATH_BYTES_MAX} bytes. Choose a shorter one."
    if not settings.policy.directory.is_dir():
        yield f"policy.directory: {settings.policy.directory} is not a directory."


def _ledger(path: Path) -> Iterator[str]:
    if path.stat().st_mode & _OTHERS:
        yield f"ledger.path: {path} can be read by others. Run chmod 600 {path}."
    try:
        known = known_revision(path)
    except NotALedgerError as error:
        yield f"ledger.path: {error}"
        return
    if not known:
        yield (
            f"ledger.path: {path} was written by another version, whose schema this one does not know. Start "
            "it with that version, or restore a backup from before."
        )


def _directory(name: str, directory: Path, *, private: bool = False) -> Iterator[str]:
    """Say what keeps a directory from being written to; one that can be made is fine."""
    if not directory.exists():
        above = next((one for one in directory.absolute().parents if one.exists()), Path("/"))
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            yield f"{name}: {directory} does not exist and cannot be made in {above}. Make it."
        return
    if not directory.is_dir():
        yield f"{name}: {directory} is not a directory."
        return
    if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
        yield f"{name}: {directory} cannot be written by this user. Change its owner, or run as its owner."
    if directory.stat().st_mode & (_OTHERS if private else _OTHERS_WRITE):
        what, mode = ("read or written", "700") if private else ("written", "go-w")
        yield f"{name}: {directory} can be {what} by others. Run chmod {mode} {directory}."


# --- identity and addresses ----------------------------------------------------------------------


async def _identity(settings: Settings) -> list[str]:
    chosen, problems = settings.identity, []
    if chosen.spiffe_id is not None:
        try:
            SpiffeId.parse(chosen.spiffe_id)
        except SpiffeIdError as error:
            problems.append(f"identity.spiffe_id: {error}.")
    if chosen.workload_api_socket is not None:
        why = why_unreachable(Path(chosen.workload_api_socket.removeprefix("unix:").replace("//", "/", 1)))
        if why is not None:
            problems.append(
                f"identity.workload_api_socket: {why} Is the agent running, as a user we may reach?"
            )
    if chosen.certificate is not None and chosen.key is not None:
        problems += _certificate(chosen.certificate, chosen.key)
    if chosen.bundles:
        files = FileBundleSource(files=chosen.bundles)
        await files.refresh(BundleStore())
        problems += [f"identity.bundles: {name}: {why}" for name, why in files.problems.items()]
    return problems


def _certificate(certificate: Path, key: Path) -> Iterator[str]:
    for path in (certificate, key):
        if not os.access(path, os.R_OK):
            yield f"identity: {path} does not exist or cannot be read by this user."
            return
    if key.stat().st_mode & _OTHERS:
        yield f"identity.key: {key} can be read by others. Run chmod 600 {key}."
    try:
        ServerTls(certificate.read_bytes(), key.read_bytes(), [])
    except TlsConfigError as error:
        yield f"identity.certificate: {error}."


def _addresses(settings: Settings) -> Iterator[str]:
    if why_unreachable(settings.operator.socket) is None:
        return  # a broker runs with these settings: of course its addresses are taken
    for name, host, port in (
        ("workload", settings.workload.host, settings.workload.port),
        ("ops", settings.ops.host, settings.ops.port),
    ):
        try:
            family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            yield (
                f"{name}: {host}:{port} cannot be bound ({error.strerror}). "
                "Choose another, or stop what uses it."
            )


# --- policy and backends -------------------------------------------------------------------------


def _keys(settings: Settings, stack: ExitStack) -> FileKeyStore | None:
    """Return the broker's keys, or ones made for this check where there are none yet."""
    if settings.keys.path.exists():
        try:
            return FileKeyStore(settings.keys.path, SystemClock(), create=False)
        except KeyStoreError:
            return None  # `_files` said so
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nhi-check-")))
    return FileKeyStore(directory / "keys.json", SystemClock())


async def _policy_and_backends(settings: Settings, keys: FileKeyStore, report: Report) -> None:
    instance = _instance(settings)
    problems: Sequence[str] = ()
    try:
        configured = configure(settings, instance, keys)
    except StartError as error:
        problems = error.problems
    else:
        for adapter in configured.adapters.values():
            await adapter.close()
    report.add("policy, catalog, registrations, and what they ask of the backends", problems)
    await _backends(settings, instance, keys, report)


def _instance(settings: Settings) -> InstanceTag:
    if settings.ledger.path.exists():
        try:
            return instance_of(settings.ledger.path)
        except NotALedgerError:
            pass  # `_files` said so
    return InstanceTag.new()


async def _backends(settings: Settings, instance: InstanceTag, keys: FileKeyStore, report: Report) -> None:
    """Build every backend by itself, so that one bad one hides no other, and ask each for its rights."""
    recipes = _recipes(settings)
    for backend in settings.backends:
        name = str(backend.get("name", "without a name"))
        try:
            adapter = build(
                str(backend.get("kind")),
                {key: value for key, value in backend.items() if key != "kind"},
                instance,
                keys=keys,
                issuer=settings.workload.issuer,
                status_lists=f"{settings.workload.issuer}/statuslists",
            )
        except AdapterUnavailableError as error:
            report.add("", [str(error)])
            continue
        await _rights(adapter, recipes.get(name, ()), report)


async def _rights(adapter: Adapter, recipes: Sequence[Mapping[str, object]], report: Report) -> None:
    try:
        for one in await checks_of(adapter, recipes):
            what = f"backend {adapter.name}: {one.name}"
            report.add(what, [] if one.ok else [f"{what}: no. {one.remedy}"])
    finally:
        await adapter.close()


def _recipes(settings: Settings) -> Mapping[str, Sequence[Mapping[str, object]]]:
    try:
        return Catalog.load(settings.policy.directory / "catalog.yaml").recipes_by_adapter()
    except PolicyError:
        return {}  # `configure` said so
