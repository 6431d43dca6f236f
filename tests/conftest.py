"""Fixtures every test may use."""

from __future__ import annotations

import signal

from tests.support.parts import orders_database, postgres_server, short_dir, trust_domain

# A shell starts its background jobs with these ignored, and so would the suite start every child:
# what is tested here is what the signals do.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGQUIT, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)

__all__ = ["orders_database", "postgres_server", "short_dir", "trust_domain"]
