"""Cgroup directories: making, emptying and removing them, whatever the version."""

from __future__ import annotations

import os
import time

from imgrun.errors import HostError, StartError
from imgrun.isolation.cgroups import fs


def subtree(directory: str) -> list[str]:
    """``directory`` and all below it, children before parents. Symbolic links are not followed."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return []
    try:
        with os.scandir(fd) as entries:
            children = [f"{directory}/{entry.name}" for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        children = []
    finally:
        os.close(fd)
    return [path for child in children for path in subtree(child)] + [directory]


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
        os.mkdir(path, 0o755)
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
    os.mkdir(path, 0o755)


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
