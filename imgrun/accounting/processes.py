"""The largest processes of a job, as they are seen at the moment."""

from __future__ import annotations

import os
import time
from typing import NamedTuple

from imgrun.init_shim import NAME, REAPER_NAME
from imgrun.units import format_size

LARGEST = 3
"""How many processes are named."""
LOOKED_AT = 2000
LOOKING = 0.02
"""Processor seconds that looking at the processes may take: the job shall be killed promptly."""
PAGE = os.sysconf("SC_PAGE_SIZE")


class Process(NamedTuple):
    """A process of the job."""

    name: str
    pid: int
    """In the job; 0 when it is not known."""
    memory: int
    """Resident bytes, what it shares with others included."""
    host_pid: int = 0
    """In the supervisor's own pid namespace."""

    def __str__(self) -> str:
        pid = f" (pid {self.pid})" if self.pid else ""
        return f"{self.name}{pid} {format_size(self.memory)}"


def largest(pids: set[int]) -> list[Process]:
    """The largest of these processes, by resident memory (proc(5), statm)."""
    deadline = time.thread_time() + LOOKING
    sizes = []
    for pid in list(pids)[:LOOKED_AT]:
        try:
            fd = os.open(f"/proc/{pid}/statm", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            sizes.append((int(os.read(fd, 256).split()[1]) * PAGE, pid))
        except (OSError, IndexError):
            pass
        finally:
            os.close(fd)
        if time.thread_time() > deadline:
            break
    found = []
    for memory, pid in sorted(sizes, reverse=True)[: LARGEST + 2]:
        name, inside = "", 0
        try:
            with open(f"/proc/{pid}/status", "rb") as f:
                for line in f:
                    key, _, value = line.partition(b":")
                    if key == b"Name":
                        name = value.strip().decode(errors="replace")
                    elif key == b"NSpid":
                        inside = int(value.split()[-1])
                        break
        except OSError:
            continue
        if name not in (NAME, REAPER_NAME):
            found.append(Process(name, inside, memory, pid))
    return found[:LARGEST]
