"""What the machine drives: a broker that dies and comes back, and a backend that is honest about delays."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import orjson

from adapters.fake import FakeRefusedError, FakeServer, FakeTroubleError, Fault, Operation
from broker.core.ids import lease_of_backend_name
from broker.core.lease import LeaseState
from inventory import ledger
from inventory.audit.public_keys import PublicKeys
from inventory.audit.verify import verify_database
from tests.support.ledger import migrated
from tests.support.world import REPORTS_API, World, caller

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from adapters.fake import FakeLogin, FakeSession
    from broker.core.clock import ManualClock
    from broker.core.ids import LeaseId
    from broker.core.lease import Lease
    from broker.service.issue import Issued

SETTLE_SECONDS: Final = 20
SWEEPS_MAX: Final = 200
CALL_MS: Final = 5_000
"""The total deadline of a `FakeAdapter`'s calls."""

T_INFLIGHT_MS: Final = 10_000
"""What `FakeAdapter` declares: no mint takes effect later than this after its call was given up."""


@dataclass(slots=True)
class LateEffect:
    """A mint whose call was given up while the request was still on its way."""

    effect: Callable[[], None]
    given_up_ms: int


class HonestServer(FakeServer):
    """A backend that keeps the promise adapters make about calls in flight.

    A call that hangs can be given up, as its deadline does, or die with its broker; what it
    asked for may still come, once, and within `T_INFLIGHT_MS` of real time.

    Attributes:
        true_ms: time as it really passes, which jumps of the clock do not move.
        passwords: every password there ever was.

    """

    def __init__(self, clock: ManualClock, *, strong_fence: bool) -> None:
        super().__init__(clock, strong_fence=strong_fence)
        self.true_ms = 0
        self.hanging: list[asyncio.Future[None]] = []
        self.passwords: set[str] = set()
        self._in_flight: list[LateEffect] = []

    async def run(self, operation: Operation, name: str, effect: Callable[[], None]) -> Fault | None:
        self.calls.append((operation, name))
        if self.down:
            raise FakeTroubleError("the backend is down")
        queue = self._faults[operation]
        fault = queue.popleft() if queue else None
        match fault:
            case Fault.REFUSE:
                raise FakeRefusedError("the backend refused")
            case Fault.FAIL_BEFORE:
                raise FakeTroubleError("the backend failed")
            case Fault.LATE:
                self._in_flight.append(LateEffect(effect, self.true_ms))
                raise FakeTroubleError("no answer in time")
            case Fault.HANG_BEFORE:
                try:
                    await self._hang()
                except BaseException:
                    if operation is Operation.MINT:
                        self._in_flight.append(LateEffect(effect, self.true_ms))
                    raise
        effect()
        if fault is Fault.HANG_AFTER:
            await self._hang()
        if fault is Fault.FAIL_AFTER:
            raise FakeTroubleError("the answer was lost")
        return fault

    async def _hang(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self.hanging.append(waiter)
        try:
            await waiter
        finally:
            self.hanging.remove(waiter)

    def create(self, name: str, login: FakeLogin) -> None:
        super().create(name, login)
        self.passwords.add(login.password)

    def release(self) -> None:
        for waiter in self.hanging:
            if not waiter.done():
                waiter.set_result(None)

    def give_up(self) -> None:
        """Let the deadline of every hanging call strike."""
        for waiter in self.hanging:
            if not waiter.done():
                waiter.set_exception(TimeoutError())

    def land(self, *, given_up_until_ms: int | None = None) -> None:
        """Let late mints take effect, as far as the fence lets them."""
        until_ms = self.true_ms if given_up_until_ms is None else given_up_until_ms
        due = [late for late in self._in_flight if late.given_up_ms <= until_ms]
        self._in_flight = [late for late in self._in_flight if late.given_up_ms > until_ms]
        for late in due:
            with contextlib.suppress(FakeRefusedError, FakeTroubleError):
                late.effect()

    def pass_time(self, ms: int) -> None:
        """Let real time pass; what is in flight lands before its time is up."""
        self.land(given_up_until_ms=self.true_ms + ms - T_INFLIGHT_MS)
        self.true_ms += ms


@dataclass(slots=True)
class Released:
    """One secret that a caller was given, and the sessions it opened."""

    issued: Issued
    key: str | None
    sessions: list[FakeSession] = field(default_factory=list)

    @property
    def fields(self) -> dict[str, str | int]:
        assert self.issued.credential is not None
        return self.issued.credential.reveal()

    @property
    def is_login(self) -> bool:
        return "password" in self.fields

    @property
    def secret(self) -> str:
        return str(self.fields["password" if self.is_login else "access_token"])


class Broker:
    """One deployment over its whole life: a ledger, a key file and a backend that outlive each process."""

    def __init__(self, directory: Path, clock: ManualClock, server: HonestServer, *, two_step: bool) -> None:
        self.directory = directory
        self.clock = clock
        self.server = server
        self.released: list[Released] = []
        self.refused: list[BaseException] = []
        self._two_step = two_step
        self._asks: set[asyncio.Task[None]] = set()
        migrated(directory / "ledger" / "ledger.db")
        self.world = self._build()

    def _build(self) -> World:
        return World.build(self.directory, clock=self.clock, server=self.server, two_step=self._two_step)

    # --- what happens to it ----------------------------------------------------------------------

    def ask(self, asking: asyncio.Task[Issued], key: str | None) -> None:
        """Follow a request to its answer, whenever that comes."""

        async def follow() -> None:
            try:
                issued = await asking
            except Exception as error:  # noqa: BLE001  the machine judges it
                self.refused.append(error)
                return
            if issued.credential is not None:
                self.released.append(Released(issued, key))

        self._asks.add(asyncio.get_running_loop().create_task(follow()))

    async def settle(self) -> None:
        """Wait until everything under way has finished or hangs in the backend."""
        async with asyncio.timeout(SETTLE_SECONDS):
            while True:
                under_way = [*self._asks, *self.world.services.sweeper._working]
                hanging = [waiter for waiter in self.server.hanging if not waiter.done()]
                if sum(not task.done() for task in under_way) <= len(hanging):
                    break
                await asyncio.sleep(0)
        finished = {task for task in self._asks if task.done()}
        self._asks -= finished
        for task in finished:
            task.result()

    async def sweep(self) -> None:
        for _ in range(SWEEPS_MAX):
            did_something = await self.world.services.sweeper.sweep_once()
            await self.settle()
            if not did_something:
                return
        raise AssertionError("the sweeper does not come to rest")

    async def crash(self) -> None:
        """Die as by kill -9: nothing is finished, nothing is written; what is in flight stays in flight."""
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        self._asks.clear()
        store = self.world.store
        store.writer._executor.shutdown()
        store.writer._connection.close()
        store.reader.close()
        self.world = self._build()

    async def restart(self) -> None:
        self.server.release()
        await self.settle()
        await self.world.close()
        self.world = self._build()

    async def pass_time(self, seconds: int) -> None:
        """Let real time pass: calls that hang longer than their deadline are given up."""
        ms = seconds * 1000
        if self.server.hanging and ms >= CALL_MS:
            self.server.give_up()
            await self.settle()
        self.server.pass_time(ms)
        self.clock.advance(ms=ms)

    # --- what is true of it ------------------------------------------------------------------------

    def rows(self) -> dict[LeaseId, Lease]:
        return {lease.id: lease for lease in ledger.page(self.world.store.reader, limit=1000)}

    def works(self, released: Released) -> bool:
        """Use the credential."""
        if released.is_login:
            session = self.server.log_in(str(released.fields["username"]), released.secret)
            if session is None:
                return False
            self.server.sessions.remove(session)
            return True
        answer = self.world.services.tokens.introspect(caller(REPORTS_API), released.secret)
        return answer["active"] is True

    def check_audit(self) -> None:
        """I9: the chain is unbroken and tells one move after the other, up to where each row stands."""
        path = self.directory / "ledger" / "ledger.db"
        public = PublicKeys(self.world.store.instance, self.world.keys.audit_keys())
        report = verify_database(path, public, None)
        assert report.findings == ()
        stands: dict[str, str] = {}
        bodies = self.world.store.reader.execute(
            "SELECT body FROM audit WHERE kind = 'lease.moved' ORDER BY slot, seq"
        )
        for (body,) in bodies:
            event = orjson.loads(body)["event"]
            fields = event["fields"]
            assert fields["from"] == stands.get(event["lease_id"])
            stands[event["lease_id"]] = fields["to"]
        assert stands == {lease.id: lease.state for lease in self.rows().values()}

    def check_no_secret_at_rest(self) -> None:
        """I10: no file of the ledger holds a secret that was ever made."""
        secrets = {released.secret for released in self.released} | self.server.passwords
        for path in sorted((self.directory / "ledger").iterdir()):
            content = path.read_bytes()
            assert not [path.name for secret in secrets if secret.encode() in content]

    def check_backend(self) -> None:
        """I1 and I2 for every object there is, whether anybody holds its secret or not."""
        rows = self.rows()
        for name in self.server.logins:
            lease_id = lease_of_backend_name(self.world.store.instance, name)
            assert lease_id in rows, "a live object without a row"
        over = {LeaseState.REVOKED, LeaseState.FAILED}
        alive_rows = {row.backend_name for row in rows.values() if row.state not in over}
        for row in rows.values():
            if row.state in over and row.backend_name not in alive_rows:
                assert row.backend_name not in self.server.logins, f"{row.state} and alive"
