"""What a job uses: its cgroup, the kernel's counters, and what was known of its earlier lives, as one Usage."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from imgrun.isolation.cgroups.cgroup import JobCgroup
from imgrun.result import Usage
from imgrun.spec import JobSpec

if TYPE_CHECKING:
    import resource

    from imgrun.accounting.sampling import Series
    from imgrun.accounting.verdict import MemoryWatch, Verdict
    from imgrun.isolation.cgroups.usage import CgroupUsage
    from imgrun.pmu.counters import Counters

LEVELS = ("memory_current", "swap_current", "pids_current")
"""What is of a moment and so not in the record of a finished job."""


class Meter:
    """Measures one job from its start to its end."""

    def __init__(self, spec: JobSpec, cgroup: JobCgroup, earlier: Mapping[str, Any] | None) -> None:
        self.spec = spec
        self.memory: MemoryWatch | None = None
        self.sample_due: float | None = None
        """When :meth:`sample` is to be called (monotonic clock)."""
        self._cgroup = cgroup
        self._earlier = earlier
        self._counters: Counters | None = None
        self._counted_before: dict[str, int | None] = {}
        self._setup_seconds = (0.0, 0.0)
        self._init = 0
        self._series: Series | None = None

    def start_counting(self, pid: int) -> None:
        """Watch the job's memory, and open the performance counters, before the command runs.

        Raises HostError for ``--pmu require``.
        """
        from imgrun.accounting.verdict import MemoryWatch

        self._init = pid
        self.memory = MemoryWatch(self._cgroup, pid)
        if self.spec.pmu == "off":
            return
        from imgrun.pmu.counters import Counters

        directory = self._cgroup.clone_into
        self._counters = Counters.of_cgroup(directory) if directory >= 0 else None
        if self._counters is not None and self._counters.refused.get("task_clock") == errno.ENOENT and self._cgroup.stir():
            self._counters.close()
            self._counters = Counters.of_cgroup(directory)
        if self._counters is None or "task_clock" in self._counters.refused:
            # An ordinary user may count his own processes, but mostly not a cgroup (perf_event_paranoid).
            if self._counters is not None:
                self._counters.close()
            self._counters = Counters.of_process(pid)
        if self.spec.pmu == "require":
            self._counters.require_hardware()

    def note_setup(self, user_seconds: float, system_seconds: float) -> None:
        """What making the job has cost until its init is executed: none of it is the job's own use."""
        measured = self._cgroup.usage()
        if measured.user_seconds is not None and measured.system_seconds is not None:
            user_seconds, system_seconds = measured.user_seconds, measured.system_seconds
        self._setup_seconds = (user_seconds, system_seconds)
        if self._counters is not None and self._counters.scope == "cgroup":
            self._counted_before = self._counters.read().counts

    def count_restored(self) -> None:
        """The job's processes came from a checkpoint, and not from its PID 1: count them where that is by process."""
        if self._counters is not None and self._counters.scope == "inherited":
            from imgrun.accounting.by_process import tasks_below

            self._counters.add_tasks(tasks_below(self._init))

    def total(self, wall_seconds: float, reaped: resource.struct_rusage) -> Usage:
        """What the job used: from its cgroup before that goes, and the rest from what the kernel said when it was reaped.

        ``reaped`` holds what all its processes used that were waited for, which the job's init does for all orphans.
        """
        usage, _ = self._measured()
        if usage.user_seconds is None:
            usage.source = "rusage"
            usage.user_seconds, usage.system_seconds = reaped.ru_utime, reaped.ru_stime
        if usage.read_bytes is None:
            usage.read_bytes, usage.written_bytes = reaped.ru_inblock * 512, reaped.ru_oublock * 512
        return self._finished(usage, wall_seconds)

    def so_far(self, wall_seconds: float) -> Usage:
        """What a running job has used, as far as its cgroup tells, and where it has none, its processes."""
        return self._so_far(wall_seconds)[0]

    def live(self, wall_seconds: float) -> dict[str, Any]:
        """As :meth:`so_far`, with the levels of this moment (``LEVELS``) and without the samples, for JSON."""
        usage, levels = self._so_far(wall_seconds)
        usage.samples = None
        return usage.to_dict() | levels

    def _so_far(self, wall_seconds: float) -> tuple[Usage, dict[str, Any]]:
        usage, measured = self._measured()
        levels = {name: getattr(measured, name) for name in LEVELS}
        if usage.user_seconds is None and self._init:
            from imgrun.accounting.by_process import measure

            found = measure(self._init)
            if found is not None:
                usage.source = "proc"
                usage.user_seconds, usage.system_seconds = found.user_seconds, found.system_seconds
                for name in ("memory_current", "pids_current"):
                    levels[name] = getattr(found, name) if levels[name] is None else levels[name]
        return self._finished(usage, wall_seconds), levels

    def _measured(self) -> tuple[Usage, CgroupUsage]:
        usage = Usage(source="cgroup")
        measured = self._cgroup.usage()
        for field in measured._fields:
            if field in Usage.__slots__:
                setattr(usage, field, getattr(measured, field))
        return usage, measured

    def _finished(self, usage: Usage, wall_seconds: float) -> Usage:
        usage.user_seconds = _less(usage.user_seconds, self._setup_seconds[0])
        usage.system_seconds = _less(usage.system_seconds, self._setup_seconds[1])
        self._add_counts(usage)
        usage.wall_seconds = round(wall_seconds, 6)
        if self._earlier is not None:
            usage.follow(self._earlier)
        usage.samples = self._earlier.get("samples") if self._earlier is not None else None
        if self._series is not None:
            usage.samples = self._series.to_dict()
        return usage

    def _add_counts(self, usage: Usage) -> None:
        if self._counters is None:
            return
        from imgrun.pmu.events import rates

        found = self._counters.read()
        before = self._counted_before
        usage.counts = {k: None if v is None else max(v - (before.get(k) or 0), 0) for k, v in found.counts.items()}
        usage.rates = rates(usage.counts)._asdict()
        qualities = [found.scope, *(["user"] if found.user_only else []), *(["scaled"] if found.scaled else [])]
        usage.counted = " ".join(qualities)

    # -- samples ------------------------------------------------------------------------------------------------------

    def start_sampling(self, moment: float) -> None:
        """Keep a time series, if the spec asks for one; the first point is due at ``moment``."""
        if self.spec.sample is not None:
            from imgrun.accounting.sampling import Series

            earlier = self._earlier.get("samples") if self._earlier is not None else None
            self._series = Series(self.spec.sample, earlier if isinstance(earlier, dict) else None)
            self.sample_due = moment

    def sample(self, moment: float, wall_seconds: float) -> None:
        """Take a point of the time series."""
        assert self._series is not None
        usage, levels = self._so_far(wall_seconds)
        counts = usage.counts or {}
        user, system = usage.user_seconds, usage.system_seconds
        self._series.add({
            "wall_seconds": round(wall_seconds, 3),
            "cpu_seconds": None if user is None or system is None else round(user + system, 6),
            "memory": levels["memory_current"],
            "pids": levels["pids_current"],
            "read_bytes": usage.read_bytes,
            "written_bytes": usage.written_bytes,
            "instructions": counts.get("instructions"),
            "cycles": counts.get("cycles"),
        })  # fmt: skip
        # Late ones, as of a stopped machine, are not made up for.
        due = (self.sample_due or moment) + self._series.interval
        self.sample_due = due if due > moment else moment + self._series.interval

    # -- memory kills -------------------------------------------------------------------------------------------------

    def memory_killed(self) -> bool:
        """Whether the kernel killed something of the job for want of memory."""
        return self.memory is not None and self.memory.killed()

    def memory_verdict(self, peak: int | None) -> Verdict:
        """What to tell the user of that, and what to do. ``peak`` in bytes."""
        assert self.memory is not None
        return self.memory.verdict(self.spec.memory, peak if peak is not None else self._cgroup.usage().memory_peak)

    def close(self) -> None:
        if self.memory is not None:
            self.memory.close()
            self.memory = None
        if self._counters is not None:
            self._counters.close()
            self._counters = None


def _less(total: float | None, part: float) -> float | None:
    return None if total is None else round(max(0.0, total - part), 6)
