"""Counting a job: by its cgroup on every CPU as root, by inheritance from its first process without.

Reading costs the job nothing; the kernel counts while it runs anyway. An event that the host does not have is None.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterable
from typing import NamedTuple

from imgrun import syscalls as sc
from imgrun.errors import HostError
from imgrun.pmu.events import EVENTS, GROUPS, Event
from imgrun.units import parse_cpu_list

TOTAL_TIME_ENABLED, TOTAL_TIME_RUNNING = 1, 2
IN_KERNEL = ("context_switches", "cpu_migrations")
ABSENT = (errno.ENOENT, errno.EOPNOTSUPP, errno.ENODEV, errno.EINVAL, errno.ENOSYS)


class Counts(NamedTuple):
    """What was counted. ``scaled`` tells that the kernel took turns between events, so that counts are extrapolated."""

    counts: dict[str, int | None]
    scope: str
    """``cgroup`` (everything the job ever ran) or ``inherited`` (its processes since their start)."""
    user_only: bool
    scaled: bool


def online_cpus() -> list[int]:
    with open("/sys/devices/system/cpu/online", encoding="ascii") as f:
        return parse_cpu_list(f.read().strip(), "online CPUs")


class Counters:
    """Open counters of one job. ``close`` them when they are no longer needed."""

    def __init__(self, scope: str) -> None:
        self.scope = scope
        self.user_only = False
        self.refused: dict[str, int] = {}
        """The errno with which the kernel refused an event."""
        self._fds: dict[str, list[int]] = {event.name: [] for event in EVENTS}
        self._directory = -1
        self._cpus: set[int] = set()

    @classmethod
    def of_cgroup(cls, directory_fd: int) -> Counters:
        """Count all that runs in the v2 cgroup behind the descriptor, which the caller keeps open.

        Needs CAP_PERFMON, or a perf_event_paranoid below 1.
        """
        made = cls("cgroup")
        made._directory = directory_fd
        made._follow_hotplug()
        return made

    def _follow_hotplug(self) -> None:
        """Count on the processors that are there now. Those that have gone keep what they counted."""
        for cpu in online_cpus():
            if cpu not in self._cpus:
                self._cpus.add(cpu)
                for group in GROUPS:
                    self._open_group(group, self._directory, cpu, sc.PERF_FLAG_PID_CGROUP)

    def add_tasks(self, tids: Iterable[int]) -> None:
        """Count threads that run already, from now on, and what will come from them."""
        for tid in tids:
            for event in EVENTS:
                if event.name in self.refused:
                    continue
                try:
                    fd = sc.perf_event_open(
                        event.type, event.config, tid, -1, -1, 0, inherit=True, enable_on_exec=False,
                        exclude_kernel=self.user_only and event.name not in IN_KERNEL,
                    )  # fmt: skip
                except OSError as e:
                    if e.errno == errno.ESRCH:
                        break  # it has just ended
                    self.refused[event.name] = e.errno or errno.EINVAL
                    continue
                self._fds[event.name].append(fd)

    @classmethod
    def of_process(cls, pid: int) -> Counters:
        """Count a process from its next exec on, and all processes that come from it."""
        made = cls("inherited")
        for event in EVENTS:
            # A group cannot be read as one with inheritance, so each stands alone.
            made._open_group((event,), pid, -1, 0)
        return made

    def _open_group(self, group: tuple[Event, ...], pid: int, cpu: int, flags: int) -> None:
        leader = -1
        for event in group:
            if event.name in self.refused:
                continue
            fd = self._open(event, pid, cpu, leader, flags)
            if fd >= 0:
                self._fds[event.name].append(fd)
                leader = fd if leader < 0 else leader

    def _open(self, event: Event, pid: int, cpu: int, leader: int, flags: int) -> int:
        inherit = self.scope == "inherited"
        # What happens in the kernel only would be counted as 0 where only user space may be counted.
        modes = (False,) if event.name in IN_KERNEL else (True,) if self.user_only else (False, True)
        for user_only in modes:
            try:
                fd = sc.perf_event_open(
                    event.type, event.config, pid, cpu, leader, flags, inherit=inherit, enable_on_exec=inherit,
                    exclude_kernel=user_only,
                )  # fmt: skip
            except OSError as e:
                if e.errno in (errno.EACCES, errno.EPERM) and user_only != modes[-1]:
                    continue
                self.refused[event.name] = e.errno or errno.EINVAL
                return -1
            self.user_only = self.user_only or user_only
            return fd
        return -1

    def require_hardware(self) -> None:
        """Raise HostError unless cycles and instructions are counted."""
        for name in ("cycles", "instructions"):
            if name in self.refused:
                raise HostError(
                    f"--pmu require: this host does not count {name} ({explain(self.refused[name])})",
                    "use --pmu auto to count what there is",
                )

    def read(self) -> Counts:
        """The counts so far, over all CPUs. An event that got no turn while the job ran was not counted: None."""
        if self.scope == "cgroup":
            self._follow_hotplug()
        counts: dict[str, int | None] = {}
        scaled = False
        for name, fds in self._fds.items():
            total = None if not fds or name in self.refused else 0.0
            for fd in fds if total is not None else ():
                value, enabled, running = struct.unpack("QQQ", os.read(fd, 24))
                if running < enabled:
                    if not running:
                        total = None
                        break
                    scaled = True
                    value = value * enabled / running
                assert total is not None
                total += value
            counts[name] = None if total is None else round(total)
        return Counts(counts, self.scope, self.user_only, scaled)

    def close(self) -> None:
        for fds in self._fds.values():
            while fds:
                os.close(fds.pop())


def explain(number: int) -> str:
    """Why an event is missing, in words."""
    if number in ABSENT:
        return "no such counter here, as in most virtual machines"
    if number in (errno.EACCES, errno.EPERM):
        return "not allowed: kernel.perf_event_paranoid, or a seccomp filter"
    return os.strerror(number)
