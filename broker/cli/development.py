"""What the commands that start everything on one machine have in common."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class PartsFailedError(Exception):
    """Something that a person can mend kept the parts from starting; the message says what."""


@contextmanager
def parts_explained() -> Iterator[None]:
    """Raise `PartsFailedError` for what keeps the parts from starting; defects pass through."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise PartsFailedError(
            f"{error.name} is not installed; this command needs more than a server does: "
            "pip install 'nhi-broker[demo]'"
        ) from None
    except Exception as error:
        problems = _problems_of(error)
        if problems is None:
            raise
        raise PartsFailedError("; ".join(problems)) from error


def _problems_of(error: Exception) -> tuple[str, ...] | None:
    from broker.cli.start_errors import problems_of  # noqa: PLC0415  heavy: see the package
    from broker.dev.authority_file import AuthorityFileError  # noqa: PLC0415  same
    from broker.dev.postgres_binaries import PostgresMissing  # noqa: PLC0415  same
    from broker.dev.postgres_home import NoServerAccount  # noqa: PLC0415  same
    from broker.dev.postgres_process import PostgresFailed  # noqa: PLC0415  same
    from broker.dev.trust_domain import TrustDomainError  # noqa: PLC0415  same

    parts = (PostgresMissing, NoServerAccount, PostgresFailed, TrustDomainError, AuthorityFileError)
    return (str(error),) if isinstance(error, parts) else problems_of(error)
