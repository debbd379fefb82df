"""The job's processes as the host sees them (proc(5))."""

from __future__ import annotations


def children_of(pid: int) -> list[int]:
    """The children of a process's main thread; empty when it is gone."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children", "rb") as f:
            return [int(word) for word in f.read().split()]
    except OSError:
        return []


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
