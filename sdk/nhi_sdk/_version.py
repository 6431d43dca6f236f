"""The distribution's version."""

from __future__ import annotations

from importlib import metadata
from typing import Final


def _version() -> str:
    try:
        return metadata.version("nhi-sdk")
    except metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return "0"


VERSION: Final = _version()
USER_AGENT: Final = f"nhi-sdk/{VERSION}"
