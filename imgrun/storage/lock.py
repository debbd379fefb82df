"""One writer or many readers of an image, until the last of their processes and mounts is gone.

The lock is flock(2) on the image itself: nothing is left behind when its holder is killed, and it holds on a network
file system as well. A loop device keeps the descriptor that it was bound with, and so the lock, until it is freed: a
killed holder's mounts are covered for the moment that the kernel takes to undo them. Other tools attach images without
any lock, so the loop devices bound to the image are asked too.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time

from imgrun.errors import HostError, ImageBusy
from imgrun.storage import loop
from imgrun.storage.retry import attempt

PAUSE = 0.02


def hold(fd: int, path: str, *, exclusive: bool, wait: float) -> None:
    """Lock the image behind ``fd``, waiting up to ``wait`` seconds for a holder that is about to end.

    The lock goes when ``fd`` and its copies are closed. Raises ImageBusy, naming the holder, and HostError for a writer
    where the file system has no locks. Readers go on there: no writer is let in without a lock.
    """
    deadline = time.monotonic() + wait
    operation = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    while True:
        try:
            fcntl.flock(fd, operation | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise _locked(fd, path, exclusive) from None
            time.sleep(PAUSE)
        except OSError as e:
            if e.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            if exclusive:
                raise HostError(
                    f"the file system of {path} has no file locks, so writing into the image is not safe",
                    "move the image to a local disk, or run without --writable",
                ) from e
            return


def refuse_attached(fd: int, path: str, *, exclusive: bool, wait: float) -> None:
    """Raise ImageBusy when a loop device of someone else is bound to the image in a way that excludes this use."""

    def look() -> None:
        for binding in loop.bindings(fd):
            if exclusive or not binding.read_only:
                how = "read-only" if binding.read_only else "for writing"
                raise ImageBusy(
                    f"{path} is in use: it is attached {how} to /dev/loop{binding.number}",
                    f"unmount it, or detach it with 'losetup -d /dev/loop{binding.number}'",
                )

    attempt(look, lambda e: isinstance(e, ImageBusy), wait)


def holders(fd: int) -> list[int]:
    """The processes that hold a lock on this file, as /proc/locks shows them; those of other hosts are not shown."""
    status = os.fstat(fd)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    found = []
    try:
        with open("/proc/locks", encoding="ascii") as f:
            for line in f:
                fields = line.split()
                if fields[1:2] == ["FLOCK"] and fields[5:6] == [device] and os.access(f"/proc/{fields[4]}", os.F_OK):
                    found.append(int(fields[4]))
    except OSError:
        pass
    return sorted(set(found) - {os.getpid()})


def _locked(fd: int, path: str, exclusive: bool) -> ImageBusy:
    pids = holders(fd)
    who = f" by process {', '.join(map(str, pids[:4]))}{', ...' if len(pids) > 4 else ''}" if pids else ""
    if not who:
        who = "".join(f", still attached to /dev/loop{binding.number}" for binding in loop.bindings(fd)[:1])
    if exclusive:
        return ImageBusy(
            f"{path} is in use{who}, and writing into it excludes all others",
            "wait for that to end ('imgrun ps'), or run without --writable, or on a copy",
        )
    return ImageBusy(
        f"{path} is in use{who}, for writing into it", "wait for that to end ('imgrun ps'), or use a copy of the image"
    )
