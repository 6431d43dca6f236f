"""Unix sockets: whether somebody answers, and if not, why, in words."""

from __future__ import annotations

import os
import socket
import stat
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

_CONNECT_SECONDS: Final = 2.0


def why_unreachable(path: Path) -> str | None:
    """Return what keeps this process from connecting, a sentence; None where it can."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return f"{path} does not exist."
    except OSError as error:
        return f"{path} cannot be looked at ({error.strerror})."
    return _connected(path, status) if stat.S_ISSOCK(status.st_mode) else f"{path} is not a socket."


def _connected(path: Path, status: os.stat_result) -> str | None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_CONNECT_SECONDS)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return f"nobody listens at {path}: whoever made it has stopped."
        except PermissionError:
            return (
                f"{path} belongs to user {status.st_uid} (mode {stat.S_IMODE(status.st_mode):04o}); "
                f"this process runs as {os.geteuid()} and may not connect."
            )
        except OSError as error:
            return f"{path} cannot be connected to ({error.strerror or type(error).__name__})."
    return None
