"""Invariants I1 to I10 of the issuance protocol, held against whatever order of events Hypothesis finds.

Everything is checked by using the credentials, never by believing the ledger.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from adapters.fake import Fault, Operation
from broker.core.clock import ManualClock
from broker.core.errors import (
    BackendUnavailable,
    BudgetExhausted,
    IdentityRefused,
    LeaseLost,
    MintFailed,
    PolicyDenied,
    StillMinting,
    TaskClosed,
)
from broker.core.lease import ENDING, NEVER_ACTIVE, TERMINAL, LeaseState
from broker.core.task import TaskState
from broker.service.kill import KillOrder
from broker.service.tasks import TaskSpec
from inventory.kills import KillScope
from tests.machine.harness import Broker, HonestServer, Released
from tests.support.world import CHURN, CHURN_OWNER, caller

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from broker.core.task import Task

OPERATOR = "operator:uid=0"
LOGIN = ("orders-db", "read")
TOKEN = ("reports-api", "read")
DAY_SECONDS = 24 * 3600

EXPECTED = (
    BackendUnavailable,
    BudgetExhausted,
    IdentityRefused,
    LeaseLost,
    MintFailed,
    PolicyDenied,
    StillMinting,
    TaskClosed,
)
"""What a request may be refused with; anything else is a defect."""

MINT_FAULTS = st.sampled_from(
    [
        None,
        None,
        None,
        None,
        Fault.FAIL_BEFORE,
        Fault.FAIL_AFTER,
        Fault.REFUSE,
        Fault.LATE,
        Fault.LATE,
        Fault.HANG_BEFORE,
        Fault.HANG_AFTER,
    ]
)
END_FAULTS = st.sampled_from(
    [
        (Operation.REVOKE, Fault.FAIL_BEFORE),
        (Operation.REVOKE, Fault.FAIL_AFTER),
        (Operation.REVOKE, Fault.HANG_BEFORE),
        (Operation.REVOKE, Fault.HANG_AFTER),
        (Operation.VERIFY, Fault.UNKNOWN),
        (Operation.VERIFY, Fault.FAIL_BEFORE),
        (Operation.VERIFY, Fault.HANG_AFTER),
        (Operation.SCAN, Fault.FAIL_BEFORE),
    ]
)
AROUND_A_MINT = st.sampled_from(
    ["ends", "killed", "sweep", "sweep", "retry", "crash", "goes on", "is given up", "lands", "7", "61"]
)
SCOPES = [
    (KillScope.IDENTITY, str(CHURN)),
    (KillScope.OWNER, CHURN_OWNER),
    (KillScope.RESOURCE, LOGIN[0]),
]
pick = st.integers(min_value=0, max_value=10**6)


class LeaseMachine(RuleBasedStateMachine):
    """Drives one deployment through whatever may happen to it.

    Rules have no preconditions: lease ids are random and commits end when the disk says so, and
    what Hypothesis draws must not depend on either. A rule that finds nothing to act on does nothing.
    """

    strong_fence: ClassVar[bool] = True
    two_step: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self._home = tempfile.TemporaryDirectory(prefix="lease-machine-")
        self._loop = asyncio.new_event_loop()
        self.clock = ManualClock()
        self.server = HonestServer(self.clock, strong_fence=self.strong_fence)
        self.tasks: list[Task] = []
        self.vanished: set[str] = set()
        self.killed: set[tuple[KillScope, str]] = set()
        self.suspended = False

        async def build() -> Broker:
            return Broker(Path(self._home.name), self.clock, self.server, two_step=self.two_step)

        self.broker = self.run(build())

    def run(self, doing: Coroutine[Any, Any, Any]) -> Any:
        return self._loop.run_until_complete(doing)

    def act(self, doing: Coroutine[Any, Any, Any], *refusals: type[Exception]) -> None:
        """Do something, let it settle, and take only the refusals that may be."""

        async def step() -> None:
            with contextlib.suppress(refusals):
                await doing
            await self.broker.settle()

        self.run(step())
        unexpected = [error for error in self.broker.refused if not isinstance(error, EXPECTED)]
        self.broker.refused.clear()
        if unexpected:
            raise unexpected[0]

    @property
    def services(self) -> Any:
        return self.broker.world.services

    def order(self, scope: KillScope, value: str) -> KillOrder:
        return KillOrder(scope=scope, value=value, reason="drill", actor=OPERATOR)

    # --- callers ---------------------------------------------------------------------------------

    @initialize()
    def begins(self) -> None:
        self.open_task(3600, 100)

    @rule(deadline=st.sampled_from([60, 600, 3600]), budget=st.sampled_from([1, 2, 100]))
    def open_task(self, deadline: int, budget: int) -> None:
        async def opens() -> None:
            opened = self.broker.world.open_task(deadline_seconds=deadline, budget_leases=budget)
            self.tasks.append(await opened)

        self.act(opens(), IdentityRefused)

    @rule(
        what=st.sampled_from([LOGIN, LOGIN, LOGIN, TOKEN]),
        which=pick,
        ttl=st.sampled_from([30, 300, None]),
        key=st.sampled_from([None, None, "key"]),
        fault=MINT_FAULTS,
        forgiven=st.booleans(),
    )
    def ask(
        self,
        what: tuple[str, str],
        which: int,
        ttl: int | None,
        key: str | None,
        fault: Fault | None,
        *,
        forgiven: bool,
    ) -> None:
        if forgiven:
            self._forgive()
        task = self._task(which)
        # A key of its own per body: the refusal of another body is tested elsewhere.
        self._ask(what, task, key and f"{key} {what} {task.id} {ttl}", ttl, fault)

    @rule(fault=MINT_FAULTS, again=st.integers(min_value=1, max_value=3))
    def ask_with_a_key_again_and_again(self, fault: Fault | None, again: int) -> None:
        self._forgive()
        task = self.tasks[-1]
        for _ in range(1 + again):
            self._ask(LOGIN, task, f"again {task.id}", 300, fault)
            fault = None

    @rule(what=st.sampled_from([LOGIN, TOKEN]), fault=MINT_FAULTS)
    def ask_inline(self, what: tuple[str, str], fault: Fault | None) -> None:
        self._ask(what, TaskSpec(purpose="churn-report"), None, 60, fault)

    @rule(
        fault=st.sampled_from([Fault.LATE, Fault.HANG_BEFORE, Fault.HANG_AFTER, Fault.FAIL_AFTER]),
        events=st.lists(AROUND_A_MINT, min_size=2, max_size=5),
    )
    def a_mint_in_trouble(self, fault: Fault, events: list[str]) -> None:
        """What happens around one mint whose answer does not come as it should."""
        self._forgive()
        self.server.down = False
        self.open_task(3600, 100)
        self._ask(LOGIN, self.tasks[-1], None, 300, fault)
        for event in events:
            match event:
                case "ends":
                    self.act(self.broker.world.end(self.tasks[-1]))
                case "killed":
                    self.act(self.services.kill.kill(self.order(*SCOPES[2])))
                    self.killed.add(SCOPES[2])
                case "sweep":
                    self.sweep()
                case "retry":
                    self._retry(-1)
                case "crash":
                    self.act(self.broker.crash())
                case "goes on" | "is given up" | "lands":
                    self.what_is_in_flight(event)
                case _:
                    self.act(self.broker.pass_time(int(event)))
            self.every_live_object_has_a_row_and_no_ended_one_lives()
            self.a_secret_works_exactly_as_long_as_it_may()
            self.nothing_is_issued_under_what_has_ended()

    def _ask(
        self,
        what: tuple[str, str],
        task: Task | TaskSpec,
        key: str | None,
        ttl: int | None,
        fault: Fault | None,
    ) -> None:
        async def asks() -> None:
            asking = self.broker.world.ask(task, *what, key=key, ttl_seconds=ttl)
            self.broker.ask(asyncio.get_running_loop().create_task(asking), key)

        if fault is not None and what is LOGIN:
            self.server.inject(Operation.MINT, fault)
        self.act(asks())
        self._use_all()

    def _use_all(self) -> None:
        """Open a session with every login that has none yet."""
        for released in self.broker.released:
            if released.is_login and not released.sessions:
                session = self.server.log_in(str(released.fields["username"]), released.secret)
                if session is not None:
                    released.sessions.append(session)

    @rule(which=pick, how=st.sampled_from(["end", "kill", "release", "release"]), swept=st.booleans())
    def something_ends(self, which: int, how: str, *, swept: bool) -> None:
        released = self._released(which)
        if how == "end":
            self.act(self.broker.world.end(self._task(which)))
        elif how == "kill":
            self.act(self.services.kill.kill(self.order(KillScope.TASK, self._task(which).id)))
        elif released is not None:
            self.act(self.services.revoke.release(caller(CHURN), released.issued.lease.id))
        if swept:
            self.sweep()

    def _forgive(self) -> None:
        for order in sorted(self.killed):
            self._lift(order)
        if self.suspended:
            self._suspend_or_resume()

    def _task(self, which: int) -> Task:
        # One of the latest, of which some are still open.
        return self.tasks[-1 - which % min(3, len(self.tasks))]

    def _released(self, which: int) -> Released | None:
        # The latest first: what was released long ago has mostly ended.
        return self.broker.released[-1 - which % len(self.broker.released)] if self.broker.released else None

    # --- operators -------------------------------------------------------------------------------

    @rule(order=st.sampled_from([*SCOPES, "suspend", "retry", "retry"]), which=pick, undone=st.booleans())
    def an_operator_acts(self, order: Any, which: int, *, undone: bool) -> None:
        if order == "retry":
            self._retry(which)
        elif order == "suspend":
            self._suspend_or_resume()
            if undone and self.suspended:
                self._suspend_or_resume()
        elif order in self.killed:
            self._lift(order)
        else:
            self.act(self.services.kill.kill(self.order(*order)))
            self.killed.add(order)
            if undone:
                self._lift(order)

    def _lift(self, what: tuple[KillScope, str]) -> None:
        self.act(self.services.kill.lift(self.order(*what)))
        self.killed.remove(what)

    def _suspend_or_resume(self) -> None:
        inventory = self.services.inventory
        if self.suspended:
            self.act(inventory.resume(CHURN, reason="drill", actor=OPERATOR))
        else:
            self.act(inventory.suspend(CHURN, reason="drill", actor=OPERATOR))
        self.suspended = not self.suspended

    def _retry(self, which: int) -> None:
        ending = [row.id for row in self.broker.rows().values() if row.state in ENDING]
        if ending:
            self.act(self.services.leases.retry(ending[which % len(ending)], actor=OPERATOR))
            self.sweep()

    # --- time ------------------------------------------------------------------------------------

    @rule(
        seconds=st.sampled_from([0, 1, 7, 11, 20, 61, 300, 900]), then=st.sampled_from(["", "sweep", "scan"])
    )
    def time_passes(self, seconds: int, then: str) -> None:
        self.act(self.broker.pass_time(seconds))
        if then == "sweep":
            self.sweep()
        elif then == "scan":
            self.act(self.services.reconcile.scan_all())

    @rule(seconds=st.sampled_from([-600, -30, 30, 600]))
    def the_clock_jumps(self, seconds: int) -> None:
        if not self.strong_fence:
            # A forward jump past the second look while a mint is in flight is what only the scan
            # can mend (docs/lease-life.md); `test_clock_jumps.py` shows that it does.
            self.server.give_up()
            self.act(self.broker.settle())
            self.server.land()
        self.clock.advance(seconds=seconds)

    # --- bad luck --------------------------------------------------------------------------------

    @rule(fault=END_FAULTS)
    def a_fault_waits(self, fault: tuple[Operation, Fault]) -> None:
        self.server.inject(*fault)

    @rule(stays=st.booleans())
    def the_backend_goes_down(self, *, stays: bool) -> None:
        self.server.down = True
        self.sweep()
        self.server.down = stays

    @rule()
    def the_backend_comes_up(self) -> None:
        self.server.down = False

    @rule(how=st.sampled_from(["goes on", "is given up", "lands"]))
    def what_is_in_flight(self, how: str) -> None:
        async def happens() -> None:
            if how == "goes on":
                self.server.release()
            elif how == "is given up":
                self.server.give_up()
            else:
                self.server.land()

        self.act(happens())

    @rule(how=st.sampled_from(["crash", "crash", "restart"]))
    def the_process_ends_and_begins(self, how: str) -> None:
        self.act(self.broker.crash() if how == "crash" else self.broker.restart())

    @rule(which=pick)
    def somebody_drops_a_login(self, which: int) -> None:
        names = list(self.server.logins)
        if names:
            name = names[which % len(names)]
            self.vanished.add(name)
            del self.server.logins[name]

    @rule()
    def sweep(self) -> None:
        self.act(self.broker.sweep())

    # --- what must hold at every moment --------------------------------------------------------------

    @invariant()
    def every_live_object_has_a_row_and_no_ended_one_lives(self) -> None:
        self.broker.check_backend()

    @invariant()
    def a_secret_works_exactly_as_long_as_it_may(self) -> None:
        rows, now_ms = self.broker.rows(), self.clock.now_ms()
        for released in self.broker.released:
            row = rows[released.issued.lease.id]
            assert row.was_active, "I3: a secret was released whose lease never was active"
            works = self.broker.works(released)
            if row.state is LeaseState.REVOKED:
                assert not works, "I2: proven dead, and it works"
                assert not any(session.alive for session in released.sessions), "I5: a session outlived it"
            if released.is_login:
                if row.state is LeaseState.ACTIVE and row.backend_name not in self.vanished:
                    assert works == (now_ms < row.not_after_ms), "I6: another's end took it along"
            elif row.state is not LeaseState.ACTIVE or now_ms >= row.expires_ms:
                assert not works, "introspection calls a dead token active"
            elif now_ms < row.expires_ms // 1000 * 1000:
                assert works == (not self.suspended and not self._covers_tokens()), "a live token is refused"

    def _covers_tokens(self) -> bool:
        return any(scope is not KillScope.RESOURCE for scope, _ in self.killed)

    @invariant()
    def one_key_has_one_live_credential(self) -> None:
        """I7, and not only after the drain: the old lease ends in the commit that begins the new one."""
        rows = self.broker.rows()
        live = [
            released.key
            for released in self.broker.released
            if released.key is not None and rows[released.issued.lease.id].state is LeaseState.ACTIVE
        ]
        assert len(live) == len(set(live)), "I7: two live credentials for one key"

    @invariant()
    def nothing_is_issued_under_what_has_ended(self) -> None:
        tasks = {row[0]: row[1] for row in self._read("SELECT id, state FROM tasks")}
        for row in self.broker.rows().values():
            if row.task_id and tasks[row.task_id] == TaskState.ENDED:
                assert row.state not in {*NEVER_ACTIVE, LeaseState.ACTIVE}, "a lease survived its task's end"

    def _read(self, sql: str) -> list[Any]:
        return self.broker.world.store.reader.execute(sql).fetchall()

    # --- what must hold once the faults are over -------------------------------------------------------

    async def _calm_down(self) -> None:
        self.server.clear()
        await self.broker.settle()
        self.server.land()
        for _ in range(4):
            await self.broker.sweep()
            await self.broker.pass_time(20 * 60)

    def teardown(self) -> None:
        try:
            self.run(self._final_drain())
        finally:
            self.run(self.broker.world.close())
            self._loop.close()
            self._home.cleanup()

    async def _final_drain(self) -> None:
        await self._calm_down()
        await self.broker.sweep()
        rows = self.broker.rows()
        bounded = {*NEVER_ACTIVE, *ENDING}
        assert not [row for row in rows.values() if row.state in bounded], "I4: left behind"
        self.every_live_object_has_a_row_and_no_ended_one_lives()
        self.a_secret_works_exactly_as_long_as_it_may()

        await self.broker.pass_time(DAY_SECONDS)
        await self._calm_down()
        await self.services.reconcile.scan_all()
        await self._calm_down()
        assert all(row.state in TERMINAL for row in self.broker.rows().values())
        assert self.server.logins == {}
        assert not any(self.broker.works(released) for released in self.broker.released)
        self.broker.check_audit()
        self.broker.check_no_secret_at_rest()


class WithoutAFence(LeaseMachine):
    """The second look stands in for the fence (DESIGN 4, rule 5)."""

    strong_fence = False


class InTwoSteps(LeaseMachine):
    """A handle is recorded before anything usable exists."""

    two_step = True


class InTwoStepsWithoutAFence(LeaseMachine):
    """Both."""

    strong_fence = False
    two_step = True


MACHINES = [LeaseMachine, WithoutAFence, InTwoSteps, InTwoStepsWithoutAFence]
COMMON: dict[str, Any] = {
    "deadline": None,  # a commit waits for the disk
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.filter_too_much],
    "print_blob": True,
}
SHORT = settings(max_examples=25, stateful_step_count=30, **COMMON)
LONG = settings(max_examples=120, stateful_step_count=60, **COMMON)


@pytest.mark.parametrize("machine", MACHINES)
def test_the_life_of_leases(machine: type[LeaseMachine]) -> None:
    run_state_machine_as_test(machine, settings=SHORT)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("machine", MACHINES)
def test_the_life_of_leases_at_length(machine: type[LeaseMachine]) -> None:
    run_state_machine_as_test(machine, settings=LONG)
