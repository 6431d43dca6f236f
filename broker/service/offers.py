"""What a caller may ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from broker.core.facts import IdentityFacts
    from broker.policy.catalog import CatalogAction
    from broker.service.context import Context


@dataclass(frozen=True, slots=True)
class Offer:
    """One catalog action that policy could allow this caller, and what its backend promises."""

    granted: CatalogAction
    kind: str
    revocability: str


class Offers:
    """Serves `GET /catalog`: a caller learns of nothing that policy would never allow it."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx

    def for_identity(self, facts: IdentityFacts) -> list[Offer]:
        """Return the offers in catalog order; the catalog bounds them."""
        offers = []
        for granted in self._ctx.policy.visible(facts, self._ctx.clock.now_ms()):
            backend = self._ctx.backends.of(granted.adapter)
            offers.append(Offer(granted, backend.kind, str(backend.capabilities.revocability)))
        return offers
