"""The job's processes as the host sees them (proc(5))."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import NamedTuple

PF_EXITING = 4
"""In the flags of a process (include/linux/sched.h)."""


def children_of(pid: int) -> list[int]:
    """The children of a process's main thread; empty when it is gone."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children", "rb") as f:
            return [int(word) for word in f.read().split()]
    except OSError:
        return []


def is_dying(pid: int) -> bool:
    """Whether a process is ending, or is about to because a SIGKILL is on its way to it, or is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            flags = int(f.read().rpartition(b")")[2].split()[6])
        with open(f"/proc/{pid}/status", "rb") as f:
            pending = [int(line.split()[1], 16) for line in f if line.startswith((b"SigPnd:", b"ShdPnd:"))]
    except OSError:
        return True
    return bool(flags & PF_EXITING) or any(mask >> (signal.SIGKILL - 1) & 1 for mask in pending)


def pid_inside(pid: int) -> int | None:
    """The pid of a process in its own innermost PID namespace."""
    try:
        with open(f"/proc/{pid}/status", "rb") as f:
            for line in f:
                if line.startswith(b"NSpid:"):
                    return int(line.split()[-1])
    except OSError:
        pass
    return None


def command_of(init: int) -> int | None:
    """The command's pid on the host, below the shim ``init``: anchor, reaper, command, in this order of birth."""
    for reaper in children_of(init):
        if pid_inside(reaper) == 2:
            return next((pid for pid in children_of(reaper) if pid_inside(pid) == 3), None)
    return None


class Census(NamedTuple):
    """The processes of a PID namespace: how many, the largest pid there, and the time they and their dead children took."""

    processes: int
    largest: int
    user_seconds: float
    system_seconds: float


def members(pid_namespace: int) -> Iterator[tuple[int, int]]:
    """The processes of a PID namespace, given by a descriptor, as pairs of their pids here and in there."""
    wanted = os.fstat(pid_namespace)
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if os.path.samestat(os.stat(f"/proc/{name}/ns/pid"), wanted):
                    yield int(name), pid_inside(int(name)) or 0
            except OSError:
                continue


def census(pid_namespace: int, below: int) -> Census:
    """Count what has a pid less than ``below`` in a PID namespace. Times as of proc(5): utime, stime, cutime, cstime."""
    pids = []
    user = system = 0
    for pid, inside in members(pid_namespace):
        if inside >= below:
            continue
        try:
            with open(f"/proc/{pid}/stat", "rb") as f:
                fields = f.read().rpartition(b")")[2].split()
        except OSError:
            continue
        pids.append(inside)
        user += int(fields[11]) + int(fields[13])
        system += int(fields[12]) + int(fields[14])
    tick = os.sysconf("SC_CLK_TCK")
    return Census(len(pids), max(pids, default=1), user / tick, system / tick)
