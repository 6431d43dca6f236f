"""What every service works with. Built once by the composition root."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from broker.service.watch import LeaseWatch

if TYPE_CHECKING:
    from broker.core.clock import Clock
    from broker.core.ports import KeyStore
    from broker.core.telemetry import Telemetry
    from broker.policy.catalog import Catalog
    from broker.policy.engine import PolicyEngine
    from broker.policy.registrations import Registrations
    from broker.service.backends import Backends
    from broker.service.known import KnownFacts
    from broker.service.limits import Limits
    from inventory.store.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """Collaborators shared by the services.

    Attributes:
        known: what policy is told, remembered while it is true.
        sweep_due: set by every commit that leaves work for the sweeper.
        watch: told of every lease that reaches its end.

    """

    store: Store
    clock: Clock
    keys: KeyStore
    policy: PolicyEngine
    catalog: Catalog
    backends: Backends
    telemetry: Telemetry
    limits: Limits
    registrations: Registrations
    known: KnownFacts
    watch: LeaseWatch = field(default_factory=LeaseWatch)
    sweep_due: asyncio.Event = field(default_factory=asyncio.Event)
