"""Why the kernel killed a job for memory: whose limit it was, what the job held, which processes were the largest.

The kernel tells of it while it does it, and what it kills gives back its memory within milliseconds. So the processes are
looked at the moment an event comes; what was missed then is in the kernel's log, where that may be read (/dev/kmsg).
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, NamedTuple

from imgrun.accounting.kernel_log import KernelLog, Told, own_ids
from imgrun.accounting.processes import LARGEST, Process, largest
from imgrun.isolation.cgroups.oom import Culprit
from imgrun.units import format_size

if TYPE_CHECKING:
    from imgrun.isolation.cgroups.cgroup import CgroupUsage, JobCgroup

AGAIN = 0.5
"""Seconds before they are looked at again, where events come often."""
WAIT_FIRST, WAIT_MOST, WAIT_ALL = 0.001, 0.05, 5.0
"""Seconds between an event and the kernel's kill: how long until the first look, between looks, and in all."""


class Verdict(NamedTuple):
    """What is to be told of a kill for memory."""

    host: bool
    """Whether it was the host that had no memory, and no limit."""
    message: str
    hint: str


class MemoryWatch:
    """Follows what happens to one job for want of memory, and tells of it."""

    def __init__(self, cgroup: JobCgroup, init: int) -> None:
        """``init`` is the host's pid of the job's PID 1, whose user namespace has its map by now."""
        self._cgroup = cgroup
        cgroup.memory.levels()  # from now on
        self._log = KernelLog(os.path.basename(cgroup.paths[0]), own_ids(init)) if cgroup.paths else None
        self._looked_at = float("-inf")
        self._began: float | None = None
        self._pause = WAIT_FIRST
        self.due: float | None = None
        """When :meth:`check` is to be called (monotonic clock): an event has come, and the kernel is about to kill."""
        self.largest: list[Process] = []
        self.held: CgroupUsage | None = None

    def source(self) -> tuple[int, int] | None:
        """What to poll to learn of events; None where the kernel does not tell."""
        source = self._cgroup.memory.event_source()
        return source if source[0] >= 0 else None

    def note_event(self) -> None:
        """An event has come."""
        moment = time.monotonic()
        if moment - self._looked_at > AGAIN:
            self.look()
            self._looked_at = time.monotonic()
        self._cgroup.memory.acknowledge()
        if (levels := self._cgroup.memory.levels()) is not None:
            levels.note_event()
        self._began, self._pause = moment, WAIT_FIRST
        self.due = moment

    def look(self) -> None:
        """Note the job's largest processes, and what it holds."""
        found = largest(self._cgroup.processes() - {0, os.getpid()})
        if not self.largest or sum(p.memory for p in found) >= sum(p.memory for p in self.largest):
            self.largest = found
            self.held = self._cgroup.usage()

    def check(self, moment: float) -> bool:
        """Whether the kernel has killed. Until then, ``due`` is when to ask again; None when it does not kill after all."""
        if self.killed():
            self.due = None
            return True
        assert self._began is not None
        self.due = moment + self._pause if moment - self._began < WAIT_ALL else None
        self._pause = min(self._pause * 2, WAIT_MOST)
        return False

    def killed(self) -> bool:
        """Whether a process of the job was killed for want of memory that the job, its batch slot or the host lacked.

        What happens at a limit that the job has set inside itself is its own matter.
        """
        if not self._cgroup.memory.kills():
            return False
        return self._culprit().whose != "inside"

    def at_own_limit(self) -> bool:
        """Whether the last event was of the job's own limit."""
        levels = self._cgroup.memory.levels()
        return levels is not None and levels.at_own_limit()

    def _culprit(self) -> Culprit:
        levels = self._cgroup.memory.levels()
        return levels.culprit() if levels is not None else Culprit("host")

    def held_verdict(self, limit: int | None, peak: int | None, job_id: str) -> Verdict:
        """What to tell of a job that is held at its limit."""
        words = [f"the job ran into its memory limit of {format_size(limit or 0)} and is held", *self._figures(peak, Told())]
        hint = f"'imgrun update --memory {next_size(limit or 0)} {job_id}' lets it go on; or checkpoint or stop it"
        return Verdict(False, "; ".join(words), hint)

    def verdict(self, limit: int | None, peak: int | None) -> Verdict:
        """What to tell of the kill. ``limit`` is the job's own as asked for; sizes in bytes."""
        culprit = self._culprit()
        told = self._log.read() if self._log is not None else Told()
        if culprit.whose == "host" and told.limit_of is not None:
            culprit = Culprit("above")
        whose = culprit.whose
        if whose == "job":
            limit = culprit.limit or limit
            what = f"the job ran into its memory limit of {format_size(limit or 0)}"
        elif whose == "above":
            size = f" of {format_size(culprit.limit)}" if culprit.limit else ""
            where = f"the cgroup above it, {culprit.path}" if culprit.path else "a cgroup above it that is not to be seen here"
            what = f"the job ran into the memory limit{size} of {where}"
        else:
            what = "the host ran out of memory"
        words = [f"{what}, and the kernel killed it", *self._figures(peak, told)]
        return Verdict(whose == "host", "; ".join(words), _advice(culprit, limit, peak))

    def _figures(self, peak: int | None, told: Told) -> list[str]:
        words = []
        if peak is not None:
            words.append(f"its peak was {format_size(peak)}{self._parts()}")
        processes = self._largest(told)
        # What has ended before it could be seen was larger than what is left: then nothing is better than a wrong lead.
        if processes and 4 * sum(p.memory for p in processes) >= (peak or 0) - self._in_files():
            words.append(f"its largest processes then: {', '.join(map(str, processes))}")
        return words

    def _parts(self) -> str:
        held = self.held
        if held is None or held.memory_anon is None:
            return ""
        files = (held.memory_file or 0) - (held.memory_shmem or 0)
        parts = (
            ("its own", held.memory_anon), ("in memory file systems", held.memory_shmem), ("page cache", files),
            ("the kernel's", held.memory_kernel),
        )  # fmt: skip
        named = [f"{format_size(size)} {name}" for name, size in parts if size and size >= 1 << 20]
        return f" ({', '.join(named)})" if named else ""

    def _in_files(self) -> int:
        """Bytes that were no process's own at the time."""
        held = self.held
        return 0 if held is None else (held.memory_file or 0) + (held.memory_kernel or 0)

    def _largest(self, told: Told) -> list[Process]:
        """Of those seen, and those that the kernel says it killed: who was seen may have given back its memory by then."""
        found = {process.host_pid: process for process in told.killed}
        for process in self.largest:
            killed = found.get(process.host_pid, process)
            found[process.host_pid] = process._replace(memory=max(process.memory, killed.memory))
        return sorted((p for p in found.values() if p.memory), key=lambda p: -p.memory)[:LARGEST]

    def close(self) -> None:
        if self._log is not None:
            self._log.close()


def _advice(culprit: Culprit, limit: int | None, peak: int | None) -> str:
    if culprit.whose == "job":
        return f"ask for more, such as --memory {next_size(limit or peak or 0)}"
    if culprit.whose == "above":
        wanted = f", such as {next_size(culprit.limit or peak or 0)}" if culprit.limit or peak else ""
        return f"ask the batch system, or whoever made that cgroup, for more{wanted}"
    return "start it where more memory is free, or give it a --memory limit that the host has room for"


def next_size(size: int) -> str:
    """Half as much again as ``size`` bytes, as one would ask for it: of two digits or so, as --memory takes it."""
    wanted = size + size // 2
    for unit, scale in (("G", 1 << 30), ("M", 1 << 20)):
        if wanted >= 10 * scale or scale == 1 << 20:
            step = scale if wanted < 100 * scale else 10 * scale
            return f"{-(-wanted // step) * step // scale}{unit}"
    raise AssertionError
