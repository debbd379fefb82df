"""What a cgroup measured of its job. A value that this host does not measure is None, never 0."""

from __future__ import annotations

from typing import NamedTuple


class CgroupUsage(NamedTuple):
    """Everything the job used since its directories were made, nested cgroups included.

    Times in seconds, memory in bytes. ``memory_*`` is what the kernel charged to the job: the page cache of files that
    it read or wrote is in ``memory_file`` and in the totals, and can be taken back at any time.
    """

    user_seconds: float | None = None
    system_seconds: float | None = None

    memory_current: int | None = None
    memory_peak: int | None = None
    memory_anon: int | None = None
    memory_file: int | None = None
    """Page cache, tmpfs and shared memory included."""
    memory_shmem: int | None = None
    memory_kernel: int | None = None
    swap_current: int | None = None
    swap_peak: int | None = None

    read_bytes: int | None = None
    """Read from disks; what came from the page cache is not in it."""
    written_bytes: int | None = None
    read_operations: int | None = None
    write_operations: int | None = None

    pids_current: int | None = None
    pids_peak: int | None = None
    pids_refused: int | None = None
    """How often a fork failed because of the limit of processes."""

    periods: int | None = None
    """Periods of the processor quota in which the job ran; None without a quota."""
    throttled_periods: int | None = None
    throttled_seconds: float | None = None

    cpu_some_stalled: float | None = None
    """Time in which some task of the job waited for a processor (pressure stall information)."""
    cpu_full_stalled: float | None = None
    memory_some_stalled: float | None = None
    memory_full_stalled: float | None = None
    """Time in which all its tasks waited for memory at once."""
    io_some_stalled: float | None = None
    io_full_stalled: float | None = None

    def or_else(self, other: CgroupUsage) -> CgroupUsage:
        """This usage, with what it does not know taken from ``other``."""
        return CgroupUsage._make(mine if mine is not None else theirs for mine, theirs in zip(self, other, strict=True))


class MemoryEvents(NamedTuple):
    """What happened to the job for want of memory, as counts since its start."""

    kills: int | None = None
    """Processes of the job that the kernel killed, because of any limit or of the host running out.

    When v2 kills the job as a whole, it may count the first one twice.
    """
    at_limit: int | None = None
    """How often at least usage was at the job's own limit. Taking back page cache mostly helped: no harm as such."""


def seconds(microseconds: int | None) -> float | None:
    return None if microseconds is None else microseconds / 1e6
