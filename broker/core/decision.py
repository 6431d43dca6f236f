"""What policy answered. A decision is a type with reasons, never a truth value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, TypeAlias


class _NoTruthValue:
    """Makes ``if decision:`` an error at run time; mypy's truthy-bool makes it one before."""

    __slots__ = ()

    if not TYPE_CHECKING:

        def __bool__(self) -> NoReturn:
            msg = f"{type(self).__name__} has no truth value: match on the type"
            raise TypeError(msg)


@dataclass(frozen=True, slots=True)
class Basis(_NoTruthValue):
    """Which policies settled it, under which set.

    Attributes:
        policy_ids: ``@id`` of each determining policy, sorted; empty for deny by default.
        policy_hash: SHA-256 of the policy set and schema, hex.

    """

    policy_ids: tuple[str, ...]
    policy_hash: str


@dataclass(frozen=True, slots=True)
class Allow(_NoTruthValue):
    """The request may go ahead."""

    basis: Basis


@dataclass(frozen=True, slots=True)
class Deny(_NoTruthValue):
    """The request is refused.

    Attributes:
        basis: the determining policies.
        reason: one public sentence a person can act on.

    """

    basis: Basis
    reason: str


@dataclass(frozen=True, slots=True)
class NeedsApproval(_NoTruthValue):
    """The request would pass once someone of `group` approves it."""

    basis: Basis
    reason: str
    group: str


Decision: TypeAlias = Allow | Deny | NeedsApproval
