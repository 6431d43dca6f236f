"""Secret values that cannot be shown by accident."""

from __future__ import annotations

from typing import Final, Generic, NoReturn, TypeVar

T = TypeVar("T", bound=str | bytes)

_REDACTED: Final = "<secret>"


class Secret(Generic[T]):
    """Holds a secret; only `reveal` gives it back (DESIGN 4, rule 11).

    ``repr``, ``str``, formatting and log rendering show ``<secret>``. It refuses to be
    compared, hashed, pickled or copied into JSON, so that a leak needs the word `reveal`.
    """

    __slots__ = ("_value",)
    __hash__ = None  # type: ignore[assignment]  # a hashable secret ends up in a dict key or a set dump

    def __init__(self, value: T) -> None:
        self._value: T = value

    def reveal(self) -> T:
        """Return the value. Call it only where the secret leaves for its owner or its backend."""
        return self._value

    def __repr__(self) -> str:
        return _REDACTED

    __str__ = __repr__

    def __format__(self, _spec: str) -> str:
        return _REDACTED

    def __eq__(self, _other: object) -> NoReturn:
        msg = "a Secret is not compared; reveal both sides and use hmac.compare_digest"
        raise TypeError(msg)

    def __reduce__(self) -> NoReturn:
        msg = "a Secret is not pickled"
        raise TypeError(msg)
