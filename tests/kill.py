"""SIGKILL at every write: what a command leaves behind that ends without a farewell."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

_CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate")


def killed_before_change(number: int, work: Callable[[], object]) -> bool:
    """Does the work in a process that is killed before its change of this number (from 1) to a disk.

    Returns:
        Whether there were so many; if not, all of it was done.
    """
    child = os.fork()
    if child == 0:
        left = number

        def count(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            flags = arguments[2] if event == "open" else None
            if event in _CHANGES or (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            sys.addaudithook(count)
            work()
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the work failed by itself"
    return os.WIFSIGNALED(status)
