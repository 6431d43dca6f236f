"""What stops a start or a reload: everything wrong with policies, catalog or registrations, at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class PolicyError(Exception):
    """Policies, catalog, registrations or cases cannot be used.

    For the operator who wrote the files, never for a caller.

    Attributes:
        problems: one sentence each, with file, line and place where known; never empty.

    """

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))
