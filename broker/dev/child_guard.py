"""Replaces itself with another program that dies when its parent does.

Run as a script, by path, with ``python -I -S``: it imports the standard library only and is
gone after the ``exec``. It exists because these steps must happen in the child, in this
order, and a ``preexec_fn`` in a process with threads may deadlock:

1. a process group of its own, so that Ctrl-C in a terminal reaches the parent alone, which
   then stops the child in good order; and so that the kernel continues a stopped child
   (SIGHUP, SIGCONT) when the parent's death orphans the group;
2. drop to an unprivileged account, where the parent is root and the program refuses root;
3. ask for a signal at the parent's death. After step 2: changing credentials clears it;
4. look whether the parent died in between.

The signal comes when the *thread* that forked ends, so the parent starts the child from a
thread that lives as long as the child is wanted.

Arguments: ``<parent pid> <signal number> <uid> <gid> <program> [argument...]``; uid -1 keeps
the account.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_KEEP_ACCOUNT: Final = -1
PARENT_GONE_EXIT: Final = 125


def main(argv: list[str]) -> None:
    """Set the process up and become the program; returns only by exiting."""
    parent, death_signal, uid, gid = (int(word) for word in argv[1:5])
    program = argv[5:]
    os.umask(0o077)
    os.setpgid(0, 0)
    if uid != _KEEP_ACCOUNT:
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, death_signal, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        sys.exit(PARENT_GONE_EXIT)
    os.execv(program[0], program)  # noqa: S606  no shell is wanted: the program replaces this process


if __name__ == "__main__":
    main(sys.argv)
