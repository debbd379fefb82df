"""The result of a job: how it ended and what it used. What was not measured is None, never 0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Reason = Literal[
    "exited", "signaled", "memory-limit", "host-memory", "time-limit", "stopped", "checkpointed", "lost",
    "failed-to-start",
]  # fmt: skip

TIME_LIMIT_CODE = 124
FAILURE_CODE = 125
MEMORY_CODE = 137


@dataclass(slots=True)
class Usage:
    """What the job used. Times in seconds, sizes in bytes. ``source`` says how it was measured: cgroup, rusage or proc."""

    wall_seconds: float | None = None
    user_seconds: float | None = None
    system_seconds: float | None = None
    memory_peak: int | None = None
    """Everything charged to the job, page cache included."""
    memory_anon: int | None = None
    memory_file: int | None = None
    memory_shmem: int | None = None
    """Of that, what is in memory file systems (tmpfs, /dev/shm) and shared memory."""
    memory_kernel: int | None = None
    swap_peak: int | None = None
    read_bytes: int | None = None
    written_bytes: int | None = None
    read_operations: int | None = None
    write_operations: int | None = None
    pids_peak: int | None = None
    pids_refused: int | None = None
    periods: int | None = None
    throttled_periods: int | None = None
    throttled_seconds: float | None = None
    cpu_some_stalled: float | None = None
    memory_full_stalled: float | None = None
    io_full_stalled: float | None = None
    scratch_bytes: int | None = None
    counts: dict[str, int | None] | None = None
    """Performance counters by the names of imgrun.pmu.events; a counter that the host lacks is None."""
    rates: dict[str, float | None] | None = None
    """Ratios of them: instructions per cycle and the like."""
    counted: str | None = None
    """What they are of: cgroup or inherited, with ``user`` for user space only, ``scaled`` for extrapolated counts, and
    ``partial`` when some were counted in a part of the job's lives only."""
    samples: dict[str, Any] | None = None
    """What ``--sample`` kept (imgrun.accounting.sampling)."""
    source: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def follow(self, earlier: Mapping[str, Any]) -> None:
        """Go on from what an earlier life of the job has used: sums, and of peaks and levels the larger one.

        Wall time and samples are left as they are. What was not measured in one of the lives counts in the other only.
        """
        self._follow_counts(earlier)
        for key, before in earlier.items():
            if key not in Usage.__slots__ or key in NOT_SUMMED or not isinstance(before, int | float):
                continue
            value = getattr(self, key)
            if value is None:
                setattr(self, key, before)
            else:
                is_level = key.endswith("_peak") or (key.startswith("memory_") and not key.endswith("_stalled"))
                setattr(self, key, max(value, before) if is_level else value + before)

    def _follow_counts(self, earlier: Mapping[str, Any]) -> None:
        before = earlier.get("counts")
        if not isinstance(before, dict):
            return
        if self.counts is None:
            self.counts, self.rates, self.counted = before, earlier.get("rates"), earlier.get("counted")
            return
        from imgrun.pmu.events import joined

        self.counts, self.rates, partial = joined(before, earlier.get("rates") or {}, self.counts)
        words = [*(self.counted or "").split(), *str(earlier.get("counted") or "").split(), *(["partial"] if partial else [])]
        self.counted = " ".join(dict.fromkeys(words))


NOT_SUMMED = ("wall_seconds", "scratch_bytes", "source", "counts", "rates", "counted", "samples")


@dataclass(slots=True)
class Result:
    """The record of a finished job, as ``--result``, ``inspect`` and the library give it."""

    id: str
    name: str | None
    image: str
    command: tuple[str, ...]
    reason: Reason
    exit_code: int | None
    """The command's own exit code; None when a signal ended it or it never ran."""
    signal: int | None
    """The signal that ended the command; None when it exited."""
    message: str | None
    """One line for people: why, when there is more to say than the exit code does."""
    hint: str | None
    started_at: str | None
    finished_at: str
    hostname: str | None = None
    usage: Usage = field(default_factory=Usage)
    warnings: tuple[str, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)
    """Milliseconds of the steps of the start, in order."""
    failure_code: int = FAILURE_CODE
    """What the command line exits with when the job failed to start: 125, 126 or 127."""
    failure_class: str | None = None
    """The error of imgrun.errors with which the job failed to start."""

    @property
    def hold_reason(self) -> str | None:
        """What a batch system should tell the job's owner, when it was not the command that ended it; else None."""
        if self.message is None or self.reason in ("exited", "signaled", "stopped", "checkpointed"):
            return None
        return self.message if self.hint is None else f"{self.message}; {self.hint}"

    @property
    def exit_status(self) -> int:
        """What ``imgrun start`` exits with."""
        if self.reason == "failed-to-start":
            return self.failure_code
        if self.reason == "lost":
            return FAILURE_CODE
        if self.reason == "time-limit":
            return TIME_LIMIT_CODE
        if self.reason in ("memory-limit", "host-memory"):
            return MEMORY_CODE
        if self.exit_code is not None:
            return self.exit_code
        return 128 + (self.signal or 0)

    def to_dict(self) -> dict[str, Any]:
        record = asdict(self)
        record["exit_status"] = self.exit_status
        if self.reason != "failed-to-start":
            record["failure_code"] = None
        record["hold_reason"] = self.hold_reason
        return record

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Result:
        known = {k: v for k, v in record.items() if k not in ("exit_status", "hold_reason")}
        if known.get("failure_code") is None:
            known.pop("failure_code", None)
        known["usage"] = Usage(**known.get("usage", {}))
        for key in ("command", "warnings"):
            known[key] = tuple(known.get(key, ()))
        return cls(**known)
