"""Kinds of backends by name. A new adapter is one line in `KINDS`.

The module of a kind is loaded when a backend of that kind is configured, not before: what
is not used costs neither memory nor a dependency.
"""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from broker.core.ids import InstanceTag
    from broker.core.ports import Adapter

KINDS: Final[tuple[tuple[str, str], ...]] = (
    ("jwt_issuer", "adapters.jwt_issuer:JwtIssuer"),
    ("postgres", "adapters.postgres:from_settings"),
    ("fake", "adapters.fake:FakeAdapter"),
)
"""(kind, ``module:factory``). A factory takes its settings as keywords, ``name`` among them."""


class AdapterUnavailableError(Exception):
    """A configured backend cannot be built: start-up stops here, with the reason."""


def factories(kinds: Iterable[tuple[str, str]] = KINDS) -> dict[str, str]:
    """Return the factory path of each kind.

    Raises:
        AdapterUnavailableError: two lines claim one kind.

    """
    paths: dict[str, str] = {}
    for kind, path in kinds:
        if kind in paths:
            raise AdapterUnavailableError(
                f"adapter kind {kind!r} is registered twice: {paths[kind]} and {path}"
            )
        paths[kind] = path
    return paths


def build(kind: str, settings: Mapping[str, object], instance: InstanceTag, **parts: object) -> Adapter:
    """Build one configured backend.

    Args:
        kind: a name from `KINDS`.
        settings: the backend's own settings, ``name`` among them.
        instance: the deployment's tag; given to factories that take ``instance``.
        parts: what the composition root has to offer (``keys``, ``introspect``, …); a factory
            gets those that its signature names and its settings do not.

    Raises:
        AdapterUnavailableError: unknown kind, module that does not load, or bad settings; says which.

    """
    paths = factories()
    if kind not in paths:
        raise AdapterUnavailableError(
            f"there is no adapter kind {kind!r}; there are: {', '.join(sorted(paths))}"
        )
    factory = _load(kind, paths[kind])
    wanted = inspect.signature(factory).parameters
    offered = {name: part for name, part in {"instance": instance, **parts}.items() if name in wanted}
    try:
        adapter: Adapter = factory(**{**offered, **settings})
    except (TypeError, ValueError) as error:
        label = settings.get("name", "without a name")
        raise AdapterUnavailableError(f"backend {label} ({kind}): {error}") from error
    return adapter


def build_all(
    backends: Iterable[tuple[str, Mapping[str, object]]], instance: InstanceTag, **parts: object
) -> dict[str, Adapter]:
    """Build every configured backend, by name.

    Raises:
        AdapterUnavailableError: as `build`, and where two backends have one name.

    """
    built: dict[str, Adapter] = {}
    for kind, settings in backends:
        adapter = build(kind, settings, instance, **parts)
        if adapter.name in built:
            raise AdapterUnavailableError(f"two backends are named {adapter.name!r}")
        built[adapter.name] = adapter
    return built


def _load(kind: str, path: str) -> Callable[..., Any]:
    module_name, _, attribute = path.partition(":")
    try:
        factory: Callable[..., Any] = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # an author's module may fail in any way while it is imported
        raise AdapterUnavailableError(
            f"adapter kind {kind!r} does not load from {path}: {type(error).__name__}: {error}"
        ) from error
    return factory
