"""What a running job uses where it has no cgroup: from its processes (proc(5))."""

from __future__ import annotations

import os
from typing import NamedTuple

from imgrun.isolation.processes import members

PAGE = os.sysconf("SC_PAGE_SIZE")
TICK = os.sysconf("SC_CLK_TCK")


class ProcessUsage(NamedTuple):
    """The processes of a PID namespace together, and those that have ended and been waited for."""

    user_seconds: float
    system_seconds: float
    memory_current: int
    """Resident bytes; what processes share counts in each of them."""
    pids_current: int
    """Threads, as cgroups count them."""


def measure(init: int) -> ProcessUsage | None:
    """What the namespace of its PID 1 uses, by the host's pid of that; None when it has ended."""
    try:
        namespace = os.open(f"/proc/{init}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        user = system = pages = threads = 0
        for pid, _ in members(namespace):
            try:
                with open(f"/proc/{pid}/stat", "rb") as f:
                    fields = f.read().rpartition(b")")[2].split()
            except OSError:
                continue
            # utime and stime with those of children that were waited for, num_threads, rss
            user += int(fields[11]) + int(fields[13])
            system += int(fields[12]) + int(fields[14])
            threads += int(fields[17])
            pages += int(fields[21])
    finally:
        os.close(namespace)
    return ProcessUsage(user / TICK, system / TICK, pages * PAGE, threads)


def tasks_below(init: int) -> list[int]:
    """The threads of all processes in a PID namespace but of its PID 1, which is given by the host's pid."""
    try:
        namespace = os.open(f"/proc/{init}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return []
    tasks: list[int] = []
    try:
        for pid, inside in members(namespace):
            if inside > 1:
                try:
                    tasks += map(int, os.listdir(f"/proc/{pid}/task"))
                except OSError:
                    continue
    finally:
        os.close(namespace)
    return tasks
