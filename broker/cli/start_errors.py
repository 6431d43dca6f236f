"""What keeps a broker from starting, told apart from a defect of ours."""

from __future__ import annotations

from broker.api.listeners import ListenerError
from broker.api.tls import TlsConfigError
from broker.app import StartError
from broker.authn.trust_bundle import BundleError
from broker.core.errors import BrokerError
from broker.core.spiffe_id import SpiffeIdError
from broker.keys.key_file import KeyStoreError
from inventory.audit.heads import HeadCopyError
from inventory.audit.slots import NoSlotLeftError
from inventory.store.engine import LedgerInUseError, LedgerSchemaError

_OURS = (
    BundleError,
    HeadCopyError,
    KeyStoreError,
    LedgerInUseError,
    LedgerSchemaError,
    ListenerError,
    NoSlotLeftError,
    SpiffeIdError,
    TlsConfigError,
)


def problems_of(error: BaseException) -> tuple[str, ...] | None:
    """Return what a person can mend, a sentence each; None where the error is a defect."""
    if isinstance(error, StartError):
        return error.problems
    if isinstance(error, BrokerError):
        return (error.detail,)
    if isinstance(error, _OURS):
        return (str(error),)
    if isinstance(error, OSError):
        where = "" if error.filename is None else f"{error.filename}: "
        return (f"{where}{error.strerror or type(error).__name__}",)
    return None
