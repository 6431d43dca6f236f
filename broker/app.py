"""The composition root: builds store, adapters, services and listeners from one settings object.

Start-up order is the order of trust: keys, ledger, policy, backends, bundles, listeners.
Whatever cannot be right stops the start and says so; whatever may come back (a backend
that is down, a late Workload API) is reported by `/readyz` and retried.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

import structlog
from cryptography.hazmat.primitives.serialization import Encoding

from adapters.registry import AdapterUnavailableError, build_all
from broker import settings as settings_module
from broker.api.limits import LimitSettings, RequestLimiter
from broker.api.listeners import Listener, Listeners, TcpBind, UnixBind
from broker.api.metrics import PrometheusTelemetry
from broker.api.middleware import RequestBoundary
from broker.api.operator import operator_app
from broker.api.ops import ops_app
from broker.api.readiness import Readiness
from broker.api.tls import ServerTls, check_chain_extraction
from broker.api.workload import workload_app
from broker.authn.authenticator import Authenticator
from broker.authn.bundles import BundleStore, FileBundleSource
from broker.authn.certificate_files import CertificateFiles
from broker.core.audit import AuditKind, AuditRecord
from broker.core.clock import SystemClock
from broker.core.errors import BrokerError
from broker.core.lease import LeaseState
from broker.core.ports import Check
from broker.core.spiffe_id import SpiffeId
from broker.keys import TokenKeyPolicy
from broker.keys.file_store import FileKeyStore
from broker.policy.catalog import Catalog
from broker.policy.engine import PolicyEngine
from broker.policy.errors import PolicyError
from broker.policy.registrations import Registrations
from broker.service.audit_heads import AuditHeads
from broker.service.backends import Backend, Backends
from broker.service.context import Context
from broker.service.jobs import Jobs
from broker.service.known import KnownFacts
from broker.service.limits import Limits
from broker.service.services import Services
from inventory import findings, identities, ledger
from inventory.audit.heads import HeadCopy
from inventory.findings import Finding
from inventory.store import engine
from inventory.store.store import Store

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence

    from starlette.types import ASGIApp

    from broker.api.logs import AccessLog
    from broker.authn.workload_api import OwnSvid
    from broker.core.ids import InstanceTag
    from broker.core.ports import Adapter
    from broker.core.secret import Secret
    from broker.settings import Settings

log = structlog.get_logger(__name__)

IDENTITY_SECONDS_MAX: Final = 30
"""How long start-up waits for the broker's own certificate and the first bundles."""

KEY_RECHECK_SECONDS: Final = 0.02
"""How long a key that another process rotated or revoked may still be used here."""

LISTENERS: Final = ("workload", "operator", "ops")


class StartError(RuntimeError):
    """The broker cannot start; `problems` says everything that is wrong, a sentence each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


@dataclass(frozen=True, slots=True)
class _Configured:
    """What is read from files, checked against each other."""

    catalog: Catalog
    registrations: Registrations
    policy: PolicyEngine
    adapters: dict[str, Adapter]
    kinds: dict[str, str]


class BrokerProcess:
    """One broker: built once, started once, stopped once."""

    def __init__(self, settings: Settings, *, access_log: AccessLog | None = None) -> None:
        self.settings = settings
        self._access_log = access_log
        self._clock = SystemClock()
        self._bundles = BundleStore()
        self._background: list[asyncio.Task[None]] = []
        self._closers: list[Callable[[], Awaitable[None]]] = []
        self._chain_key: tuple[bytes, Secret[bytes]] | None = None
        self._have_certificate = asyncio.Event()
        self._tls: ServerTls | None = None
        self.readiness = Readiness()
        self.services: Services | None = None
        self.workload: Listener | None = None
        self.ops: Listener | None = None

    # --- start ---------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start everything, or raise `StartError` with everything stopped again."""
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise

    async def start_offline(self) -> Services:
        """Open ledger and backends and sweep, with no listener and no identity: for one-off commands.

        Nobody can ask for anything. `stop` ends it.

        Raises:
            StartError: the settings or the policy are wrong.
            LedgerInUseError: a broker is running on this ledger.

        """
        try:
            services, _, _, _ = await self._open()
            services.sweeper.start()
            self._closers.append(services.sweeper.close)
        except BaseException:
            await self.stop()
            raise
        return services

    async def _start(self) -> None:
        check_chain_extraction()
        services, telemetry, heads, registrations = await self._open()
        await self._register(services, registrations)
        await self._start_identity()
        await self._start_work(services, heads)
        # Last to start, first to stop: no request without everything behind it.
        await self._start_listeners(services, telemetry, heads)

    async def _open(self) -> tuple[Services, PrometheusTelemetry, AuditHeads, Registrations]:
        """Open keys and ledger, read policy, build the backends."""
        problems = settings_module.production_problems(self.settings)
        if problems:
            raise StartError(problems)
        # New keys beside an old ledger could unseal nothing in it: then the old ones must be found.
        untouched = engine.is_untouched(self.settings.ledger.path)
        self.settings.keys.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lifetimes = TokenKeyPolicy(token_ttl_seconds_max=self.settings.workload.token_ttl_seconds_max)
        keys = FileKeyStore(
            self.settings.keys.path,
            self._clock,
            policy=lifetimes,
            create=untouched,
            recheck_seconds=KEY_RECHECK_SECONDS,
        )
        self._closers.append(_as_async(engine.claim(self.settings.ledger.path)))
        copy = HeadCopy(self.settings.audit.copy_directory)
        store = Store.open(self.settings.ledger.path, keys, copy)
        self._closers.append(store.close)
        configured = configure(self.settings, store.instance, keys)
        services, telemetry = self._build_services(store, keys, configured)
        self.services = services
        heads = AuditHeads(services.ctx, copy)
        self._closers.append(heads.close)
        self._closers.append(services.ctx.backends.close)
        await self._report_slots_behind(services)
        return services, telemetry, heads, configured.registrations

    def _build_services(
        self, store: Store, keys: FileKeyStore, configured: _Configured
    ) -> tuple[Services, PrometheusTelemetry]:
        limits = self._limits()
        recipes = configured.catalog.recipes_by_adapter()
        backends = Backends(
            [
                Backend(adapter, configured.kinds[name], recipes.get(name, ()), self._clock, limits)
                for name, adapter in configured.adapters.items()
            ]
        )
        telemetry = PrometheusTelemetry(configured.adapters, LISTENERS)
        telemetry.watch_queue("ledger", lambda: store.writer.waiting)
        for (adapter, state, stuck), count in ledger.count_by_state(store.reader).items():
            telemetry.live(adapter, count)
            if stuck and state is not LeaseState.ACTIVE:
                telemetry.stuck(adapter, count)
        ctx = Context(
            store=store,
            clock=self._clock,
            keys=keys,
            policy=configured.policy,
            catalog=configured.catalog,
            backends=backends,
            telemetry=telemetry,
            limits=limits,
            known=KnownFacts(store),
            registrations=configured.registrations,
        )
        workload = self.settings.workload
        services = Services.build(ctx, issuer=workload.issuer, token_algorithm=workload.token_algorithm)
        return services, telemetry

    def _limits(self) -> Limits:
        chosen = self.settings.limits
        return Limits(
            require_owner=chosen.require_owner,
            history_window_seconds=chosen.history_window_seconds,
            mint_deadline_seconds=chosen.mint_deadline_seconds,
            open_tasks_max=chosen.open_tasks_max,
            sweep_tick_seconds=chosen.sweep_tick_seconds,
        )

    async def _report_slots_behind(self, services: Services) -> None:
        """Raise the alarm where the ledger does not reach its own signed heads."""
        for slot in services.ctx.store.slots_behind:
            log.error("audit.chain_behind_its_copy", slot=slot)
            finding = Finding(
                "audit-chain-behind",
                f"slot:{slot}",
                {"cause": "restored from a backup, or its tail was cut"},
                self._clock.now_ms(),
            )
            await services.ctx.store.writer.run(
                partial(findings.open_finding, finding=finding, actor="broker")
            )

    async def _register(self, services: Services, registrations: Registrations) -> None:
        now_ms = self._clock.now_ms()
        for registration in registrations:
            await services.ctx.store.writer.run(
                partial(identities.register, registration=registration, at_ms=now_ms)
            )

    async def _start_identity(self) -> None:
        """Follow bundles and the broker's own certificate; wait for the first of each."""
        chosen = self.settings.identity
        self._bundles.subscribe(lambda _bundles: self._rotate_tls())
        if chosen.bundles:
            files = FileBundleSource(files=chosen.bundles)
            await files.refresh(self._bundles)
            self._follow(files.run(self._bundles), files.close)
            self.readiness.add("bundle files", lambda: _first(files.problems))
        if chosen.workload_api_socket is not None:
            from broker.authn.workload_api import WorkloadApiSource  # noqa: PLC0415  gRPC is heavy

            spiffe_id = None if chosen.spiffe_id is None else SpiffeId.parse(chosen.spiffe_id)
            source = WorkloadApiSource(chosen.workload_api_socket, spiffe_id)
            source.on_rotation(self._take_svid)
            self._follow(source.run(self._bundles), source.close)
            self.readiness.add("workload api", lambda: _first(source.problems))
        if chosen.certificate is not None and chosen.key is not None:
            pair = CertificateFiles(chosen.certificate, chosen.key)
            self._follow(pair.run(self._take_certificate), _as_async(pair.close))
        try:
            async with asyncio.timeout(IDENTITY_SECONDS_MAX):
                await self._have_certificate.wait()
        except TimeoutError:
            raise StartError(
                [
                    (
                        "The broker's own certificate did not arrive: check identity.workload_api_socket (is "
                        "the agent running, has it an entry for the broker?) or the certificate files."
                    )
                ]
            ) from None

    def _take_svid(self, svid: OwnSvid) -> None:
        self._take_certificate(svid.chain_pem, svid.key_pem)

    def _take_certificate(self, chain_pem: bytes, key_pem: Secret[bytes]) -> None:
        self._chain_key = (chain_pem, key_pem)
        self._rotate_tls()
        self._have_certificate.set()

    def _rotate_tls(self) -> None:
        """Give new connections the certificate and trust anchors now in force."""
        if self._chain_key is None:
            return
        anchors = [
            authority.public_bytes(Encoding.PEM)
            for bundle in self._bundles.current.by_trust_domain.values()
            for authority in bundle.x509_authorities
        ]
        if self._tls is None:
            self._tls = ServerTls(*self._chain_key, anchors)
        else:
            self._tls.rotate(*self._chain_key, anchors)

    async def _start_listeners(
        self, services: Services, telemetry: PrometheusTelemetry, heads: AuditHeads
    ) -> None:
        chosen = self.settings
        limiter = RequestLimiter(
            LimitSettings(
                requests_per_second=chosen.limits.requests_per_second,
                burst=chosen.limits.request_burst,
                concurrent_per_identity=chosen.limits.concurrent_per_identity,
                concurrent_total=chosen.limits.concurrent_total,
            )
        )
        authenticator = Authenticator(self._bundles, self._clock, chosen.identity.audience)
        self.readiness.add(
            "trust bundles", lambda: None if self._bundles.current.by_trust_domain else "none has arrived"
        )
        self.readiness.add("audit copy", lambda: heads.failing)
        self.readiness.add("ledger", lambda: services.ctx.store.writer.last_failure)
        allowed_hosts = None
        if chosen.mode == "development":
            allowed_hosts = frozenset({"localhost", "127.0.0.1", "[::1]"})

        def bounded(app: ASGIApp, name: str, *, outside: bool) -> RequestBoundary:
            return RequestBoundary(
                app,
                listener=name,
                telemetry=telemetry,
                access_log=self._access_log,
                limiter=limiter if outside else None,
                allowed_hosts=allowed_hosts if outside else None,
            )

        self.workload = Listener(
            "workload",
            bounded(workload_app(services, authenticator, limiter), "workload", outside=True),
            TcpBind(chosen.workload.host, chosen.workload.port),
            telemetry=telemetry,
            tls=self._tls,
        )
        operator = Listener(
            "operator",
            bounded(operator_app(services, self.readiness), "operator", outside=False),
            UnixBind(chosen.operator.socket),
            telemetry=telemetry,
        )
        self.ops = Listener(
            "ops",
            bounded(ops_app(self.readiness, telemetry), "ops", outside=False),
            TcpBind(chosen.ops.host, chosen.ops.port),
            telemetry=telemetry,
        )
        listeners = Listeners(
            [operator, self.ops, self.workload], grace_seconds=chosen.limits.shutdown_seconds
        )
        await listeners.start()
        self._closers.append(listeners.stop)

    async def _start_work(self, services: Services, heads: AuditHeads) -> None:
        await self._record(AuditKind.BROKER_STARTED)
        services.sweeper.start()
        jobs = Jobs(
            services,
            heads,
            scan_seconds=self.settings.jobs.scan_every_seconds,
            sign_seconds=self.settings.audit.sign_every_seconds,
        )
        jobs.start()
        self._closers.append(services.sweeper.close)
        self._closers.append(_as_async(jobs.close))
        if self.settings.jobs.scan_at_start:
            self._background.append(asyncio.create_task(self._look_round(services), name="first scan"))

    async def _look_round(self, services: Services) -> None:
        """Check every backend's rights and scan it once, without holding up the start."""
        for backend in services.ctx.backends:
            for check in await checks_of(backend.adapter, backend.recipes):
                if not check.ok:
                    log.error(
                        "backend.check_failed", backend=backend.name, check=check.name, remedy=check.remedy
                    )
        await services.reconcile.scan_all()

    def _follow(self, running: Coroutine[None, None, None], close: Callable[[], Awaitable[None]]) -> None:
        self._background.append(asyncio.create_task(running))
        self._closers.append(close)

    # --- stop ----------------------------------------------------------------------------------

    async def stop(self) -> None:
        """Stop in the reverse order: no new requests, finish what runs, then close. Idempotent."""
        self.readiness.drain()
        if self.services is not None and self.workload is not None and self._closers:
            await self._record_quietly(AuditKind.BROKER_STOPPED)
        while self._closers:
            try:
                await self._closers.pop()()
            except Exception:
                log.exception("stop.part_failed")
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        self._background.clear()

    async def _record_quietly(self, kind: AuditKind) -> None:
        """Record, but stop all the same where the ledger cannot be written."""
        try:
            await self._record(kind)
        except BrokerError as error:
            log.warning("stop.unrecorded", code=error.code)

    async def _record(self, kind: AuditKind) -> None:
        if self.services is None:
            return
        ctx = self.services.ctx
        record = AuditRecord(
            kind=kind,
            at_ms=self._clock.now_ms(),
            actor="broker",
            fields={"policy_hash": ctx.policy.policy_hash, "instance": ctx.store.instance},
        )
        await ctx.store.writer.run(lambda tx: tx.audit(record))


def configure(settings: Settings, instance: InstanceTag, keys: FileKeyStore) -> _Configured:
    """Read policy and catalog, build the adapters, and hold them against each other.

    Raises:
        StartError: naming everything that is wrong at once.

    """
    directory = settings.policy.directory
    issuer = settings.workload.issuer
    problems: list[str] = []
    try:
        catalog = Catalog.load(directory / "catalog.yaml")
        registrations = Registrations.load(directory / "identities.yaml", catalog=catalog)
    except PolicyError as error:
        raise StartError(error.problems) from error
    kinds = {str(backend.get("name")): str(backend.get("kind")) for backend in settings.backends}
    try:
        adapters = build_all(
            [
                (str(backend.get("kind")), {k: v for k, v in backend.items() if k != "kind"})
                for backend in settings.backends
            ],
            instance,
            keys=keys,
            issuer=issuer,
            status_lists=f"{issuer}/statuslists",
            ttl_seconds_max=settings.workload.token_ttl_seconds_max,
        )
    except AdapterUnavailableError as error:
        raise StartError([str(error)]) from error
    for granted in catalog:
        adapter = adapters.get(granted.adapter)
        place = f"catalog: {granted.resource.id}/{granted.name}"
        if adapter is None:
            problems.append(f"{place}: there is no backend named {granted.adapter!r} in the settings.")
            continue
        problems += [f"{place}: recipe: {what}" for what in adapter.validate_recipe(granted.recipe)]
        longest = adapter.capabilities.ttl_seconds_max
        if granted.ttl_seconds_max > longest:
            problems.append(f"{place}: ttl_seconds_max is above the {longest} s that the backend keeps.")
    try:
        policy = PolicyEngine.load(
            directory,
            catalog,
            revocability={
                name: str(adapter.capabilities.revocability.effect) for name, adapter in adapters.items()
            },
        )
    except PolicyError as error:
        raise StartError([*problems, *error.problems]) from error
    if problems:
        raise StartError(problems)
    return _Configured(catalog, registrations, policy, adapters, kinds)


async def checks_of(adapter: Adapter, recipes: Sequence[Mapping[str, object]]) -> list[Check]:
    """Run an adapter's own checks; one that cannot run is a failed check."""
    try:
        return await adapter.check(recipes)
    except Exception as error:  # noqa: BLE001  any vendor's exception: it is what the check found
        return [
            Check(
                name=f"{adapter.name}: reachable",
                ok=False,
                remedy=f"The backend did not answer ({type(error).__name__}). Check host, port and network.",
            )
        ]


def _first(problems: Mapping[str, str]) -> str | None:
    """Return one problem out of several, as a line for `/readyz`."""
    return next((f"{part}: {problem}" for part, problem in problems.items()), None)


def _as_async(close: Callable[[], None]) -> Callable[[], Awaitable[None]]:
    async def run() -> None:
        close()

    return run
