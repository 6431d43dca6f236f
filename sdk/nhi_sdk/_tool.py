"""Decorating tool functions: each call gets its credential, which ends with the call."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable

Reason: TypeAlias = "str | Callable[..., str] | None"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolSpec:
    """What a decorated function asks for.

    Attributes:
        reason: the intent's reason, or a function of the call's own arguments that returns it.
        inject: the parameter that receives the credential.

    """

    name: str
    resource: str
    action: str
    purpose: str
    reason: Reason
    ttl_seconds: int | None
    inject: str

    def reason_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Return the reason of one call."""
        if callable(self.reason):
            return self.reason(*args, **kwargs)
        return self.reason or f"{self.name} was called"

    def visible_signature(self, function: Callable[..., Any]) -> inspect.Signature:
        """Return the function's signature without the injected parameter.

        Agent frameworks build a model's tool schema from it: a credential is nothing a
        model should see a slot for.

        Raises:
            TypeError: the function has no such parameter.

        """
        signature = inspect.signature(function)
        if self.inject not in signature.parameters:
            raise TypeError(f"{function.__qualname__} has no parameter {self.inject!r} for the credential")
        kept = [one for name, one in signature.parameters.items() if name != self.inject]
        return signature.replace(parameters=kept)
