"""One-off work on the ledger of a broker that is not running."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from broker.api.logs import configure_logging
from broker.api.views import proof_view
from broker.app import BrokerProcess

if TYPE_CHECKING:
    from broker.settings import Settings


async def prove_offline(settings: Settings, resource: str, action: str | None) -> dict[str, Any]:
    """Prove a backend with the ledger claimed by this process; a broker cannot start meanwhile."""
    configure_logging(level="ERROR", stream=sys.stderr)
    broker = BrokerProcess(settings)
    services = await broker.start_offline()
    try:
        proof = await services.prove.run(resource, action, actor=f"operator:uid={os.geteuid()}")
    finally:
        await broker.stop()
    return proof_view(proof)
