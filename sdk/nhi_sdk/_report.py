"""Saying that a clean-up failed without hiding why it was needed."""

from __future__ import annotations

import logging

_log = logging.getLogger("nhi_sdk")


def left_by(error: BaseException | None) -> str:
    """Return the reason a block's clean-up gives the broker: an exception's type, never its text."""
    return "client closed" if error is None else f"block left by {type(error).__name__}"


def report(what: str, failure: Exception, error: BaseException | None) -> None:
    """Log a failed clean-up, and attach it to the error that is on its way."""
    _log.warning("%s: %s", what, failure)
    if error is not None:
        error.add_note(f"nhi_sdk: {what}: {failure}")
