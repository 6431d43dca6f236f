"""What policy is told of an identity and its past, kept in memory for as long as it is true.

The embedded ledger has one writer, in this process, and that writer counts every change
of these facts (`inventory.store.writer.FactsVersion`). While the count stands still,
nothing has to be read again; when it moves, everything here is forgotten.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from broker.core.facts import History
from broker.core.task import TaskState
from inventory import decisions, identities, kills
from inventory import tasks as task_rows

if TYPE_CHECKING:
    from broker.core.facts import Grant, IdentityFacts
    from broker.core.ids import TaskId
    from broker.core.spiffe_id import SpiffeId
    from broker.core.task import Task
    from inventory.kills import Kill
    from inventory.store.store import Store

REMEMBERED_MAX: Final = 10_000
"""Identities and scopes remembered of each kind; beyond it everything is forgotten and read again."""


class KnownFacts:
    """Reads identities, grants and kills through a memory that a change empties.

    Attributes:
        version: the count that what is remembered belongs to.

    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.version = store.writer.facts.current
        self._identities: dict[str, IdentityFacts] = {}
        self._grants: dict[str, dict[Grant, int]] = {}
        self._kills: list[Kill] | None = None
        self._tasks: dict[TaskId, Task] = {}

    def refresh(self) -> int:
        """Forget what may have changed, and return the version that reads from now on belong to."""
        version = self._store.writer.facts.current
        if version != self.version or max(len(self._identities), len(self._grants)) > REMEMBERED_MAX:
            self._identities.clear()
            self._grants.clear()
            self._kills = None
            self.version = version
        return version

    def identity(self, spiffe_id: SpiffeId) -> IdentityFacts | None:
        """Return what the inventory knows of an identity, None where it was never seen."""
        self.refresh()
        known = self._identities.get(spiffe_id)
        if known is None:
            known = identities.facts(self._store.reader, spiffe_id)
            if known is not None:
                self._identities[spiffe_id] = known
        return known

    def history(self, *, task: str | None, identity: str, since_ms: int) -> History:
        """Return what was granted in the task at any time and to the identity since `since_ms`."""
        self.refresh()
        of_task = frozenset() if task is None else decisions.within(self._grants_of(task), 0)
        return History(task=of_task, identity=decisions.within(self._grants_of(identity), since_ms))

    def kill(self, *, identity: str, owner: str, resource: str) -> Kill | None:
        """Return a kill that covers the identity, its owner or the resource."""
        self.refresh()
        if self._kills is None:
            self._kills = kills.every(self._store.reader)
        if not self._kills:
            return None
        return next((kill for kill in self._kills if kill.covers(identity, owner, resource)), None)

    def last_granted_ms(self, scope: str, grant: Grant) -> int:
        """Return when a grant was last recorded in a scope, 0 where never."""
        return self._grants_of(scope).get(grant, 0)

    def task(self, task_id: TaskId) -> Task | None:
        """Return a task; what it says is fixed, but for the count of its leases.

        An open one is remembered until the commit that ends it. Whoever issues under it still
        takes from its budget in the transaction, and that alone decides.
        """
        known = self._tasks.get(task_id)
        if known is None:
            known = task_rows.get(self._store.reader, task_id)
            if known is not None and known.state is TaskState.OPEN:
                if len(self._tasks) >= REMEMBERED_MAX:
                    self._tasks.clear()
                self._tasks[task_id] = known
        return known

    def forget_task(self, task_id: TaskId) -> None:
        """Forget a task that has ended. To be called after the commit that ended it."""
        self._tasks.pop(task_id, None)

    def _grants_of(self, scope: str) -> dict[Grant, int]:
        known = self._grants.get(scope)
        if known is None:
            known = self._grants[scope] = decisions.grants_of(self._store.reader, scope)
        return known
