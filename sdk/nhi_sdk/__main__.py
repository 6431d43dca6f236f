"""``python -m nhi_sdk`` is `nhi`."""

from __future__ import annotations

from nhi_sdk.cli import main

main()
