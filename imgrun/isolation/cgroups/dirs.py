"""Cgroup directories: making, emptying and removing them, whatever the version."""

from __future__ import annotations

import fcntl
import os
import time

from imgrun.errors import HostError, StartError
from imgrun.isolation.cgroups import fs

YOUNG = 60.0
"""Seconds within which a supervisor certainly holds the cgroup that it has made."""

NEIGHBOURS = 4
"""How many cgroups beside its own a start looks at, whatever their number: each costs it about 0.01 ms."""


def subtree(directory: str) -> list[str]:
    """``directory`` and all below it, children before parents. Symbolic links are not followed."""
    found = [directory]
    for path in found:  # it grows: whoever may divide a cgroup may do so deeper than functions can call each other
        found += _children(path)
    return found[::-1]


def _children(directory: str) -> list[str]:
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return []
    try:
        with os.scandir(fd) as entries:
            return [f"{directory}/{entry.name}" for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    finally:
        os.close(fd)


def processes(directory: str) -> set[int]:
    """The processes in ``directory`` and below it. One that this PID namespace does not show is 0."""
    found: set[int] = set()
    for path in subtree(directory):
        found.update(map(int, (fs.text(f"{path}/cgroup.procs") or "").split()))
    return found


def remove_tree(directory: str) -> None:
    """Remove an empty cgroup with the empty ones that were made inside it. Raises OSError: EBUSY while in use."""
    try:
        os.rmdir(directory)
        return
    except FileNotFoundError:
        return
    except OSError:
        below = subtree(directory)
        if len(below) < 2:
            raise
    for path in below:
        try:
            os.rmdir(path)
        except FileNotFoundError:
            pass


def signal_all(directory: str, signum: int) -> int:
    """Signal every process in and below ``directory`` except the caller; returns how many it found.

    A process is signalled only if it is still listed after its descriptor was taken, so a number that the kernel has
    given to someone else in between is never hit.
    """
    import signal

    descriptors = {}
    try:
        for pid in processes(directory) - {0, os.getpid()}:
            try:
                descriptors[pid] = os.pidfd_open(pid)
            except OSError:
                continue
        remaining = processes(directory) if descriptors else set()
        for pid in remaining & descriptors.keys():
            try:
                signal.pidfd_send_signal(descriptors[pid], signum)
            except ProcessLookupError:
                continue
        return len(remaining & descriptors.keys())
    finally:
        for fd in descriptors.values():
            os.close(fd)


def wait_for(path: str, key: str, value: int, timeout: float) -> bool:
    """Wait until the flat-keyed v2 file says ``key value`` (``cgroup.events``); False after ``timeout`` seconds.

    The kernel wakes a poll for POLLPRI when such a file changes after it was last read.
    """
    import select

    deadline = time.monotonic() + timeout
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        poll = select.poll()
        poll.register(fd, select.POLLPRI)
        while f"{key} {value}" not in os.pread(fd, 4096, 0).decode().splitlines():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            poll.poll(min(left, 0.5) * 1000)
        return True
    except OSError:
        return False  # ENODEV: the directory went away
    finally:
        os.close(fd)


def make(path: str) -> None:
    """Make a cgroup, new even if one was left there. Raises StartError."""
    try:
        _make(path)
        return
    except FileExistsError:
        pass
    except OSError as error:
        raise StartError(
            f"the cgroup {path} cannot be made: {error.strerror}", "see `imgrun doctor` for what is missing"
        ) from None
    # Left by an earlier run under the same id: its limits must not live on.
    if not try_remove(path):
        raise StartError(
            f"the cgroup {path} exists and is in use", "`imgrun ps` shows by whom; `imgrun gc` removes what is dead"
        )
    _make(path)


def _make(path: str) -> None:
    os.mkdir(path, 0o755)
    # Unless it was set, the kernel does not keep the time of a cgroup, and shows when it was last looked up.
    try:
        os.utime(path)
    except OSError:
        pass  # it will be found all the same, if not at the first look


def try_remove(path: str) -> bool:
    """Whether ``path`` is gone now."""
    try:
        remove_tree(path)
    except OSError:
        return False
    return True


def remove_patiently(paths: list[str], timeout: float) -> None:
    """Remove cgroups that are in use, by trying again: processes that are just ending still count for a moment.

    Raises HostError naming what is left after ``timeout`` seconds.
    """
    from tenacity import RetryError, Retrying, retry_if_result, stop_after_delay, wait_exponential

    def remaining() -> list[str]:
        return [path for path in paths if not try_remove(path)]

    retrying = Retrying(
        retry=retry_if_result(bool),
        stop=stop_after_delay(timeout),
        wait=wait_exponential(multiplier=0.001, max=0.05),
    )
    try:
        retrying(remaining)
    except RetryError as error:
        left = error.last_attempt.result()
        raise HostError(
            f"cgroups of the job cannot be removed, they are still in use: {' '.join(left)}",
            "when their processes have ended, `imgrun gc` removes them",
        ) from None


# ---- whose they are -----------------------------------------------------------------------------------------------
#
# A supervisor holds a lock in each of its job's directories. The lock is on a file there, since the directory itself is
# locked by whoever makes cgroups in it (place.locked), as an imgrun in the job does.


def hold(path: str) -> int:
    """A descriptor that says, while it is open, that the cgroup has an owner; -1 where there is none to be had."""
    return _lock(path, fcntl.LOCK_SH)


def claim(path: str) -> int:
    """A descriptor of a cgroup that has no owner, which nobody else claims while it is open; -1 if that cannot be had."""
    return _lock(path, fcntl.LOCK_EX)


def _lock(path: str, how: int) -> int:
    try:
        fd = os.open(f"{path}/cgroup.procs", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return -1
    return fd


def young(path: str, age: float = YOUNG) -> bool:
    """Whether the cgroup may be so new that its supervisor does not hold it yet, or has gone already."""
    try:
        return os.lstat(path).st_mtime > time.time() - age
    except OSError:
        return True


def orphan_beside(path: str, age: float = YOUNG) -> bool:
    """Whether one of a few cgroups of other jobs, those that the kernel lists after this one, seems to have no owner."""
    parent, own = os.path.split(path)
    try:
        names = [name for name in os.listdir(parent) if name.startswith(fs.PREFIX) and len(name) == len(own)]
    except OSError:
        return False
    after = names.index(own) + 1 if own in names else 0
    for name in [name for name in names[after:] + names[:after] if name != own][:NEIGHBOURS]:
        other = f"{parent}/{name}"
        if not young(other, age) and (fd := claim(other)) >= 0:
            os.close(fd)
            return True
    return False
