"""Client for nhi-broker: open a task, get a credential, and it is revoked when the task ends.

::

    from nhi_sdk import Broker

    with Broker.from_env() as broker:
        with (
            broker.task("churn-report") as task,
            task.credential("orders-db", "read", tool="sql.query", reason="churn by plan") as cred,
        ):
            rows = cred.connect().execute("select plan, count(*) from orders group by plan").fetchall()
"""

from __future__ import annotations

from nhi_sdk._exchange import RetryPolicy
from nhi_sdk._version import VERSION
from nhi_sdk.aio import AsyncBroker, AsyncOpenTask
from nhi_sdk.bearer import BearerAuth
from nhi_sdk.broker import Broker, OpenTask
from nhi_sdk.errors import (
    BudgetExhausted,
    ConfigurationError,
    Conflict,
    Denied,
    FieldError,
    InvalidRequest,
    MissingExtra,
    NhiError,
    NotFound,
    Problem,
    ProblemError,
    RateLimited,
    SvidError,
    TaskClosed,
    TransportError,
    Unauthenticated,
    Unavailable,
)
from nhi_sdk.models import (
    AccessToken,
    CatalogItem,
    Credential,
    Decision,
    Lease,
    LeaseState,
    OtherSecret,
    PostgresLogin,
    Secret,
    Task,
    TaskEnd,
)
from nhi_sdk.svid import (
    CaFile,
    CertificateSource,
    ClientCertificate,
    StaticSource,
    SvidSource,
    TokenFileSource,
    TrustSource,
    WorkloadApiSource,
)

__all__ = [
    "VERSION",
    "AccessToken",
    "AsyncBroker",
    "AsyncOpenTask",
    "BearerAuth",
    "Broker",
    "BudgetExhausted",
    "CaFile",
    "CatalogItem",
    "CertificateSource",
    "ClientCertificate",
    "ConfigurationError",
    "Conflict",
    "Credential",
    "Decision",
    "Denied",
    "FieldError",
    "InvalidRequest",
    "Lease",
    "LeaseState",
    "MissingExtra",
    "NhiError",
    "NotFound",
    "OpenTask",
    "OtherSecret",
    "PostgresLogin",
    "Problem",
    "ProblemError",
    "RateLimited",
    "RetryPolicy",
    "Secret",
    "StaticSource",
    "SvidError",
    "SvidSource",
    "Task",
    "TaskClosed",
    "TaskEnd",
    "TokenFileSource",
    "TransportError",
    "TrustSource",
    "Unauthenticated",
    "Unavailable",
    "WorkloadApiSource",
]
