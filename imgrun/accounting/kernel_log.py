"""What the kernel's log says of kills for memory in a job (mm/oom_kill.c prints it, memory controller included)."""

from __future__ import annotations

import os
from typing import NamedTuple

from imgrun.accounting.processes import Process
from imgrun.init_shim import NAME, REAPER_NAME

INITIAL_PID_NAMESPACE = 0xEFFFFFFC
"""Its inode number (linux/nsfs.h, PID_NS_INIT_INO). The pids in the log are those of this namespace."""


class Told(NamedTuple):
    """What the kernel's log says of kills in the job."""

    limit_of: str | None = None
    """The cgroup whose limit it was; None when it was the host's memory, or nothing is said."""
    killed: tuple[Process, ...] = ()
    """Each with what it held when it was killed, and its pid on the host."""


class KernelLog:
    """The kernel's log from now on (Documentation/ABI/testing/dev-kmsg); silent where it may not be read."""

    def __init__(self, cgroup_name: str, ids: range) -> None:
        """``ids`` are the host's user ids that are the job's alone; empty when it has none of its own."""
        self._name = cgroup_name
        self._ids = ids
        self._same_pids = os.stat("/proc/self/ns/pid").st_ino == INITIAL_PID_NAMESPACE
        try:
            self._fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._fd, 0, os.SEEK_END)
        except OSError:
            self._fd = -1

    def read(self, most: int = 20000) -> Told:
        """What it says of the job's cgroup. At most so many records are read."""
        limit_of = None
        killed: dict[int, Process] = {}
        ours = False
        for _ in range(most if self._fd >= 0 else 0):
            try:
                record = os.read(self._fd, 8192)
            except BrokenPipeError:
                continue  # what was there has been overwritten
            except OSError:
                break
            line = record.partition(b"\n")[0].partition(b";")[2].decode(errors="replace")
            if line.startswith("oom-kill:"):
                fields = dict(word.partition("=")[::2] for word in line.split(","))
                ours = self._is_ours(fields.get("task_memcg", ""))
                if ours:
                    limit_of = fields.get("oom_memcg")
            elif line.startswith("Tasks in "):
                # All lines up to the next kill are of this cgroup's processes; the first names the chosen one again.
                ours = self._is_ours(line.removeprefix("Tasks in ").partition(" are going to be killed ")[0])
            elif "Killed process " in line and (_uid(line) in self._ids if self._ids else ours):
                # The lines before it are left out when there were many: by them alone, another's would be taken for ours.
                process = _victim(line)
                known = killed.get(process.host_pid, process)
                if process.name not in (NAME, REAPER_NAME):
                    killed[process.host_pid] = max(process, known, key=lambda p: p.memory)
        return Told(limit_of, tuple(killed.values()) if self._same_pids else ())

    def _is_ours(self, path: str) -> bool:
        return self._name in path.split("/")

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def own_ids(init: int) -> range:
    """The host's user ids of a job's user namespace, when nobody else has them (user_namespaces(7), uid_map).

    Empty for the namespace that we are in ourselves, as an ordinary user's supervisor is: all its processes have those ids.
    """
    try:
        if os.path.samefile(f"/proc/{init}/ns/user", "/proc/self/ns/user"):
            return range(0)
        with open(f"/proc/{init}/uid_map", "rb") as f:
            _, outside, count = map(int, f.readline().split())
    except (OSError, ValueError):
        return range(0)
    return range(outside, outside + count) if outside else range(0)


def _uid(line: str) -> int:
    value = line.rpartition(" UID:")[2].partition(" ")[0]
    return int(value) if value.isdigit() else -1


def _victim(line: str) -> Process:
    """``...Killed process PID (NAME) total-vm:NkB, anon-rss:NkB, file-rss:NkB, shmem-rss:NkB, ...``"""
    who, _, sizes = line.rpartition(") total-vm:")
    pid, _, name = who.partition("Killed process ")[2].partition(" (")
    total = 0
    for word in sizes.split(", "):
        key, _, value = word.partition(":")
        if key.endswith("-rss") and value.removesuffix("kB").isdigit():
            total += int(value.removesuffix("kB")) * 1024
    return Process(name, 0, total, int(pid) if pid.isdigit() else 0)
