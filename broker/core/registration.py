"""What ``policies/identities.yaml`` says of one identity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from broker.core.spiffe_id import SpiffeId


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """What an operator says of one identity; empty strings stand for what the file does not say.

    Attributes:
        owner: the accountable person or team, in printable ASCII without spaces.
        kind: ``agent``, ``service``, ``tool``, or any other word; policy may use it.

    """

    spiffe_id: SpiffeId
    kind: str = "workload"
    owner: str = ""
    backup_owner: str = ""
    team: str = ""
    environment: str = ""
    purpose: str = ""
    criticality: str = ""
