"""What an identity could be allowed: for ``GET /catalog``, and for a refusal that helps.

Answers come from asking Cedar neutral questions, so they say no more than policy would.
They are kept for the minute they were computed for: a listing may lag, a decision never does.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final

import orjson

from broker.policy.evaluation import Evaluator, Outcome
from broker.policy.inputs import neutral_credential, neutral_task

if TYPE_CHECKING:
    from collections.abc import Mapping

    from broker.core.audit import JsonValue
    from broker.policy.catalog import Catalog, CatalogAction

VISIBLE_EVALUATIONS_MAX: Final = 4000
HINT_EVALUATIONS_MAX: Final = 32
_MS_PER_MINUTE: Final = 60_000


class Reach:
    """Bounded look-ups over one `Evaluator`."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator
        self._openable = lru_cache(maxsize=1024)(self._find_openable)
        self._visible = lru_cache(maxsize=256)(self._find_visible)
        self._granted = lru_cache(maxsize=1024)(self._find_granted)

    @property
    def catalog(self) -> Catalog:
        """The catalog that is looked through."""
        return self._evaluator.catalog

    def openable(self, principal: JsonValue, now_ms: int) -> tuple[str, ...]:
        """Return the purposes this identity may open a plain task for."""
        return self._openable(_key(principal), _minute(now_ms))

    def visible(self, principal: JsonValue, now_ms: int) -> tuple[CatalogAction, ...]:
        """Return what would be allowed under some purpose, in the catalog's order."""
        return self._visible(_key(principal), _minute(now_ms))

    def granted(self, principal: JsonValue, resource: str, now_ms: int) -> Mapping[str, tuple[str, ...]]:
        """Return, for each action of a resource that is visible, the purposes that allow it."""
        return self._granted(_key(principal), resource, _minute(now_ms))

    def _find_openable(self, key: bytes, now_ms: int) -> tuple[str, ...]:
        principal = orjson.loads(key)
        return tuple(
            word
            for word, purpose in self._evaluator.catalog.purposes.items()
            if self._evaluator.ask(neutral_task(principal, purpose, now_ms)).outcome is Outcome.ALLOW
        )

    def _find_visible(self, key: bytes, now_ms: int) -> tuple[CatalogAction, ...]:
        principal = orjson.loads(key)
        purposes = self._openable(key, now_ms)
        left = VISIBLE_EVALUATIONS_MAX
        found: list[CatalogAction] = []
        for action in self._evaluator.catalog:
            for purpose in purposes:
                left -= 1
                if left < 0:
                    return tuple(found)
                if self._allows(principal, action, purpose, now_ms):
                    found.append(action)
                    break
        return tuple(found)

    def _find_granted(self, key: bytes, resource: str, now_ms: int) -> dict[str, tuple[str, ...]]:
        principal = orjson.loads(key)
        pairs = [
            (action, purpose)
            for action in self._evaluator.catalog.actions_of(resource)
            for purpose in self._openable(key, now_ms)
        ]
        found: dict[str, tuple[str, ...]] = {}
        for action, purpose in pairs[:HINT_EVALUATIONS_MAX]:
            if self._allows(principal, action, purpose, now_ms):
                found[action.name] = (*found.get(action.name, ()), purpose)
        return found

    def _allows(self, principal: JsonValue, action: CatalogAction, purpose: str, now_ms: int) -> bool:
        revocability = self._evaluator.revocability.get(action.adapter, "unknown")
        source = neutral_credential(principal, action, purpose, revocability, now_ms)
        return self._evaluator.ask(source).outcome is Outcome.ALLOW


def _key(principal: JsonValue) -> bytes:
    return orjson.dumps(principal, option=orjson.OPT_SORT_KEYS)


def _minute(now_ms: int) -> int:
    return now_ms // _MS_PER_MINUTE * _MS_PER_MINUTE
