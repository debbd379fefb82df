"""A mounted file system that stands still, so that the image which it is in can be copied whole.

The kernel writes all of it to the image, and holds back who would change it (FIFREEZE, fs/ioctl.c in the kernel; fsfreeze(8)).
It does so until it is told otherwise, even when nothing is mounted from it any more. So a process that has nothing else to do
waits to tell it, should the one that froze it be killed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
from typing import NoReturn

from imgrun.errors import CheckpointError

FIFREEZE = 0xC0045877
FITHAW = 0xC0045878
BEGUN, REFUSED, END = b"+", b"-", b"."


class Still:
    """A file system, given by a descriptor of something in it, that can be made to stand still.

    To be made while the process has no threads.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._begun = False
        read, self._alive = os.pipe2(os.O_CLOEXEC)
        self._guard = os.fork()
        if self._guard == 0:
            os.close(self._alive)
            _guard(read, fd)
        os.close(read)

    def begin(self) -> None:
        """Raises CheckpointError where it cannot stand still."""
        try:
            os.write(self._alive, BEGUN)
        except BrokenPipeError:
            raise CheckpointError("the process that watches over the image was killed", "try again") from None
        try:
            fcntl.ioctl(self._fd, FIFREEZE, 0)
        except OSError as e:
            with contextlib.suppress(BrokenPipeError):
                os.write(self._alive, REFUSED)
            why = "it is frozen already" if e.errno == errno.EBUSY else os.strerror(e.errno or 0)
            raise CheckpointError(
                f"the image's file system cannot be made to stand still: {why}", "checkpoint to a directory, with --to"
            ) from e
        self._begun = True

    def end(self) -> None:
        """Let it go on, if it stands still because of us."""
        if self._alive < 0:
            return
        with contextlib.suppress(BrokenPipeError):
            os.write(self._alive, END)  # it may be open elsewhere, in processes that were forked since
        os.close(self._alive)
        self._alive = -1
        _, status = os.waitpid(self._guard, 0)  # it has let it go on, and no longer holds the mount
        if status and self._begun:
            _thaw(self._fd)  # it was killed
        os.close(self._fd)


def _guard(read: int, fd: int) -> NoReturn:
    try:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(signum, signal.SIG_IGN)
        os.setsid()
        begun = False
        while (said := os.read(read, 1)) not in (END, b""):
            begun = said == BEGUN
        if begun:
            _thaw(fd)
    finally:
        os._exit(0)


def _thaw(fd: int) -> None:
    with contextlib.suppress(OSError):
        fcntl.ioctl(fd, FITHAW, 0)
