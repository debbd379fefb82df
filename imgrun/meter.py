"""What a job uses: its cgroup, the kernel's counters, and what was known of its earlier lives, as one Usage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from imgrun.isolation.cgroups.cgroup import JobCgroup
from imgrun.result import Usage
from imgrun.spec import JobSpec

if TYPE_CHECKING:
    import resource

    from imgrun.pmu.counters import Counters


class Meter:
    """Measures one job from its start to its end."""

    def __init__(self, spec: JobSpec, cgroup: JobCgroup, earlier: Mapping[str, Any] | None) -> None:
        self.spec = spec
        self._cgroup = cgroup
        self._earlier = earlier
        self._counters: Counters | None = None
        self._counted_before: dict[str, int | None] = {}
        self._setup_seconds = (0.0, 0.0)

    def start_counting(self, pid: int) -> None:
        """Open the performance counters, before the command runs. Raises HostError for ``--pmu require``."""
        if self.spec.pmu == "off":
            return
        from imgrun.pmu.counters import Counters

        directory = self._cgroup.clone_into
        self._counters = Counters.of_cgroup(directory) if directory >= 0 else None
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

    def total(self, wall_seconds: float, reaped: resource.struct_rusage) -> Usage:
        """What the job used: from its cgroup before that goes, and the rest from what the kernel said when it was reaped.

        ``reaped`` holds what all its processes used that were waited for, which the job's init does for all orphans.
        """
        usage = self._measured()
        if usage.user_seconds is None:
            usage.source = "rusage"
            usage.user_seconds, usage.system_seconds = reaped.ru_utime, reaped.ru_stime
        if usage.read_bytes is None:
            usage.read_bytes, usage.written_bytes = reaped.ru_inblock * 512, reaped.ru_oublock * 512
        usage.user_seconds = _less(usage.user_seconds, self._setup_seconds[0])
        usage.system_seconds = _less(usage.system_seconds, self._setup_seconds[1])
        self._add_counts(usage)
        return self._with_earlier(usage, wall_seconds)

    def so_far(self, wall_seconds: float) -> Usage:
        """What a running job has used, as far as its cgroup tells."""
        return self._with_earlier(self._measured(), wall_seconds)

    def _measured(self) -> Usage:
        usage = Usage(source="cgroup")
        measured = self._cgroup.usage()
        for field in measured._fields:
            if field in Usage.__slots__:
                setattr(usage, field, getattr(measured, field))
        return usage

    def _add_counts(self, usage: Usage) -> None:
        if self._counters is None:
            return
        from imgrun.pmu.events import rates

        found = self._counters.read()
        before = self._counted_before
        usage.counts = {k: None if v is None else v - (before.get(k) or 0) for k, v in found.counts.items()}
        usage.rates = rates(usage.counts)._asdict()
        qualities = [found.scope, *(["user"] if found.user_only else []), *(["scaled"] if found.scaled else [])]
        usage.counted = " ".join(qualities)

    def _with_earlier(self, usage: Usage, wall_seconds: float) -> Usage:
        usage.wall_seconds = round(wall_seconds, 6)
        if self._earlier is not None:
            usage.follow(self._earlier)
        return usage

    # -- memory kills -------------------------------------------------------------------------------------------------

    def memory_events(self) -> tuple[int, int] | None:
        """What to poll to learn of memory kills; None where the kernel does not tell."""
        source = self._cgroup.memory_event_source()
        return source if source[0] >= 0 else None

    def acknowledge_memory_event(self) -> None:
        self._cgroup.acknowledge_memory_event()

    def memory_killed(self) -> bool:
        return bool(self._cgroup.oom_kills())

    def memory_verdict(self, usage: Usage) -> tuple[str, str]:
        """What to tell the user of a memory kill, and what to do."""
        limit = self.spec.memory
        peak = f"; its peak was {usage.memory_peak >> 20} MiB" if usage.memory_peak else ""
        if limit is None:
            return f"the job was killed for memory by a limit above its own, or the host's{peak}", "ask for more memory"
        return f"the job ran into its memory limit of {limit >> 20} MiB{peak}", "give a larger --memory"

    def close(self) -> None:
        if self._counters is not None:
            self._counters.close()
            self._counters = None


def _less(total: float | None, part: float) -> float | None:
    return None if total is None else round(max(0.0, total - part), 6)
